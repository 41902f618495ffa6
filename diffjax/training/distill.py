"""Students of a trained run: which stages lead to them, and what trains each. `train.py distill` runs them.

Every stage is a run folder of its own and is trained as any run is: it starts from the weights of its teacher, the
stage before it. A network that says eps cannot teach a student of few steps to say eps, which at the noisiest level
tells nothing of x0; nor can its outputs be read as v. So the first stage, `any`, learns at all levels to say in v (or
x0) what the teacher says, guided if asked for, at any scale, in one pass; the others halve that, or make it consistent.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from diffjax import distillation, schedule
from diffjax.build import (
    build_network,
    build_optimizer,
    build_prediction,
    build_schedule,
    build_times,
    build_unet,
    build_weighting,
    init_params,
)
from diffjax.checkpoint import FOLDER
from diffjax.config import Config, Data, Distillation, Train
from diffjax.denoiser import ConditionalDenoiser, Denoiser, classifier_free_guidance, clip, condition_on, from_network
from diffjax.devices import parallel
from diffjax.inference.pipeline import Guidance, TrainedModel, check_guidance, describe_weights
from diffjax.interop import unet2d
from diffjax.loss import Objective, t_quartile
from diffjax.training.setup import Training
from diffjax.training.step import QUARTERS, TrainState, init_state, make_eval_step, make_train_step, multi_step

ANY, CONSISTENCY = "any", "consistency"  # names of stages; the others are named by their steps
FOREIGN_RATE = 1e-4  # of learning, for a network from elsewhere, which does not tell its own
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    # (schedule, steps) -> rows, and (student, teacher, x_t, *row) -> x0 that the student is to say there
    "guidance": (lambda levels, _: distillation.all_levels(levels), lambda _, teacher, x_t, level: teacher(x_t, level)),
    "progressive": (
        distillation.halving_levels,
        lambda _, teacher, x_t, *row: distillation.progressive_target(teacher, x_t, *row),
    ),
    "consistency": (distillation.adjacent_levels, distillation.consistency_target),
}
OWN: dict[str, Any] = {  # of training, where students differ from their teacher
    "steps": 2000, "warmup": 50, "decay": "cosine", "weighting": "truncated_snr", "label_dropout": 0.0, "ema": (0.999,),
    "eval_every": 1000, "preview_every": 1000, "save_every": 200,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Distill a trained run into students of few steps. The same command again goes on where it was."""

    teacher: str
    """Run folder; or hf:FOLDER or hf:OWNER/NAME, a UNet2DModel of diffusers."""
    workdir: str
    """Folder of the students, each a run folder in it: any (of any number of steps), 32, 16, ..., 1, or consistency."""
    method: Literal["progressive", "guidance", "consistency"] = "progressive"
    """Halve the steps of DDIM again and again; only make one pass of the two of guidance; or learn where the teacher's
    path ends, for consistency sampling, from the student's own moving average."""
    guidance: float | None = None
    """Largest guidance scale of the students, which are told any from 1 on; None for none, or that of the teacher."""
    start: int = 64
    """Steps of DDIM that the first student halves, or whose path ends where a consistent one says."""
    end: int = 1
    """Steps of the last student of progressive distillation."""
    prediction: Literal["v", "x0"] | None = None
    """What the students say; None for v, or x0 where the teacher says it."""
    weights: str = "ema"
    """Of the teacher: the moving average (of several the first, or one by its decay), or raw."""
    checkpoint: int | None = None
    """Training step of the teacher's checkpoint; None for the latest."""
    tensorboard: bool = False
    """Also write the metrics and previews of each student for TensorBoard."""
    hosts: Annotated[parallel.DistributedOptions, tyro.conf.arg(name="")] = field(
        default_factory=parallel.DistributedOptions
    )
    data: Data = field(default_factory=Data)
    """Those of the teacher, where it tells them."""
    train: Train = field(default_factory=lambda: Train(**OWN))
    """Of each student, with twice the steps for those of 2 and 1. The learning rate is a third of the teacher's, and
    batch, seed and others are the teacher's, where not told."""


class Stage(NamedTuple):
    """A student."""

    name: str  # of its folder
    config: Config


def defaults(options: Options, teacher: TrainedModel) -> Options:
    """The options with the teacher's data, and of its training what is not done otherwise here."""
    config = teacher.description.config
    rate = config.train.learning_rate / (3 if config.distillation.method == "none" else 1)
    if unet2d.is_source(str(config.data)):
        rate = FOREIGN_RATE
    train: Any = dataclasses.replace(config.train, **OWN | {"learning_rate": rate})
    return dataclasses.replace(options, data=config.data, train=train)


