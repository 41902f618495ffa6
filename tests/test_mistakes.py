"""What newcomers to the library mistake ends in a sentence that names it, before JAX says more."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax import (
    denoiser,
    guidance,
    loss,
    parameterization,
    process,
    sampler,
    schedule,
    solvers,
)
from diffjax.inference.samplers import make_plan
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.unet import UNetConfig
from diffjax.training.step import make_eval_step

LEVELS, KEY, X = schedule.linear(100), jax.random.key(0), jnp.zeros((4, 8, 8, 1))
KEYS = sampler.image_keys(KEY, range(4))
UNET = UNetConfig(channels=4, multipliers=(1,), attention=()).build((8, 8, 1), ClassLabel(10))
EPS = parameterization.ddpm("eps")
LABELS = np.zeros(4, np.int32)
BATCH = {"x": X, "index": np.arange(4, dtype=np.uint32), "condition": LABELS}


STRAIGHT = sampler.ddim(LEVELS, "trailing:2")


def unet(params, x, time, condition, keys=None):
    """The network, initialised where it is called; for shapes alone."""
    return UNET.init_with_output(KEY, x, time, condition, keys)[0]


def zero(params, x, time, condition, keys=None):
    return 0 * x


def sample(denoise, x=X, keys=KEYS, plan=None):
    plan = sampler.ddim(LEVELS, "trailing:2", eta=1.0) if plan is None else plan
    (rows,) = sampler.segments(plan, x.dtype, size=plan.steps)
    return jax.eval_shape(partial(sampler.scan_plan, denoise), rows, (x, x, x), keys)


def objective(network=zero, **options):
    return loss.denoising_loss(network, EPS, LEVELS, **options)


def without(name):
    return {key: value for key, value in BATCH.items() if key != name}


CONDITIONAL = denoiser.from_network(unet, {}, EPS)
ZERO = denoiser.from_network(zero, {}, EPS)
MISTAKES = {
    "forgotten condition": (lambda: sample(CONDITIONAL), "condition None 10"),
    "condition of None": (
        lambda: sample(denoiser.condition_on(CONDITIONAL, None)),
        "condition None 10",
    ),
    "guided": (
        lambda: sample(guidance.classifier_free_guidance(CONDITIONAL, None, None, 2.0)),
        "condition None",
    ),
    "training": (
        lambda: jax.eval_shape(objective(unet), {}, without("condition"), KEY),
        "condition None",
    ),
    "nothing to drop": (
        lambda: objective(null=10, drop_rate=0.1)({}, without("condition"), KEY),
        "condition drop_rate 0.1",
    ),
    "a module": (lambda: denoiser.from_network(UNET, {}, EPS), "network UNet apply"),
    "a module in training": (lambda: objective(UNET), "network UNet apply"),
    "one key": (lambda: sample(ZERO, keys=KEY), "keys image_keys"),
    "one key for noise": (
        lambda: sampler.init_noise(sampler.ddim(LEVELS, [9]), KEY, (8, 8, 1)),
        "keys image_keys",
    ),
    "one key of the old kind": (
        lambda: sampler.noise(jax.random.PRNGKey(0), (8, 8, 1)),
        "keys image_keys",
    ),
    "too few keys": (lambda: sample(ZERO, keys=KEYS[:2]), "keys 2 4"),
    "a seed for keys": (lambda: sampler.noise(0, (8, 8, 1)), "keys int"),
    "several keys for one": (lambda: sampler.image_keys(KEYS, range(4)), "key"),
    "a number of images": (lambda: sampler.image_keys(KEY, 16), "index 16"),
    "several keys for a step": (lambda: objective()({}, BATCH, KEYS), "key"),
    "no index": (lambda: objective()({}, without("index"), KEY), "batch index"),
    "no x": (lambda: objective()({}, without("x"), KEY), "batch index x"),
    "index of one": (
        lambda: objective()({}, {"x": X, "index": np.zeros(1, np.uint32)}, KEY),
        "x index",
    ),
    "bytes": (
        lambda: objective()({}, BATCH | {"x": np.zeros((4, 8, 8, 1), np.uint8)}, KEY),
        "x uint8",
    ),
    "x without a batch": (
        lambda: sample(denoiser.condition_on(CONDITIONAL, LABELS), X[0], plan=STRAIGHT),
        "x B",
    ),
    "int for a schedule": (lambda: sampler.ddim(1000, [9, 5]), "schedule 1000"),
    "int for a schedule, spaced": (lambda: schedule.trailing(1000, 5), "schedule 1000"),
    "int for a schedule, sigma_hat": (lambda: sampler.sigma_hat(1000, [9, 5]), "schedule 1000"),
    "int for a schedule, trained": (lambda: loss.denoising_loss(zero, EPS, 1000), "schedule 1000"),
    "the wrong way round": (lambda: solvers.heun([9, 5], LEVELS), "schedule list"),
    "number for levels": (lambda: sampler.ddim(LEVELS, 50), "t 50"),
    "level above": (lambda: sampler.ddim(LEVELS, [101, 5]), "t 101 100"),
    "level of data": (lambda: sampler.ddim(LEVELS, [5, 0]), "t 0"),
    "rising levels": (lambda: sampler.ddim(LEVELS, [5, 50]), "t 5 50"),
    "level of data above": (lambda: schedule.at(LEVELS, np.array([3, 101])), "t 101"),
    "name of a prediction": (lambda: parameterization.ddpm("epsilon"), "epsilon eps x0 v score"),
    "name of a spacing": (lambda: sampler.ddim(LEVELS, "trailling:50"), "trailling:50 trailing"),
    "spacing without levels": (lambda: sampler.ddim(LEVELS, "karras"), "karras leading"),
    "name of a sampler": (lambda: make_plan("dimm:50", LEVELS), "dimm ddim"),
    "name of a weighting": (lambda: objective(weighting="snr"), "snr min_snr simple"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    make, words = MISTAKES[name]
    with pytest.raises(ValueError, match=naming(*words.split())):
        make()


def test_names_stand_for_what_they_name():
    """Predictions, spacings, samplers and weightings."""
    for name, prediction in process.PREDICTIONS.items():
        assert parameterization.ddpm(name).prediction is prediction
        assert parameterization.variance_preserving(name).prediction is prediction
    x, v = np.ones((2, 3)), np.full((2, 3), 0.5)
    level = schedule.at(LEVELS, 40)
    pair = process.PREDICTIONS["v"], process.PREDICTIONS["eps"]
    np.testing.assert_array_equal(
        process.convert(x, v, level, "v", "eps"), process.convert(x, v, level, *pair)
    )
    for name, spacing in schedule.SPACINGS.items():
        plan = solvers.dpm_solver_pp_2m(LEVELS, f"{name}: 10")
        assert np.array_equal(plan.level.t, spacing(LEVELS, 10))
    plan, text = make_plan("ddim(eta=0.5, spacing=karras):7", LEVELS)
    assert (plan.steps, text) == (7, "ddim(eta=0.5, karras)")
    for name, weighting in loss.WEIGHTINGS.items():
        np.testing.assert_array_equal(
            weighting(LEVELS, "v"), weighting(LEVELS, process.PREDICTIONS["v"])
        )
        found, expected = (
            loss.denoising_loss(zero, EPS, LEVELS, each)({}, BATCH, KEY).value
            for each in (name, weighting)
        )
        np.testing.assert_array_equal(found, expected)


def test_one_network_for_training_and_sampling():
    """It gets keys, for dropout, in training alone: neither for a held-out loss nor in samples."""
    seen = []

    def network(params, x, time, condition, keys=None):
        seen.append(None if keys is None else keys.shape)
        return params * x

    goal = objective(network)
    make_eval_step(goal, seed=0)(1.0, BATCH)
    denoiser.from_network(network, 1.0, EPS)(X, schedule.at(LEVELS, 40))
    assert seen == [None, None]
    goal(1.0, BATCH, KEY)
    assert seen[-1] == (4,)
