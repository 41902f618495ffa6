"""Default samplers of models, and checks of what distilled models can do."""

import jax
import numpy as np

from diffjax import sampler, solvers
from diffjax.config import SEEDS, Distillation
from diffjax.inference.model import TrainedModel
from diffjax.sampler import Plan
from diffjax.schedule import Schedule, length, trailing


def default_sampler(distillation: Distillation, levels: Schedule) -> tuple[str, int]:
    """The default sampler and its steps: DDIM-50, or that of a distilled model.

    Consistency models take two steps, or one where the middle of their levels is none of them.
    """
    if distillation.method == "consistency":
        return "consistency", 1 if distillation.steps % 2 else 2
    return "ddim", distillation.steps or min(50, length(levels))


def default_steps(distillation: Distillation, levels: Schedule, name: str) -> int:
    """The default steps of a sampler: all T of DDPM, 50 of others, at most T.

    A distilled model's own sampler takes the steps that the model was trained for.
    """
    default, steps = default_sampler(distillation, levels)
    T = length(levels)
    return steps if name == default else T if name == "ddpm" else min(50, T)


def distillation_warning(model: TrainedModel, plan: Plan) -> str:
    """A warning if a distilled model was not trained for `plan`, else ""."""
    distillation = model.info.config.distillation
    if not distillation.steps:
        return ""
    t, steps = trailing(model.schedule, distillation.steps), distillation.steps
    if distillation.method == "consistency":
        decreasing = (np.diff(plan.level.t) < 0).all()
        known = decreasing and np.isin(plan.level.t, t).all()
        trained = solvers.consistency(model.schedule, plan.level.t) if known else None
        text = f"consistency at some of {steps} levels"
    else:
        trained, text = sampler.ddim(model.schedule, t), f"ddim in {steps} steps"
    if trained is not None and trained.steps == plan.steps:
        leaves = zip(jax.tree.leaves(plan), jax.tree.leaves(trained), strict=True)
        if all(np.array_equal(a, b) for a, b in leaves):
            return ""
    return (
        f"{model.name} was distilled for {text}, trailing: expect worse samples from another plan"
    )


def require_undistilled(model: TrainedModel) -> None:
    """Check that a model is a denoiser at every noise level, without guidance in it.

    Raises: ValueError for a distilled model.
    """
    distillation = model.info.config.distillation
    if distillation.steps or distillation.guidance_conditioned:
        raise ValueError(f"{model.name} is a distilled model: use its teacher")


def check_seed(seed: int) -> None:
    """Check a seed, which JAX would take modulo 2**32.

    Raises: ValueError for a seed outside 0..2**32 - 1.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}: use 0 or more, and less than 2**32")
