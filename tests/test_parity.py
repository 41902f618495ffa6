"""DDIM against diffusers' scheduler: live where the parity extra is installed (`make parity`), and everywhere against
arrays that `python tests/test_parity.py` stored from it.

The network is a formula, so that nothing but the samplers can differ: eps(x, t) = tanh(x + t/1000) / 2 + x / 4, with t
counted from 0 as diffusers does.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import denoiser, process, sampler, schedule

STORED = Path(__file__).parent / "diffusers_ddim.npz"
SCHEDULES = {"linear": schedule.linear, "cosine": schedule.cosine}
# Of the largest value. diffusers' tables are float32, and its cosine loses alpha-bar_T = 2.4e-9 there.
TOLERANCE = {"linear": 1e-5, "cosine": 2e-5}
CASES = [(betas, spacing, n) for betas in SCHEDULES for spacing in ("leading", "trailing") for n in (10, 25, 50)]


def network(x, t, xp):
    return xp.tanh(x + t / 1000) / 2 + x / 4


def start():
    return np.random.default_rng(0).normal(size=(4, 3, 3, 1)).astype(np.float32)


def ours(betas, spacing, steps):
    def apply(params, x, t, condition):
        return network(x, t.reshape(-1, 1, 1, 1).astype(jnp.float32), jnp)

    levels = SCHEDULES[betas](1000)
    plan = sampler.ddim(levels, schedule.SPACINGS[spacing](levels, steps))
    denoise = denoiser.condition_on(denoiser.from_network(apply, None, process.PREDICTIONS["eps"]), None)
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    return np.asarray(sampler.sample(jax.jit(partial(sampler.advance, denoise)), plan, jnp.asarray(start()), keys))


def theirs(betas, spacing, steps):
    import torch
    from diffusers import DDIMScheduler

    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule=name, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start())
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t), torch), t, x, eta=0.0).prev_sample
    return x.numpy()


def check(found, expected, betas):
    assert np.abs(found - expected).max() / np.abs(expected).max() <= TOLERANCE[betas]


@pytest.mark.parametrize(("betas", "spacing", "steps"), CASES)
def test_ddim_is_diffusers_stored(betas, spacing, steps):
    check(ours(betas, spacing, steps), np.load(STORED)[f"{betas}-{spacing}-{steps}"], betas)


@pytest.mark.parametrize(("betas", "spacing", "steps"), CASES)
def test_ddim_is_diffusers_live(betas, spacing, steps):
    pytest.importorskip("diffusers", reason="the parity extra is not installed")
    check(ours(betas, spacing, steps), theirs(betas, spacing, steps), betas)


if __name__ == "__main__":
    np.savez_compressed(STORED, **{"-".join(map(str, case)): theirs(*case) for case in CASES})
