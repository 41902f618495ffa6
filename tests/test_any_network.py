"""Anything callable as network(params, x, t, condition) takes the UNet's place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from diffjax import denoiser, loss, parameterization, process, sampler, schedule
from diffjax.testing import gaussian_denoiser
from diffjax.training.state import init_state
from diffjax.training.step import make_train_step

EPS, LEVELS = parameterization.ddpm(process.PREDICTIONS["eps"]), schedule.linear(1000)
SHAPE = (2, 2, 1)


class Mlp(nn.Module):
    """A user's own network."""

    @nn.compact
    def __call__(self, x, t, condition):
        flat = x.reshape(len(x), -1)
        h = jnp.concatenate(
            [flat, jnp.sin(t[:, None] / 1000 * jnp.arange(1, 9)), jax.nn.one_hot(condition, 2)], -1
        )
        h = nn.silu(nn.Dense(64)(h))
        h = nn.silu(nn.Dense(64)(h))
        return nn.Dense(flat.shape[-1])(h).reshape(x.shape)


def sampled(network, params, labels):
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 20))
    keys = sampler.image_keys(jax.random.key(1), np.arange(len(labels)))
    denoise = denoiser.condition_on(denoiser.from_network(network, params, EPS), labels)
    run = jax.jit(partial(sampler.scan_plan, denoiser.clip(denoise)))
    return sampler.sample(run, plan, sampler.init_noise(plan, keys, SHAPE), keys)


def test_linen_network():
    """Images of label 0 are at -0.5, those of label 1 at 0.5, each with a standard deviation of
    0.1."""
    module = Mlp()
    labels = jnp.arange(256) % 2

    def network(params, x, t, condition, keys=None):
        return module.apply(params, x, t, condition)

    params = module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), labels[:1])
    optimizer = optax.adam(3e-3)
    step = jax.jit(
        make_train_step(loss.denoising_loss(network, EPS, LEVELS), optimizer, (0.99,), seed=0),
        donate_argnums=0,
    )
    state, losses, r = init_state(params, optimizer), [], np.random.default_rng(0)
    for n in range(400):
        image = (labels[:, None, None, None] - 0.5) + 0.1 * r.normal(size=(256, *SHAPE)).astype(
            np.float32
        )
        index = np.arange(256 * n, 256 * (n + 1), dtype=np.uint32)
        state, metrics = step(state, {"x": image, "condition": labels, "index": index})
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.3 * losses[0]
    images = sampled(network, state.ema[0], labels)
    means = [float(images[label::2].mean()) for label in (0, 1)]
    np.testing.assert_allclose(means, [-0.5, 0.5], atol=0.1)


class Oracle(nnx.Module):
    """The exact eps of data N(0.3, 0.5**2), with its mean as a parameter."""

    def __init__(self, rngs):
        self.mean = nnx.Param(jnp.float32(0.3))

    def __call__(self, x, t, condition):
        at = [
            jnp.asarray(leaf, jnp.float32)[jnp.round(t).astype(int) + 1].reshape(-1, 1, 1, 1)
            for leaf in LEVELS
        ]
        level = schedule.Level(*at)
        return process.eps_from_x0(x, gaussian_denoiser(self.mean[...], 0.5)(x, level), level)


def test_nnx_network():
    """It is sampled through split and merge."""
    graph, params = nnx.split(Oracle(nnx.Rngs(0)))

    def network(params, x, t, condition):
        return nnx.merge(graph, params)(x, t, condition)

    images = sampled(network, params, jnp.zeros(512, jnp.int32))
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 20))
    keys = sampler.image_keys(jax.random.key(1), np.arange(512))
    run = jax.jit(partial(sampler.scan_plan, denoiser.clip(gaussian_denoiser(0.3, 0.5))))
    expected = sampler.sample(run, plan, sampler.init_noise(plan, keys, SHAPE), keys)
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_drop_learned_variance():
    def network(params, x, t, condition):
        return jnp.concatenate([params * x, 100 + x], axis=-1)

    x = jnp.ones((3, *SHAPE))
    np.testing.assert_array_equal(
        denoiser.drop_learned_variance(network)(2.0, x, None, None), 2 * x
    )
