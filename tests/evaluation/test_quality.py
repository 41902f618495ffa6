import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers import naming

from diffjax import sampler, schedule
from diffjax.config import load_config
from diffjax.data.codec import Codec
from diffjax.devices.parallel import device_mesh
from diffjax.evaluation import quality
from diffjax.evaluation.features import Outputs
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.results import QualityRow
from diffjax.inference.guidance import Guidance
from diffjax.inference.pipeline import Hooks, Pipeline, Request
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector

PIXELS = ReferenceOptions(features="pixels", split="held_out")
METRICS = ("fd", "kd", "precision", "recall")
pytestmark = pytest.mark.usefixtures("in_suite_data")


@pytest.fixture
def reference():
    return quality.read_reference(load_config("digits"), (8, 8, 1), PIXELS)


def plan_of(model, steps=2):
    return sampler.ddim(model.schedule, schedule.trailing(model.schedule, steps))


def on_devices(model, number):
    mesh = device_mesh(jax.devices()[:number])
    return Pipeline(model.info, model.network, model.parameterization, model.codec, mesh)


# ------------------------------------------------------------------------------- real images


def test_reference_of_digits(reference):
    assert reference.extractor.name == "pixels"
    assert re.fullmatch(r"digits, held out, 297 images, sha256:[0-9a-f]{8}", reference.name)
    assert (reference.moments.count, reference.features.shape) == (297, (297, 64))
    mean = reference.features.mean(0, np.float64)
    np.testing.assert_allclose(reference.moments.mean, mean, rtol=1e-12)


def test_reference_draws_neighbours(reference, monkeypatch):
    """All images count for the moments, and some of all of them for the neighbours."""
    monkeypatch.setattr(quality, "MOST_NEIGHBOURS", 50)
    monkeypatch.setattr(quality, "CHUNK", 70)
    some = quality.read_reference(load_config("digits"), (8, 8, 1), PIXELS)
    assert (some.moments.count, len(some.features)) == (297, 50)
    np.testing.assert_allclose(some.moments.scatter, reference.moments.scatter, rtol=1e-9)
    chosen = np.sort(np.random.default_rng(0).permutation(297)[:50])
    np.testing.assert_array_equal(some.features, reference.features[chosen])
    assert some.name.startswith(reference.name)
    assert "50" in some.name


def test_reference_that_cannot_be_compared(monkeypatch):
    config = load_config("digits")
    data = dataclasses.replace(config.data, name="hf:someone/ddpm")
    imported = dataclasses.replace(config, data=data)
    with pytest.raises(ValueError, match=naming("hf:someone/ddpm")):
        quality.read_reference(imported, (8, 8, 1), PIXELS)
    with pytest.raises(ValueError, match=naming("digits", "8x8x1", "32x32x3")):
        quality.read_reference(config, (32, 32, 3), PIXELS)
    monkeypatch.setattr(quality, "LEAST_IMAGES", 298)
    with pytest.raises(ValueError, match=naming("held_out", "digits", 297, 298)):
        quality.read_reference(config, (8, 8, 1), PIXELS)


@pytest.mark.parametrize("fields", [{}, {"label": ClassLabel(1)}])
def test_cnn_needs_classes(monkeypatch, fields):
    """A classifier of one class is right before it has learned anything."""
    load_data = quality.load_data
    monkeypatch.setattr(
        quality, "load_data", lambda config: load_data(config)._replace(fields=fields)
    )
    with pytest.raises(ValueError, match=naming("features", "cnn", "digits", "pixels")):
        quality.read_reference(load_config("digits"), (8, 8, 1), ReferenceOptions())
    assert quality.read_reference(load_config("digits"), (8, 8, 1), PIXELS)


def test_image_shape_is_decoded(digits_model):
    model = digits_model()
    assert quality.image_shape(model) == (8, 8, 1)
    decode = lambda x: np.repeat(np.repeat(x, 2, 1), 2, 2)  # noqa: E731
    latents = model._replace(codec=Codec(lambda images: images[:, ::2, ::2], decode, None))
    assert quality.image_shape(latents) == (16, 16, 1)


# ------------------------------------------------------------------------------- conditions


