import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax import likelihood
from diffjax.build import load_data
from diffjax.config import Distillation
from diffjax.data.batches import first_examples
from diffjax.data.codec import Codec
from diffjax.evaluation import bits_per_dim
from diffjax.evaluation.bits_per_dim import LikelihoodOptions, UnsolvedError, measure_bits_per_dim

OPTIONS = LikelihoodOptions(seed=0, repeats=2, tolerance=1e-2, evaluations=10)
pytestmark = pytest.mark.usefixtures("in_suite_data")


def examples_of(model, num=5):
    return first_examples(load_data(model.info.config).held_out, num, model.info.conditioning)


def test_bits_per_dim_of_digits(digits_model):
    """Both rows, with the number of evaluations, and progress by batch."""
    model, calls = digits_model(), []
    x, condition = examples_of(model)
    flow, bound = measure_bits_per_dim(model, x, condition, OPTIONS, calls.append)
    assert "tsit5" in flow.measure
    assert "0.01" in flow.measure
    assert "ddpm(fixed_large) in 100 steps" in bound.measure
    for row in (flow, bound):
        assert np.isfinite(row.bits_per_dim)
        assert row.error > 0
        assert (row.images, row.image_size) == (5, "8x8x1")
        assert (row.data, row.given) == ("digits, held out", "condition")
    assert (flow.repeats, bound.repeats, bound.spread) == (2, 1, None)
    assert flow.spread > 0
    assert (bound.evaluations, bound.derivatives) == (11, 0)
    assert flow.evaluations == flow.derivatives > 6
    assert sum(calls) == bits_per_dim.num_batches(5, 2) == 3
    assert bits_per_dim.num_batches(129, 2) == 9


def test_condition_matters(digits_model):
    """Without it images get the null condition, and the row tells so."""
    model = digits_model()
    x, condition = examples_of(model)
    options = dataclasses.replace(OPTIONS, repeats=1)
    given, null = (
        measure_bits_per_dim(model, x, each, options)
        for each in (condition, model.info.conditioning.nulls(5))
    )
    without = measure_bits_per_dim(model, x, None, options)
    for row, same, other in zip(without, null, given, strict=True):
        assert row.given == "no condition"
        assert row.bits_per_dim == same.bits_per_dim
        assert abs(row.bits_per_dim - other.bits_per_dim) > 1e-6
    assert without[0].spread is None
    unconditional = digits_model("unconditional")
    assert measure_bits_per_dim(unconditional, x, None, options)[1].given == "no condition"


def test_condition_of_fields(digits_model):
    model = digits_model("fields")
    x, label = examples_of(digits_model())
    condition = {"label": label, "pose": np.ones((5, 2), np.float32)}
    options = dataclasses.replace(OPTIONS, repeats=1)
    rows = measure_bits_per_dim(model, x, condition, options)
    assert all(np.isfinite(row.bits_per_dim) for row in rows)


def test_images_count_once_in_any_batch(digits_model, monkeypatch):
    """The last batch is filled with images from the start, which do not count again."""
    model = digits_model()
    x, condition = examples_of(model, 11)
    options = dataclasses.replace(OPTIONS, repeats=1)
    rows = measure_bits_per_dim(model, x, condition, options)
    monkeypatch.setattr(bits_per_dim.parallel, "default_batch", lambda num: 8)
    calls = []
    again = measure_bits_per_dim(model, x, condition, options, calls.append)
    assert sum(calls) == 4
    # Rounding may change the steps that the solver of the flow takes.
    for row, other, tolerance in zip(rows, again, (1e-3, 1e-5), strict=True):
        assert row.bits_per_dim == pytest.approx(other.bits_per_dim, rel=tolerance)
        assert row.error == pytest.approx(other.error, rel=10 * tolerance)


def test_unsolved_flow_is_named(digits_model, monkeypatch):
    model = digits_model()
    x, condition = examples_of(model)
    sums = x.sum((1, 2, 3))
    least, second = np.sort(sums)[:2]

    def flow(model, options, params, x0, *rest):
        solved = x0.sum((1, 2, 3)) > (least + second) / 2
        return likelihood.Likelihood(x0[:, 0, 0, 0], jnp.ones(len(x0)), solved)

    monkeypatch.setattr(bits_per_dim, "_flow", flow)
    with pytest.raises(UnsolvedError, match=naming("tolerance", "0.01", int(np.argmin(sums)))):
        measure_bits_per_dim(model, x, condition, OPTIONS)


BAD = {
    "probes": (0, ("probes", 0)),
    "repeats": (0, ("repeats", 0)),
    "tolerance": (0.1, ("tolerance", 0.1, 0.01)),
    "evaluations": (100, ("evaluations", 100, 99)),
    "variance": ("big", ("variance", "big")),
    "seed": (-1, ("seed", -1)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name, digits_model):
    value, words = BAD[name]
    with pytest.raises(ValueError, match=naming(*words)):
        bits_per_dim.check_likelihood(digits_model(), dataclasses.replace(OPTIONS, **{name: value}))


def test_models_without_likelihood(digits_model):
    model = digits_model()
    x, condition = examples_of(model)
    distilled = digits_model(distillation=Distillation(method="progressive", steps=4))
    with pytest.raises(ValueError, match=naming("unet of x", "distilled")):
        measure_bits_per_dim(distilled, x, condition, OPTIONS)
    with pytest.raises(ValueError, match=naming("num", 1)):
        measure_bits_per_dim(model, x[:1], condition[:1], OPTIONS)
    with pytest.raises(ValueError, match=naming("condition", "unet of x", "condition_dropout")):
        measure_bits_per_dim(digits_model(dropout=0.0), x, None, OPTIONS)


def test_density_of_latents(digits_model):
    """For standard normal latents both measures are the normal density."""
    model = digits_model("unconditional", dropout=0.0)
    sigma = jnp.asarray(model.schedule.sigma, jnp.float32)

    def network(params, x, t, condition, keys=None):
        level = jnp.interp(t + 1, jnp.arange(len(sigma)), sigma)
        return jnp.expand_dims(level, (1, 2, 3)) * x  # the best estimate of the noise

    latents = model._replace(network=network, codec=Codec(lambda x: x, lambda x: x, None))
    x = 1.5 * np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    options = dataclasses.replace(OPTIONS, tolerance=1e-4, evaluations=None, repeats=1, probes=1)
    rows = measure_bits_per_dim(latents, x, None, options)
    expected = (x**2 / 2 + np.log(2 * np.pi) / 2).mean() / np.log(2)
    assert [row.bits_per_dim for row in rows] == pytest.approx([expected] * 2, rel=0.03)
    assert all("latents" in row.measure and "latents of" in row.data for row in rows)


def test_likelihood_condition(digits_model):
    model, given = digits_model("fields"), {"label": np.zeros(3), "pose": np.ones((3, 2))}
    assert bits_per_dim.likelihood_condition(model, given, 3) is given
    null = bits_per_dim.likelihood_condition(model, None, 3)
    np.testing.assert_array_equal(null["label"], [10, 10, 10])
    assert not jax.tree.leaves(null["pose"])[0].any()
    unconditional = digits_model("unconditional", dropout=0.0)
    assert bits_per_dim.likelihood_condition(unconditional, None, 3) is None


def test_error_of_a_mean():
    """The deviation of the values, of one degree of freedom less, over the root of their number."""
    assert bits_per_dim._standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert bits_per_dim._standard_error(np.arange(4.0)) == pytest.approx(math.sqrt(5 / 3 / 4))
