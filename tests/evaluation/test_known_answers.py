"""Rows, pictures and times whose values are known before anything is measured.

Images are of one unmistakable colour each: the features of a set are points at a few places, so
that every metric has a closed form, and each picture, caption and row can be told from others.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import sampler, schedule
from diffjax.config import Config, Data
from diffjax.data import image_io
from diffjax.devices.parallel import device_mesh, replicated
from diffjax.evaluation import features, quality, sweep
from diffjax.evaluation.features import Extractor, Outputs
from diffjax.evaluation.quality import ReferenceOptions
from diffjax.evaluation.results import BatchTiming, QualityMetrics, QualityRow, sampling_row
from diffjax.evaluation.sweep import Sweep, SweepOptions
from diffjax.inference import pipeline
from diffjax.inference.pipeline import Clip, DynamicThreshold, Hooks, Pipeline, Request
from diffjax.inference.samplers import parse_samplers
from diffjax.training import preview
from tests.colours import (
    CLASSES,
    COLOURS,
    NAMES,
    NONE,
    SHAPE,
    colour_model,
    paint,
    palette,
    read_grid,
    write_data,
)

HALF = (0, 1, 2, 0, 1, 2)  # classes of which only three colours are painted
TURNED = (1, 2, 3, 4, 5, 0)
NUM, BATCH = 48, 8
DDIM = "ddim(eta=0, trailing)"


def plan_of(model, steps=2):
    return sampler.ddim(model.schedule, schedule.trailing(model.schedule, steps))


def on_one_device(model):
    mesh = device_mesh(jax.devices()[:1])
    return Pipeline(model.info, model.network, model.parameterization, model.codec, mesh)


def read_reference(path, kind="pixels"):
    config = Config(data=Data(source="npz", path=str(path)))
    return quality.read_reference(config, SHAPE, ReferenceOptions(features=kind))


# ------------------------------------------------------------------------------- metrics


def nearest_colour(images):
    """Features of pixels, and the class of the nearest colour."""
    x = np.sign(images[:, 4, 4].astype(float) - 127.5)
    classes = np.abs(x[:, None] - COLOURS).sum(2).argmin(1)
    return Outputs(features.pixels().extract(images).features, np.eye(CLASSES)[classes])


@pytest.fixture
def judged(monkeypatch):
    """The features cnn are the pixels, by a classifier that knows three of four real colours."""
    judge = Extractor("cnn of colours", nearest_colour, 0.75)
    monkeypatch.setattr(features, "small_cnn", lambda *arguments: judge)


def frechet(real, generated):
    """The Frechet distance of sets of colours [N, 3], which all 64 pixels of an image have."""
    a, b = np.cov(real.T), np.cov(generated.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    shift = np.sum((real.mean(0) - generated.mean(0)) ** 2)
    return 64 * (shift + np.trace(a) + np.trace(b) - 2 * root)


def kernel(real, generated):
    """The unbiased squared discrepancy of sets of colours, pair by pair."""

    def mean(x, y, itself):
        values = (x @ y.T / 3 + 1) ** 3
        return (values.sum() - itself * np.trace(values)) / (len(x) * (len(y) - itself))

    within = mean(real, real, 1) + mean(generated, generated, 1)
    return within - 2 * mean(real, generated, 0)


def kernel_error(real, generated):
    """Its jackknife over the images of both sets."""
    of_real = [kernel(np.delete(real, i, 0), generated) for i in range(len(real))]
    of_generated = [kernel(real, np.delete(generated, i, 0)) for i in range(len(generated))]
    return np.sqrt(sum((len(each) - 1) * np.var(each) for each in (of_real, of_generated)))


def share_within(colours, others):
    """The share of colours that are among others."""
    return np.mean((colours[:, None] == others).all(2).any(1))


# Real colours, and those that are generated, each with their strength; precision, recall (but for
# the images that are held out) and class accuracy.
SETS = {
    "subset": ((range(CLASSES), 1.0), (HALF, 1.0), 1.0, 0.5, 0.5),
    "superset": ((HALF, 1.0), (range(CLASSES), 1.0), 0.5, 1.0, 1.0),
    "same": ((range(CLASSES), 1.0), (range(CLASSES), 1.0), 1.0, 1.0, 1.0),
    "shift": ((range(CLASSES), 1.0), (range(CLASSES), 0.5), 0.0, 0.0, 1.0),
    "exchange": ((range(CLASSES), 1.0), (TURNED, 1.0), 1.0, 1.0, 0.0),
}


@pytest.fixture
def measured(tmp_path, judged):
    """The row of each of SETS, and the colours of its real and its generated images."""
    rows, model = {}, colour_model()
    run = on_one_device(model)
    for name, (real, generated, *_) in SETS.items():
        path = write_data(tmp_path / f"{name}.npz", np.arange(120) % CLASSES, *real)
        reference = read_reference(path, "cnn")
        request = Request(num=NUM, batch=BATCH, seed=0)
        model = model._replace(params=palette(*generated))
        row, samples = quality.measure(model, run, reference, plan_of(model), DDIM, request)
        train = [reference.source[i]["image"] for i in range(len(reference.source))]
        rows[name] = row, np.stack(train)[:, 0, 0] / 255, samples.images[:, 0, 0] / 255
    return rows


def test_rows_of_known_sets(measured):
    """A strict subset of the real images, a superset, the same, others, and wrong classes."""
    for name, (row, real, generated) in measured.items():
        *_, precision, recall, accuracy = SETS[name]
        assert row.precision == share_within(generated, real) == precision, name
        assert row.recall == share_within(real, generated) == pytest.approx(recall, abs=0.1), name
        assert (row.class_accuracy, row.real_class_accuracy) == (accuracy, 0.75), name
        assert row.fd == pytest.approx(frechet(real, generated), rel=1e-5, abs=1e-5), name
        assert row.kd == pytest.approx(kernel(real, generated), rel=1e-5), name
        assert row.kd_error == pytest.approx(kernel_error(real, generated), rel=1e-4), name
    rows = {name: row for name, (row, *_) in measured.items()}
    near, far = ("same", "exchange"), ("subset", "superset", "shift")
    assert max(rows[name].fd for name in near) < 0.3 < 5 < min(rows[name].fd for name in far)
    assert max(rows[name].kd for name in near) < 0 < min(rows[name].kd for name in far)


# ------------------------------------------------------------------------------- rows


def stand_in(sweep_, combination):
    """Leave a row and a picture of a combination, as if it were measured."""
    row = QualityRow.join(
        sweep_.context(combination),
        QualityMetrics(
            fd=1.0, kd=0.1, kd_error=0.1, inception_score=None, precision=0.5, recall=0.5,
            class_accuracy=None, real_class_accuracy=None,
        ),
        BatchTiming(nfe=2, ms_per_image=1.0, spread=0.0, batches=6, compile_seconds=0.0),
    )  # fmt: skip
    path = sweep.image_path(sweep_.folder, row)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"picture")
    sweep.write_rows(sweep_.folder, [row])


def test_rows_of_others_are_measured(tmp_path):
    """A row of other weights, bounds, features or images, by any one of them, is another row."""
    labels, model = np.arange(120) % CLASSES, colour_model()
    reference = read_reference(write_data(tmp_path / "a" / "x.npz", labels))
    # A file of the same name, with as many images.
    others = read_reference(write_data(tmp_path / "b" / "x.npz", labels, TURNED))
    names = (each.name.rpartition(",")[0] for each in (reference, others))
    assert len(set(names)) == 1
    options = SweepOptions(NUM, BATCH)

    def combine(model, steps=2, scale=1.0, seed=0, name="ddim"):
        return sweep.combine([model], parse_samplers(name), [steps], [scale], [seed])

    mine = combine(model)
    stand_in(Sweep(tmp_path, reference, options), mine[0])
    assert Sweep(tmp_path, reference, options).missing(mine) == []
    other_features = reference._replace(extractor=Extractor("other", nearest_colour))
    unbounded = dataclasses.replace(options, bound=None)
    thresholded = dataclasses.replace(options, bound=DynamicThreshold(0.9))
    for changed_reference, changed_options, combinations in (
        (reference, options, combine(model._replace(params=palette(TURNED)))),
        (reference, options, combine(model._replace(step=8))),
        (reference, options, combine(model._replace(weights="raw"))),
        (reference, options, combine(model._replace(name="colours of y"))),
        (reference, unbounded, mine),
        (reference, thresholded, mine),
        (reference, dataclasses.replace(options, num=NUM + BATCH), mine),
        (reference, dataclasses.replace(options, batch=2 * BATCH, num=80), mine),
        (other_features, options, mine),
        (others, options, mine),
        (reference, options, combine(model, steps=3)),
        (reference, options, combine(model, scale=2.0)),
        (reference, options, combine(model, seed=1)),
        (reference, options, combine(model, name="ddim(eta=1)")),
    ):
        found = Sweep(tmp_path, changed_reference, changed_options).missing(combinations)
        assert found == combinations, (changed_options, combinations)


# ------------------------------------------------------------------------------- pictures


def test_pictures_of_rows(tmp_path):
    """The picture of each row has its model's colours, each below the name of its class."""
    reference = read_reference(write_data(tmp_path / "x.npz", np.arange(120) % CLASSES))
    models = [
        colour_model(name="colours of x"),
        colour_model(palette(TURNED), name="colours of y"),
    ]
    swept = Sweep(tmp_path, reference, SweepOptions(NUM, BATCH, Clip()))
    for combination in sweep.combine(models, parse_samplers("ddim"), [1], [1.0], [0]):
        swept.measure(combination)
    assert [row.network for row in swept.rows] == [model.name for model in models]
    for row, order in zip(swept.rows, (range(CLASSES), TURNED), strict=True):
        with image_io.Image.open(sweep.image_path(tmp_path, row)) as picture:
            shown = read_grid(picture, sweep.SHOWN, columns=10)
        assert shown == [(order[i % CLASSES], NAMES[i % CLASSES]) for i in range(sweep.SHOWN)]