def stages(options: Options, teacher: TrainedModel) -> list[Stage]:
    """The students, each the teacher of the next. ValueError for what the teacher cannot teach."""
    config = teacher.description.config
    task, T = config.distillation, schedule.length(teacher.schedule)
    largest = task.guidance if options.guidance is None else options.guidance
    said = config.diffusion.prediction
    says = options.prediction or ("x0" if said == "x0" else "v")
    if task.told and largest != task.guidance:
        raise ValueError(
            f"{teacher.name} is told guidance scales of 1 to {task.guidance:g}: leave out --guidance, or name its own"
            " teacher"
        )
    if not 1 <= largest < np.inf:
        raise ValueError(f"--guidance is {largest:g}: a student learns the scales from 1 to it, use more than 1")
    if not task.told:
        check_guidance(teacher, Guidance(largest))
    if unet2d.is_source(str(options.data)):
        raise ValueError(f"{options.teacher} does not tell its images: name them, as with --data.name cifar10")
    if options.method != "progressive" and options.end != 1:
        raise ValueError(f"--end belongs to --method progressive, and not to {options.method}: leave it out")
    if options.train.label_dropout:
        raise ValueError("students learn with every label: leave out --train.label-dropout")
    if task.method == "consistency":
        raise ValueError(f"{teacher.name} says where a path ends, and not where it goes: use its teacher")
    if task.steps and said != says:
        raise ValueError(f"{teacher.name} says {said}, which its own students say too: leave out --prediction")

    def stage(name: str, method: Any, start: int = 0, visited: int = 0) -> Stage:
        # The last two halvings are the hardest, and are given twice the time (2202.00512, appendix).
        steps = options.train.steps * (2 if visited in (1, 2) else 1)
        return Stage(
            name,
            Config(
                data=options.data,
                network=dataclasses.replace(config.network, dropout=0.0),
                diffusion=dataclasses.replace(config.diffusion, prediction=says),
                train=dataclasses.replace(options.train, steps=steps),
                distillation=Distillation(method, "", start, visited, largest),
            ),
        )

    start, visited = options.start, options.start
    found = [stage(ANY, "guidance")] if said != says or (largest > 1 and not task.told) else []
    if options.method == "guidance":
        if task.told or largest == 1:
            raise ValueError(
                f"--method guidance makes one pass of guidance of two, and {teacher.name} is "
                + ("told its scale in one already" if task.told else "to have none: name a --guidance above 1")
            )
        return found
    if not 2 <= start <= T:
        raise ValueError(f"--start is {start}: use 2 to {T}, the levels of {teacher.name}")
    if task.steps not in (0, start):
        raise ValueError(
            f"{teacher.name} is a student of {task.steps} steps itself: use --start {task.steps}, or its teacher"
        )
    if options.method == "consistency":
        return [*found, stage(CONSISTENCY, "consistency", start, start)]
    while visited % 2 == 0 and visited > options.end >= 1:
        visited //= 2
        found.append(stage(str(visited), "progressive", start, visited))
    if visited != options.end or visited == start:
        raise ValueError(
            f"--start {start} and --end {options.end}: halving once or more leads from one to the other, as from 64 to"
            " 1"
        )
    return found


def taught(config: Config, teacher: TrainedModel) -> Config:
    """A student's configuration once its teacher is trained: one with other weights is another teacher, and a student
    that had begun to learn from it does not go on.
    """
    name = f"{teacher.name}, {describe_weights(teacher)}"
    return dataclasses.replace(config, distillation=dataclasses.replace(config.distillation, teacher=name))


def check_workdir(workdir: Path) -> None:
    """ValueError for what can be no folder of students."""
    if workdir.is_file():
        raise ValueError(f"{workdir} is a file: name a folder as --workdir")
    if (workdir / FOLDER).exists():
        raise ValueError(f"{workdir} is a run folder: name another --workdir, whose folders the students will be")


def build_training(config: Config, image_shape: tuple[int, int, int], classes: int, teacher: TrainedModel) -> Training:
    """The steps of one device that train one student: as of `experiment.build_training`, but all of them take the
    teacher's parameters, which they only read, after the batch. ValueError for parts, or a teacher, that do not fit.
    """
    if (image_shape, classes) != teacher.description[1:]:
        raise ValueError(
            f"{teacher.name} knows images and classes {teacher.description[1:]}, and the data are"
            f" {(image_shape, classes)}: name its data with --data"
        )
    task, train, levels = config.distillation, config.train, build_schedule(config)
    prediction, times = build_prediction(config), build_times(config)
    unet = build_unet(config, image_shape, classes)
    network, (optimizer, rate) = build_network(config, unet), build_optimizer(config)
    make_rows, says = METHODS[task.method]
    rows = make_rows(levels, task.steps)
    weights = build_weighting(config)(levels, prediction)[rows[0].t]

    def guided(conditional: ConditionalDenoiser, condition: Any) -> Denoiser:
        label, scale = condition
        return classifier_free_guidance(conditional, label, classes, scale[:, 0])

    teach = guided if task.told and not teacher.description.config.distillation.told else condition_on

    def objective(frozen: Any, averaged: Any) -> Objective:
        conditional = from_network(teacher.network, frozen, teacher.prediction)
        own = from_network(network, averaged, prediction)

        def target(condition: Any, x_t: Any, *row: Any) -> Any:
            return says(clip(condition_on(own, condition)), clip(teach(conditional, condition)), x_t, *row)

        return distillation.distillation_loss(network, prediction, rows, weights, target, times, task.guidance)

    count = len(rows[0].t)

    def step(state: TrainState, batch: Any, frozen: Any, axis_name: str | None = None) -> Any:
        one = make_train_step(
            objective(frozen, state.ema[0]), optimizer, train.ema, train.seed, accumulate=train.accumulate, rate=rate,
            quarters=t_quartile(times, count) if count >= len(QUARTERS) else None,
        )  # fmt: skip
        return one(state, batch, axis_name)

    def steps(state: TrainState, batches: Any, frozen: Any, axis_name: str | None = None) -> Any:
        return multi_step(lambda s, batch, axis_name: step(s, batch, frozen, axis_name))(state, batches, axis_name)

    def eval_step(params: Any, batch: Any, frozen: Any, axis_name: str | None = None) -> jax.Array:
        return make_eval_step(objective(frozen, params), train.seed)(params, batch, axis_name)

    def init(key: jax.Array, frozen: Any) -> TrainState:
        params = distillation.init_from_teacher(init_params(unet, image_shape, key), frozen)
        # Copies: steps reuse the memory of their state, and go on reading the teacher.
        params = jax.tree.map(partial(jnp.array, copy=True), params)
        return init_state(params, optimizer, len(train.ema))

    return Training(unet, network, init, steps, eval_step)
