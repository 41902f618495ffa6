"""Samplers and schedules against diffusers.

DDIM runs compiled: everywhere against arrays that `python tests/test_parity.py` stored, and live
where the parity extra is installed (`make parity`). All other comparisons are live, of plans run
row by row in float64.

The network is a formula, so that nothing but the samplers can differ: tanh(x + t/1000) / 2 + x /
4, with t counted from 0 as diffusers does.

diffusers computes in float32, where rounding hides all beyond the fifth or sixth digit. So live
tests run it twice: as it is, and with float64 under the name of float32 in its modules, where ten
digits must agree.
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import denoiser, parameterization, process, sampler, schedule, solvers
from diffjax.testing import run_plan

STORED = Path(__file__).parent / "diffusers_ddim.npz"
BETAS = {
    "linear": (schedule.linear, "linear", {"beta_start": 0.0001, "beta_end": 0.02}),
    "scaled_linear": (
        schedule.scaled_linear,
        "scaled_linear",
        {"beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (schedule.cosine, "squaredcos_cap_v2", {}),
}
SCHEDULES = {name: make for name, (make, _, _) in BETAS.items()}
THEIRS = {name: {"beta_schedule": called, **ends} for name, (_, called, ends) in BETAS.items()}


def network(x, t, xp):
    return xp.tanh(x + t / 1000) / 2 + x / 4


def start():
    """float64, with values that float32 knows."""
    return np.random.default_rng(0).normal(size=(4, 3, 3, 1)).astype(np.float32).astype(np.float64)


def noise(n):
    return np.random.default_rng(1).normal(size=(n, 4, 3, 3, 1))


def error(found, expected):
    """Of the largest value."""
    return np.abs(found - expected).max() / np.abs(expected).max()


# ----------------------------------------------------------------------------- DDIM, compiled

# diffusers' tables are float32, and its cosine loses alpha-bar_T = 2.4e-9 there.
TOLERANCE = {"linear": 1e-5, "cosine": 2e-5}
CASES = [
    (betas, spacing, n)
    for betas in TOLERANCE
    for spacing in ("leading", "trailing")
    for n in (10, 25, 50)
]


def compiled(betas, spacing, steps):
    def apply(params, x, t, condition):
        return network(x, t.reshape(-1, 1, 1, 1).astype(jnp.float32), jnp)

    levels = SCHEDULES[betas](1000)
    plan = sampler.ddim(levels, schedule.SPACINGS[spacing](levels, steps))
    parameters = parameterization.ddpm(process.PREDICTIONS["eps"])
    denoise = denoiser.condition_on(denoiser.from_network(apply, None, parameters), None)
    keys = sampler.image_keys(jax.random.key(0), np.arange(4))
    return np.asarray(
        sampler.sample(
            jax.jit(partial(sampler.scan_plan, denoise)), plan, jnp.float32(start()), keys
        )
    )


def theirs(betas, spacing, steps):
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, **THEIRS[betas], timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start()).float()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t), torch), t, x, eta=0.0).prev_sample
    return x.numpy()


@pytest.mark.parametrize(("betas", "spacing", "steps"), CASES)
def test_ddim_stored(betas, spacing, steps):
    expected = np.load(STORED)[f"{betas}-{spacing}-{steps}"]
    assert error(compiled(betas, spacing, steps), expected) <= TOLERANCE[betas]


@pytest.mark.parametrize(("betas", "spacing", "steps"), CASES)
def test_ddim_live(betas, spacing, steps):
    pytest.importorskip("diffusers", reason="the parity extra is not installed")
    assert error(compiled(betas, spacing, steps), theirs(betas, spacing, steps)) <= TOLERANCE[betas]


# ----------------------------------------------------------------------------- diffusers, live


class Double:
    """A module with float64 under the name of float32."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


