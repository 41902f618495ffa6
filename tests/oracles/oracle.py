"""A network in closed form: the exact denoiser of Gaussian data of two classes.

Its parameters are 0 where it is exact, and learned: `lean` is added to the means of its classes, so
that weights tell themselves apart, and `reach` times x to its estimates, which a student needs.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax import build, sampler, schedule
from diffjax.build import ModelInfo
from diffjax.checkpoint import Checkpoints, ema_key
from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn import registry
from diffjax.nn.conditioning import ClassLabel
from diffjax.process import append_dims
from diffjax.schedule import Level
from diffjax.testing import run_plan

SIDE = 4
# The means of the classes, [2, 4, 4, 1]: a step to the right, and a step down.
MEANS = np.zeros((2, SIDE, SIDE, 1))
MEANS[0, :, :2], MEANS[0, :, 2:], MEANS[1, :2], MEANS[1, 2:] = -0.3, 0.2, 0.3, -0.1
NULL = 2  # the label of a sample of either class
SPREAD = 0.1
SHIFT, DATA_SPREAD = 2.0, 0.3  # of the schedule flow, and of the prediction edm


def estimate(x, alpha, sigma, label, lean=0.0, spread=SPREAD, np=np):
    """E[x0 | x] of x [B, 4, 4, 1], label [B]; alpha, sigma: scalars or [B]."""
    means = np.asarray(MEANS, x.dtype) + lean
    alpha, sigma = (append_dims(np.asarray(leaf), x) for leaf in (alpha, sigma))
    variance = alpha**2 * spread**2 + sigma**2
    share = alpha * spread**2 / variance
    of_class = [mean + share * (x - alpha * mean) for mean in means]
    far = [np.sum((x - alpha * mean) ** 2 / variance, (1, 2, 3)) / 2 for mean in means]
    odds = far[1] - far[0]  # log of p(x | class 0)/p(x | class 1)
    either = 1 / (1 + np.exp(-np.clip(odds, -60, 60)))
    first = np.where(label == NULL, either, np.where(label == 0, 1.0, 0.0))
    first = append_dims(first, x)
    return first * of_class[0] + (1 - first) * of_class[1]


class Oracle(nn.Module):
    """The denoiser as a network that knows its inputs alone, which depend on what it predicts."""

    levels: Level
    predicts: str
    spread: float

    @nn.compact
    def __call__(self, x, t, condition, keys=None):
        lean = self.param("lean", nn.initializers.zeros, ())
        reach = self.param("reach", nn.initializers.zeros, ())
        x_t, alpha, sigma = self.noisy_sample(x, t)
        x0 = estimate(x_t, alpha, sigma, condition, lean, self.spread, jnp) + reach * x_t
        alpha, sigma = append_dims(alpha, x), append_dims(sigma, x)
        if self.predicts == "x0":
            return x0
        if self.predicts == "eps":
            return (x_t - alpha * x0) / sigma
        if self.predicts == "flow":
            return (x_t - x0) / sigma
        n = jnp.sqrt(sigma**2 + DATA_SPREAD**2)  # F = (D - c_skip*x)/c_out
        return (x0 - DATA_SPREAD**2 / n**2 * x_t) * n / (sigma * DATA_SPREAD)

    def noisy_sample(self, x, t):
        """x_t in a form of the path, and its alpha and sigma [B]."""
        if self.predicts == "flow":
            return x, 1 - t / 1000, t / 1000
        if self.predicts == "edm":
            sigma = jnp.exp(4 * t)
            return x * append_dims(jnp.sqrt(sigma**2 + DATA_SPREAD**2), x), 1 + 0 * t, sigma
        half = jnp.interp(t + 1, self.levels.t[1:], schedule.logsnr(self.levels)[1:] / 2)
        return x, jax.nn.sigmoid(2 * half) ** 0.5, jax.nn.sigmoid(-2 * half) ** 0.5


@dataclasses.dataclass(frozen=True)
class OracleConfig(registry.NetworkConfig):
    """Configuration of an oracle, with what it has to know of the diffusion."""

    T: int = 100
    first: float = 1e-3
    last: float = 0.2
    predicts: str = "eps"
    spread: float = SPREAD

    @property
    def levels(self):
        if self.predicts == "flow":
            return schedule.variance_preserving(schedule.flow(self.T, SHIFT))
        if self.predicts == "edm":
            return schedule.variance_preserving(schedule.edm(self.T))
        return schedule.linear(self.T, self.first, self.last)

    @property
    def diffusion(self):
        if self.predicts == "flow":
            return Diffusion(schedule="flow", T=self.T, prediction="flow", shift=SHIFT)
        if self.predicts == "edm":
            return Diffusion(schedule="edm", T=self.T, prediction="edm", sigma_data=DATA_SPREAD)
        return Diffusion(T=self.T, betas=(self.first, self.last), prediction=self.predicts)

    def build(self, x_shape, conditioning):
        return Oracle(self.levels, self.predicts, self.spread)


registry.register("oracle", OracleConfig)


def configuration(data, network=None, **train):
    """The configuration of an oracle of the images of a file."""
    network = OracleConfig() if network is None else network
    settings = Train(batch=16, warmup=0, decay="none", **train)
    return Config(Data(source="npz", path=str(data)), network, network.diffusion, settings)


def write_images(path, num, spread, seed=0, means=MEANS):
    """Images of both classes in turn, in a file."""
    r = np.random.default_rng(seed)
    y = np.arange(num) % 2
    x = means[y] + spread * r.normal(size=(num, *MEANS.shape[1:]))
    np.savez(path, x=np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)[..., 0], y=y)
    return path


def write_run(folder, config, ema=0.0, raw=0.0):
    """A run folder of an oracle, whose weights lean so."""
    info = ModelInfo(config, (SIDE, SIDE, 1), ClassLabel(2, names=("0", "1")))
    fresh = build.init_params(info, build.build_module(info), jax.random.key(0))
    trees = {
        name: fresh | {"lean": jnp.float32(lean)}
        for name, lean in (("params", raw), (ema_key(0), ema))
    }
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, trees | {"rest": {"step": np.int32(1)}}, info.to_dict())
    checkpoints.close()
    return folder


class Known(NamedTuple):
    """What a program was asked for."""

    label: object  # [N]
    seed: int = 0
    scale: float = 1.0
    away: int | None = NULL  # label that guidance leads away from
    lean_away: float = 0.0  # autoguidance: of the guide model
    interval: tuple[float, float] = (0.0, np.inf)
    rescale: float = 0.0
    bound: float | None = 1.0  # a quantile of thresholding, 1.0 for clipping, or None


def denoiser(known, lean=0.0, spread=SPREAD):
    """The guided and bounded denoiser, in float64, as the papers have it."""

    def denoise(x, level):
        place = level.alpha, level.sigma
        to = estimate(x, *place, known.label, lean, spread)
        x0, low, high = to, *known.interval
        if known.scale != 1 and low <= level.sigma / level.alpha <= high:
            other = known.label if known.away is None else np.full(len(x), known.away)
            start = estimate(x, *place, other, known.lean_away, spread)
            x0 = start + known.scale * (to - start)
            std, std_to = (leaf.std((1, 2, 3), keepdims=True) for leaf in (x0, to))
            x0 = x0 * (known.rescale * std_to / std + 1 - known.rescale)
        if known.bound is None:
            return x0
        if known.bound == 1:
            return np.clip(x0, -1, 1)
        size = np.quantile(np.abs(x0), known.bound, axis=(1, 2, 3), keepdims=True)
        return np.clip(x0, -np.maximum(size, 1), np.maximum(size, 1)) / np.maximum(size, 1)

    return denoise


def draws(plan, num, seed):
    """The noise that a plan starts from, and that of each row, by the keys of a seed."""
    keys = sampler.image_keys(jax.random.key(seed), np.arange(num))
    count = plan.steps if plan.d is not None else 0
    x, *z = (
        np.asarray(sampler.noise(keys, MEANS.shape[1:], i), np.float64) for i in range(count + 1)
    )
    return x, z


def samples(plan, known, lean=0.0, spread=SPREAD):
    """The samples of a plan [N, 4, 4, 1], in float64."""
    x, z = draws(plan, len(known.label), known.seed)
    return run_plan(denoiser(known, lean, spread), plan, x * plan.init_noise_sigma, z)


def grey(x):
    """Values in [-1, 1] as grey values, not rounded."""
    return np.clip((x + 1) * 127.5, 0, 255)