def test_previews_in_training():
    """The picture of a preview has each class in turn."""
    model = colour_model()
    params = jax.device_put(model.params, replicated(device_mesh()))
    picture = preview.make_preview(model.info, model.network, None)(params)
    shown = read_grid(picture, preview.NUM, columns=preview.COLUMNS)
    assert shown == [(i % CLASSES, NAMES[i % CLASSES]) for i in range(preview.NUM)]


def test_samples_are_rounded():
    """Estimates between two grey values become the nearer one, in arrays and in metrics."""
    x = np.full((2, *SHAPE), 0.6 * 2 / 255 - 1, np.float32)  # 0.6 of a grey value above black
    assert (image_io.to_uint8(x) == 1).all()
    model = colour_model(palette(strength=0.5))
    request = Request(
        num=CLASSES, batch=CLASSES, seed=0, condition=np.arange(CLASSES, dtype=np.int32)
    )
    samples = on_one_device(model)(model.params, plan_of(model), request)
    # 0.5 is 191.25 of 255, and -0.5 is 63.75.
    expected = np.where(COLOURS > 0, 191, 64)
    np.testing.assert_array_equal(
        samples.images, np.broadcast_to(expected[:, None, None], samples.images.shape)
    )
    np.testing.assert_array_equal(paint(np.arange(CLASSES), strength=0.5), samples.images)
    assert NONE not in {
        shown for shown, _ in read_grid(image_io.grid(samples.images, NAMES), CLASSES)
    }