class Diffusers:
    """diffusers in one precision, with noise of ours."""

    def __init__(self, precision, monkeypatch):
        self.library = pytest.importorskip("diffusers", reason="the parity extra is not installed")
        self.torch = pytest.importorskip("torch")
        self.precision, self.monkeypatch = precision, monkeypatch

    def scheduler(self, name, steps, **config):
        made = getattr(self.library, name)
        if self.precision == "float64":
            for imported, module in (("torch", self.torch), ("np", np)):
                self.monkeypatch.setattr(
                    sys.modules[made.__module__], imported, Double(module), raising=False
                )
        scheduler = made(**config)
        scheduler.set_timesteps(steps)
        return scheduler

    def run(self, scheduler, x, z=(), **arguments):
        """Down its timesteps from x, with z[i] for the i-th noise that it draws."""
        tensor, drawn = (
            partial(self.torch.as_tensor, dtype=getattr(self.torch, self.precision)),
            iter(z),
        )
        module = sys.modules[type(scheduler).__module__]
        self.monkeypatch.setattr(
            module, "randn_tensor", lambda *_, **__: tensor(next(drawn)), raising=False
        )
        x = tensor(x)
        for t in scheduler.timesteps:
            scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # that of flow has none
            output = network(scale(x, t), float(t), self.torch)
            x = scheduler.step(output, t, x, **arguments).prev_sample
        return x.numpy()

    def check(self, found, expected, single=1e-5):
        # The 1e-10 is DDPMScheduler's, which clamps variances at 1e-20, onto data too; all others
        # meet 1e-13.
        assert error(found, expected) <= {"float32": single, "float64": 1e-10}[self.precision]


@pytest.fixture(params=["float32", "float64"])
def diffusers(request, monkeypatch):
    them = Diffusers(request.param, monkeypatch)
    before = them.torch.get_default_dtype()
    them.torch.set_default_dtype(getattr(them.torch, request.param))
    yield them
    them.torch.set_default_dtype(before)


def ours(plan, z=None, seen=lambda t: t):
    """A plan run with the network as eps; `seen`: the network's t, of ours counted from 0."""

    def denoise(x, level):
        return process.x0_from_eps(x, network(x, seen(level.t - 1), np), level)

    return run_plan(denoise, plan, start(), z)


# Where every scheduler is right but DDPM's fixed_large, which takes LEADING; see "diffusers is
# wrong" below.
LEADING = [("linear", "leading", 20), ("cosine", "leading", 50)]
EVEN = [
    *LEADING,
    ("linear", "trailing", 50),
    ("scaled_linear", "trailing", 20),
    ("cosine", "trailing", 25),
]
# Where those are that look the next level up in their own grid.
GRIDS = [*EVEN, ("linear", "trailing", 30), ("scaled_linear", "linspace", 20)]

DDIM, DDPM, HEUN = "DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
UNCLIPPED, LARGE, SDE = (
    {"clip_sample": False},
    {"variance_type": "fixed_large"},
    {"algorithm_type": "sde-dpmsolver++"},
)
SAMPLERS = {  # their class, its arguments, those of its step(), our plan, where
    "ddim, eta 0": (DDIM, UNCLIPPED, {}, sampler.ddim, EVEN),
    "ddim, eta 0.3": (DDIM, UNCLIPPED, {"eta": 0.3}, partial(sampler.ddim, eta=0.3), EVEN),
    "ddim, eta 1": (DDIM, UNCLIPPED, {"eta": 1.0}, partial(sampler.ddim, eta=1.0), EVEN),
    "ddpm, small": (DDPM, UNCLIPPED, {}, sampler.ddpm, GRIDS),
    "ddpm, large": (DDPM, UNCLIPPED | LARGE, {}, sampler.sigma_hat, LEADING),
    "euler": (DPM, {"solver_order": 1}, {}, sampler.euler, GRIDS),
    "2m": (DPM, {}, {}, solvers.dpm_solver_pp_2m, GRIDS),
    "2m sde": (DPM, SDE, {}, partial(solvers.dpm_solver_pp_2m, eta=1.0), GRIDS),
    # In 15 steps or more: in fewer, their last row but one is of order 2, ours of order 3.
    "3m": (DPM, {"solver_order": 3}, {}, solvers.dpm_solver_pp_3m, GRIDS),
    "unipc": (UNIPC, {}, {}, solvers.unipc_2, GRIDS),
    # Not by linspace, which is of fractions here, between which sigma/alpha is linear; our
    # logarithm of it is. Nor where a step shrinks sigma/alpha by more than 3.8x, as the last one of
    # leading grids and cosine's first: ours bounds its correction, and differs by 5e-4 at most.
    "heun": (HEUN, {}, {}, solvers.heun, EVEN[2:-1]),
}