def test_condition_of_evaluation():
    """All classes equally often; vectors are those of the first examples, repeated."""
    source = [
        {"image": np.zeros((2, 2, 1), np.uint8), "label": i, "pose": np.float32([i, -i])}
        for i in range(3)
    ]
    assert quality.evaluation_condition(UNCONDITIONAL, source, 5) is None
    labels = quality.evaluation_condition(ClassLabel(4), source, 6)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 0, 1])
    fields = Fields((ClassLabel(4), Vector(2, "pose")))
    found = quality.evaluation_condition(fields, source, 5)
    np.testing.assert_array_equal(found["label"], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(found["pose"][:, 1], [0, -1, -2, 0, -1])
    few = quality.evaluation_condition(fields, source, 2)
    np.testing.assert_array_equal(few["label"], [0, 1])
    with pytest.raises(ValueError, match=naming("depth")):
        quality.evaluation_condition(Vector(2, "depth"), source, 2)


def test_class_accuracy():
    """The share of right classes, where the classifier has the same ones."""
    probabilities = np.eye(4)[[0, 1, 2, 2]]
    outputs, labels = Outputs(np.zeros((4, 1)), probabilities), np.arange(4)
    assert quality.class_accuracy(ClassLabel(4), labels, outputs) == 0.75
    fields, pose = Fields((Vector(2, "pose"), ClassLabel(4))), np.zeros((4, 2), np.float32)
    assert quality.class_accuracy(fields, {"pose": pose, "label": labels}, outputs) == 0.75
    assert quality.class_accuracy(ClassLabel(5), labels, outputs) is None
    assert quality.class_accuracy(UNCONDITIONAL, None, outputs) is None
    assert quality.class_accuracy(ClassLabel(4), labels, Outputs(outputs.features, None)) is None


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("num", "batch"), [(500, 96), (10_000, 96), (80, 16), (7, 8)])
def test_timed_batch(num, batch):
    """A fifth of all, up to 100, in multiples of the eight devices."""
    assert quality.timed_batch(num) == batch


def test_check_batch():
    quality.check_batch(40, 8)
    with pytest.raises(ValueError, match=naming("num", 32, "batch", 8, 5)):
        quality.check_batch(32, 8)
    with pytest.raises(ValueError, match=naming("batch", 3, 8)):
        quality.check_batch(100, 3)


# ------------------------------------------------------------------------------- rows


def test_measure_on_any_devices(digits_model, reference):
    """One device and eight measure the same, up to rounding."""
    model = digits_model()
    request = Request(num=40, batch=8, seed=0, guidance=Guidance(2.0))
    (one, samples), (eight, others) = (
        quality.measure(
            model, on_devices(model, n), reference, plan_of(model), "ddim(eta=0, trailing)", request
        )
        for n in (1, 8)
    )
    assert np.abs(samples.images.astype(int) - others.images).max() <= 1  # rounding
    for name in METRICS:
        assert getattr(one, name) == pytest.approx(getattr(eight, name), rel=1e-3, abs=1e-6)
    assert (one.nfe, one.steps, one.batches, one.images) == (4, 2, 5, 40)
    np.testing.assert_array_equal(samples.condition, np.arange(40) % 10)


def test_measure_compares_decoded_images(digits_model, reference):
    """Metrics are those of `samples.images`, and the row's context is known before."""
    model, rows = digits_model("unconditional"), []
    request = Request(num=40, batch=8, seed=0)
    arguments = plan_of(model), "ddim(eta=0, trailing)", request
    row, samples = quality.measure(
        model, on_devices(model, 8), reference, *arguments, Hooks(rows.append)
    )
    outputs = reference.extractor.extract(samples.images)
    metrics = quality.compare(reference, outputs, None)
    assert {name: getattr(row, name) for name in vars(metrics)} == vars(metrics)
    assert (metrics.class_accuracy, metrics.inception_score) == (None, None)
    assert row.context == quality.quality_context(model, *arguments, reference)
    assert isinstance(row, QualityRow)
    assert sum(rows) == 2 * 5


def test_measure_keeps_condition(digits_model, reference):
    model = digits_model()
    request = Request(num=40, batch=8, seed=0, condition=np.full(40, 3, np.int32))
    _, samples = quality.measure(
        model, on_devices(model, 8), reference, plan_of(model), "ddim(eta=0)", request
    )
    np.testing.assert_array_equal(samples.condition, 3)


def test_measure_refuses_nan(digits_model, reference):
    model = digits_model()
    broken = model._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    request = Request(num=40, batch=8, seed=0, bound=None)
    with pytest.raises(quality.NotFiniteError, match=naming("ddim(eta=0, trailing)", 2)):
        quality.measure(
            broken, on_devices(broken, 8), reference, plan_of(model), "ddim(eta=0, trailing)",
            request,
        )  # fmt: skip