# ------------------------------------------------------------------------------- times


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock of the pipeline."""
    clock = Clock()
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(perf_counter=clock))
    return clock


def timed_model(clock):
    """A model that takes 1 second to evaluate, on the device, and 100 to trace."""
    model = colour_model()

    def evaluate(x):
        clock.wait(1.0)
        return x

    def network(params, x, t, condition, keys=None):
        clock.wait(100.0)
        x0 = model.network(params, x, t, condition)
        return jax.pure_callback(evaluate, jax.ShapeDtypeStruct(x0.shape, jnp.float32), x0)

    return model._replace(network=network)


def test_times_are_of_the_device_alone(clock, tmp_path):
    """Neither compilation nor hooks are in a time, and the last step of a batch is."""
    model, steps = timed_model(clock), 3
    run, plan = on_one_device(model), plan_of(model, steps)
    hooks = Hooks(lambda rows: clock.wait(1e4), lambda *seen: clock.wait(1e6), every=1)
    reference = read_reference(write_data(tmp_path / "x.npz", np.arange(120) % CLASSES))
    request = Request(num=NUM - 4, batch=BATCH, seed=0)  # the last batch is padded
    row, samples = quality.measure(model, run, reference, plan, DDIM, request, hooks)
    assert samples.batch_seconds == (steps,) * 6
    assert samples.compile_seconds > 0
    assert samples.compile_seconds % 100 == 0  # traced, and nothing else
    assert row.compile_seconds == samples.compile_seconds
    assert (row.ms_per_image, row.spread, row.batches) == (1e3 * steps / BATCH, 0.0, 6)
    timed = sampling_row(model, samples, plan, DDIM, request)
    assert (timed.run_seconds, timed.images_per_second) == (6 * steps, (NUM - 4) / (6 * steps))
    again, _ = quality.measure(model, run, reference, plan, DDIM, request)
    assert (again.compile_seconds, again.ms_per_image) == (0.0, row.ms_per_image)


def test_milliseconds_are_a_median(quality_row):
    """The batches of 4 took 1 to 5 seconds, and one took 100."""
    samples = SimpleNamespace(
        batch_seconds=(3.0, 100.0, 1.0, 2.0, 5.0, 4.0), nfe=2, compile_seconds=7.0
    )
    timing = BatchTiming.of(samples, 4)
    assert (timing.ms_per_image, timing.batches, timing.compile_seconds) == (3500 / 4, 6, 7.0)
    low, high = np.quantile(samples.batch_seconds, [0.25, 0.75])
    assert timing.spread == pytest.approx((high - low) / 2 / 3.5)