@pytest.mark.parametrize(
    ("name", "betas", "spacing", "steps"),
    [(name, *grid) for name, row in SAMPLERS.items() for grid in row[-1]],
)
def test_samplers(diffusers, name, betas, spacing, steps):
    """Over the levels that diffusers chooses, whatever they are."""
    of, config, arguments, plan_of, _ = SAMPLERS[name]
    scheduler = diffusers.scheduler(of, steps, timestep_spacing=spacing, **THEIRS[betas], **config)
    levels, t = (
        SCHEDULES[betas](1000),
        1 + np.unique(scheduler.timesteps.numpy().astype(np.int64))[::-1],
    )
    scale = (
        levels.alpha[t[0]] if of == HEUN else 1.0
    )  # that one speaks of x/alpha, and has most of its levels twice
    found = diffusers.run(scheduler, start() / scale, noise(steps), **arguments)
    diffusers.check(found, ours(plan_of(levels, t), noise(steps)))


@pytest.mark.parametrize("variance", sampler.VARIANCES)
def test_thousand_step_chain(diffusers, variance):
    """Its beta_t is 1 - alpha_bar_t/alpha_bar_s, about 1e-4 near the data: float32 has three
    digits of it."""
    scheduler = diffusers.scheduler(DDPM, 1000, **UNCLIPPED, variance_type=variance)
    plan = sampler.ddpm(schedule.linear(1000), np.arange(1000, 0, -1), sampler.VARIANCES[variance])
    diffusers.check(
        diffusers.run(scheduler, start(), noise(1000)), ours(plan, noise(1000)), single=3e-5
    )


FRACTIONS = [
    (DPM, "use_karras_sigmas", "karras", solvers.dpm_solver_pp_2m),
    (DPM, "use_lu_lambdas", "uniform_logsnr", solvers.dpm_solver_pp_2m),
    (UNIPC, "use_karras_sigmas", "karras", solvers.unipc_2),
    (HEUN, "use_karras_sigmas", "karras", solvers.heun),
    (HEUN, "use_exponential_sigmas", "uniform_logsnr", solvers.heun),
]


@pytest.mark.parametrize(("of", "chosen", "spacing", "plan_of"), FRACTIONS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_fractional_levels(diffusers, betas, of, chosen, spacing, plan_of):
    """The multistep schedulers round the t that the network sees, though not its alpha and sigma;
    Heun's does not."""
    levels, scheduler = (
        SCHEDULES[betas](1000),
        diffusers.scheduler(of, 20, **THEIRS[betas], **{chosen: True}),
    )
    scale, seen = (levels.alpha[-1], lambda t: t) if of == HEUN else (1.0, np.round)
    plan = plan_of(levels, schedule.SPACINGS[spacing](levels, 20))
    diffusers.check(diffusers.run(scheduler, start() / scale), ours(plan, seen=seen))


def edm_denoise(x, level):
    """The network in the preconditioning of EDM, table 1 (arXiv:2206.00364), with sigma_data =
    0.5."""
    total = level.sigma**2 + 0.25
    return 0.25 / total * x + level.sigma * 0.5 / total**0.5 * network(
        x / total**0.5, np.log(level.sigma) / 4, np
    )


EDM_DPM = "EDMDPMSolverMultistepScheduler"
EDM = {
    "euler": ("EDMEulerScheduler", {}, sampler.euler),
    "2m": (EDM_DPM, {}, solvers.dpm_solver_pp_2m),
    "2m sde": (EDM_DPM, SDE, partial(solvers.dpm_solver_pp_2m, eta=1.0)),
    "3m": (EDM_DPM, {"solver_order": 3}, solvers.dpm_solver_pp_3m),
}


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize(
    ("spacing", "called"), [("karras", "karras"), ("uniform_logsnr", "exponential")]
)
def test_variance_exploding_samplers(diffusers, name, spacing, called):
    (of, config, plan_of), levels, x, z = EDM[name], schedule.edm(1000), 80 * start(), noise(20)
    plan = plan_of(levels, schedule.SPACINGS[spacing](levels, 20))
    found = diffusers.run(diffusers.scheduler(of, 20, sigma_schedule=called, **config), x, z)
    diffusers.check(found, run_plan(edm_denoise, plan, x, z))


@pytest.mark.parametrize("plan_of", [sampler.ddim, solvers.consistency])
@pytest.mark.parametrize(("shift", "steps"), [(1.0, 10), (3.0, 1), (3.0, 28)])
def test_flow(diffusers, shift, steps, plan_of):
    """DDIM on the straight path, over the sigmas that diffusers chooses; its network sees
    1000*sigma, and ours the time of `parameterization.flow`. Its table is `schedule.flow`. Where it
    is stochastic, it is the sampler of consistency models."""
    stochastic, z = plan_of is solvers.consistency, noise(steps)
    scheduler = diffusers.scheduler(
        "FlowMatchEulerDiscreteScheduler", steps, shift=shift, stochastic_sampling=stochastic
    )
    table = type(scheduler)(shift=shift).sigmas.numpy()
    diffusers.check(table[::-1], schedule.flow(1000, shift).sigma[1:], single=1e-6)
    sigma = scheduler.sigmas.numpy()[-2::-1].astype(np.float64)
    levels, preset = schedule.from_alphas(1 - sigma, sigma), parameterization.flow()

    def denoise(x, level):
        output = network(preset.input_scale(level) * x, preset.network_time(level), np)
        return preset.prediction.to_x0(x, output, level)

    for path in (levels, schedule.variance_preserving(levels)):
        plan = plan_of(path, np.arange(steps, 0, -1))
        found = run_plan(denoise, plan, plan.init_noise_sigma * start(), z)
        diffusers.check(diffusers.run(scheduler, start(), z), found)
        scheduler.set_timesteps(steps)  # back to its first step


# Both consistency schedulers mix x into the network's x0, each in its way, so that level 1
# returns x.


@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency(diffusers, steps):
    def denoise(x, level):
        scaled, x0 = 10 * (level.t - 1), process.x0_from_eps(x, network(x, level.t - 1, np), level)
        return (0.25 * x + scaled * (scaled**2 + 0.25) ** 0.5 * x0) / (scaled**2 + 0.25)

    scheduler, z = diffusers.scheduler("LCMScheduler", steps), noise(steps)
    plan = solvers.consistency(schedule.scaled_linear(1000), 1 + scheduler.timesteps.numpy())
    diffusers.check(diffusers.run(scheduler, start(), z), run_plan(denoise, plan, start(), z))


@pytest.mark.parametrize("steps", [2, 4])
def test_consistency(diffusers, steps):
    """Algorithm 1 of arXiv:2303.01469 takes level 1 for data, and adds sqrt(sigma**2 - 0.002**2);
    ours adds sigma."""

    def denoise(x, level):
        total, above = level.sigma**2 + 0.25, level.sigma - 0.002
        output = network(x / total**0.5, 250 * np.log(level.sigma), np)
        return 0.25 / (above**2 + 0.25) * x + above * 0.5 / total**0.5 * output

    scheduler = diffusers.scheduler("CMStochasticIterativeScheduler", steps, clip_denoised=False)
    plan, x, z = (
        solvers.consistency(schedule.edm(40), 40 - 40 // steps * np.arange(steps)),
        80 * start(),
        noise(steps),
    )
    plan = plan._replace(d=np.sqrt(np.maximum(plan.d**2 - 0.002**2, 0)))
    diffusers.check(diffusers.run(scheduler, x, z), run_plan(denoise, plan, x, z))


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("betas", BETAS)
def test_schedules(diffusers, betas, T):
    levels = SCHEDULES[betas](T)
    for made, zero in ((levels, False), (schedule.zero_terminal_snr(levels), True)):
        scheduler = diffusers.scheduler(
            DDIM, 10, num_train_timesteps=T, **THEIRS[betas], rescale_betas_zero_snr=zero
        )
        diffusers.check(scheduler.alphas_cumprod.numpy(), made.alpha[1:] ** 2, single=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings(spacing):
    """To one level, where they round: linspace ties to even levels, which diffusers counts from
    0; and trailing, where steps does not divide T, to the nearest, and ours down. (One step by
    its linspace is at level 1, by ours at T.)
    """
    library = pytest.importorskip("diffusers", reason="the parity extra is not installed")
    scheduler = library.DDIMScheduler(timestep_spacing=spacing)
    for steps in (2, 5, 10, 20, 25, 50, 100, 250, 500, 1000, 30, 7):
        scheduler.set_timesteps(steps)
        away = np.abs(
            1
            + scheduler.timesteps.numpy()
            - schedule.SPACINGS[spacing](schedule.linear(1000), steps)
        )
        assert away.max() <= (spacing == "linspace" or (spacing == "trailing" and 1000 % steps > 0))


# ----------------------------------------------------------------------------- diffusers is wrong
# A test that fails here may say that diffusers has been mended: then its case belongs above.


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 50), ("trailing", 30)])
def test_ddim_beside_its_grid(diffusers, spacing, steps):
    """Its step() goes from t to t - T // steps, which is right for leading, and for trailing
    where steps divides T. Elsewhere that is not the next of its own timesteps:
    huggingface/diffusers, issues 11347 and 12633.
    """
    scheduler = diffusers.scheduler(DDIM, steps, **UNCLIPPED, timestep_spacing=spacing)
    timesteps = scheduler.timesteps.tolist()
    assert any(t - 1000 // steps != s for t, s in pairwise(timesteps))
    expected = ours(sampler.ddim(schedule.linear(1000), 1 + np.array(timesteps)))
    assert error(diffusers.run(scheduler, start()), expected) > 1e-2
    # The same code agrees with ours once it is told each stride of its grid.
    x = start()
    for t, s in pairwise([*timesteps, -1]):
        scheduler.timesteps, scheduler.num_inference_steps = [t], 1000 // (t - s)
        assert 1000 // scheduler.num_inference_steps == t - s
        x = diffusers.run(scheduler, x)
    diffusers.check(x, expected)


def test_ddpm_adds_noise_to_data(diffusers):
    """Its step() adds noise where t > 0, but the last of trailing timesteps lands on data from t
    > 0: there fixed_large leaves noise of sigma_t in the images. All else agrees.
    """
    levels, z = schedule.linear(1000), noise(20)
    scheduler = diffusers.scheduler(DDPM, 20, **UNCLIPPED, **LARGE, timestep_spacing="trailing")
    found = diffusers.run(scheduler, start(), z)
    expected = ours(sampler.sigma_hat(levels, schedule.trailing(levels, 20)), z)
    assert error(found, expected) > 1e-2
    diffusers.check(found - levels.sigma[50] * z[-1], expected)


if __name__ == "__main__":
    np.savez_compressed(STORED, **{"-".join(map(str, case)): theirs(*case) for case in CASES})
