import dataclasses
import functools
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax import parameterization, sampler, schedule
from diffjax.config import Distillation
from diffjax.data.codec import Codec
from diffjax.data.image_io import to_uint8
from diffjax.devices import parallel
from diffjax.inference import pipeline as pipeline_module
from diffjax.inference.guidance import Guidance
from diffjax.inference.pipeline import (
    Clip,
    DynamicThreshold,
    Hooks,
    NotFiniteError,
    Pipeline,
    Request,
    Stopwatch,
    describe_bound,
    describe_devices,
)
from diffjax.nn.conditioning import ClassLabel

PLAIN = Guidance()
KINDS = ("unconditional", "label", "fields")


def on_devices(model, number):
    mesh = parallel.device_mesh(jax.devices()[:number])
    return Pipeline(model.info, model.network, model.parameterization, model.codec, mesh)


def plan_of(model, steps=12, eta=1.0):
    return sampler.ddim(model.schedule, schedule.trailing(model.schedule, steps), eta)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_independent_of_batch_and_devices(kind, tiny_model, condition_of):
    """Sample i is the same in any batch, on one device or eight, the last batch padded."""
    model, guidance = tiny_model(kind), Guidance(1.0 if kind == "unconditional" else 3.0)
    condition = condition_of(kind, 11)

    def run(devices, batch, num=11):
        some = jax.tree.map(lambda leaf: leaf[:num], condition)
        request = Request(num=num, batch=batch, seed=5, condition=some, guidance=guidance)
        return on_devices(model, devices)(model.params, plan_of(model), request)

    whole = run(8, 16)
    assert whole.x.shape == (11, 4, 4, 1)
    assert whole.x.std(axis=0).min() > 1e-3
    for other in (run(1, 11), run(1, 4), run(8, 8)):
        close(other.x, whole.x)
    close(run(1, 3, num=3).x, whole.x[:3])
    assert (whole.nfe, len(run(1, 4).batch_seconds)) == (12 * (1 + (kind != "unconditional")), 3)


def test_seed_changes_samples(tiny_model):
    model = tiny_model("unconditional")
    pipeline = on_devices(model, 1)
    a, b, again = (
        pipeline(model.params, plan_of(model), Request(num=2, batch=2, seed=seed)).x
        for seed in (0, 1, 0)
    )
    assert (a != b).mean() > 0.5
    assert (a == again).all()


@pytest.mark.parametrize("kind", ["label", "fields"])
def test_guidance_extrapolates_between_condition_and_null(kind, tiny_model, condition_of):
    """One DDIM row onto data is the guided estimate itself: x0_null + scale*(x0 - x0_null)."""
    model, pipeline = tiny_model(kind), on_devices(tiny_model(kind), 1)
    plan = sampler.ddim(model.schedule, [60])
    condition, null = condition_of(kind, 3), model.info.conditioning.nulls(3)

    def x0(condition, **fields):
        request = Request(
            num=3, batch=3, seed=0, condition=condition, bound=None, guidance=Guidance(**fields)
        )
        return pipeline(model.params, plan, request).x

    plain, unconditional = x0(condition), x0(null)
    close(x0(condition, scale=0.0), unconditional)
    close(x0(condition, scale=2.5), unconditional + 2.5 * (plain - unconditional))
    close(x0(condition, scale=2.5, batched=False), x0(condition, scale=2.5))
    text = "2" if kind == "label" else "label=2;pose=1,0,-1"
    negative = x0(model.info.conditioning.parse(text, 3))
    close(x0(condition, scale=2.5, negative=text), negative + 2.5 * (plain - negative))
    assert np.abs(plain - negative).max() > 1e-2


def test_autoguidance_extrapolates_from_the_guide_model(tiny_model):
    model, worse = tiny_model("unconditional"), tiny_model("unconditional", seed=1)
    plan = sampler.ddim(model.schedule, [60])

    def x0(params, guidance=PLAIN):
        request = Request(num=2, batch=2, seed=0, bound=None, guidance=guidance)
        return on_devices(model, 1)(params, plan, request)

    ours, theirs = x0(model.params), x0(worse.params)
    guided = x0(model.params, Guidance(2.0, guide_model=worse))
    close(guided.x, theirs.x + 2 * (ours.x - theirs.x))
    assert (ours.nfe, guided.nfe) == (1, 2)


def test_a_guidance_conditioned_network_takes_the_scale(tiny_model):
    model = tiny_model(distillation=Distillation(method="guidance", guidance=4.0))
    pipeline, labels = on_devices(model, 1), np.arange(2, dtype=np.int32)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.params)  # the scale's last layer is zero

    def run(scale):
        request = Request(num=2, batch=2, seed=0, condition=labels, guidance=Guidance(scale))
        return pipeline(params, plan_of(model), request)

    low, high = run(1.0), run(3.0)
    assert (low.nfe, high.nfe) == (12, 12)
    assert np.abs(low.x - high.x).max() > 0
    assert high.compile_seconds == 0


def test_samples_start_from_given_x(tiny_model):
    """A plan of one row at level 1 leaves nearly what it is given, batch by batch."""
    model = tiny_model("unconditional")
    x = np.linspace(-0.5, 0.5, 11)[:, None, None, None] * np.ones((1, 4, 4, 1))
    request = Request(num=11, batch=8, seed=0, x=x, bound=None)
    samples = on_devices(model, 8)(model.params, sampler.ddim(model.schedule, [1]), request)
    assert np.abs(samples.x - x).max() < 0.1


def test_inpainting_keeps_the_known_part(tiny_model):
    model = tiny_model("unconditional")
    known = np.linspace(-1, 1, 11, dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4, 1))
    known = known.astype(np.float32)
    mask = np.zeros((11, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    request = Request(num=11, batch=8, seed=0, inpaint=(known, mask))
    x = on_devices(model, 8)(model.params, plan_of(model), request).x
    assert (x[:, :2] == known[:, :2]).all()
    assert (x[:, 2:] != known[:, 2:]).mean() > 0.9


# ------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("guidance", "nfe"),
    [
        (Guidance(), 12),
        (Guidance(2.0), 24),
        (Guidance(2.0, rescale=0.7), 24),
        (Guidance(2.0, batched=False), 24),
        (Guidance(2.0, negative="3"), 24),
        (Guidance(2.0, interval=(0.0, 1e-9)), 12),
    ],
)
def test_evaluations_are_counted(guidance, nfe, tiny_model):
    model = tiny_model()
    labels = np.arange(8, dtype=np.int32)
    request = Request(num=8, batch=8, seed=0, condition=labels, guidance=guidance)
    assert on_devices(model, 8)(model.params, plan_of(model), request).nfe == nfe


def test_an_interval_guides_the_rows_inside(tiny_model):
    model = tiny_model()
    plan = plan_of(model)
    ratio = np.sort(plan.level.sigma / plan.level.alpha)
    request = Request(
        num=8, batch=8, seed=0, condition=np.zeros(8, np.int32),
        guidance=Guidance(2.0, interval=(ratio[4] - 1e-9, ratio[8] + 1e-9)),
    )  # fmt: skip
    pipeline = on_devices(model, 8)
    assert pipeline(model.params, plan, request).nfe == 12 + 5


def test_only_new_programs_compile(tiny_model, condition_of):
    """Another plan, condition, scale or parameters, and what it costs to compile."""
    model, other = tiny_model("fields"), tiny_model("fields", seed=1)
    pipeline = on_devices(model, 8)
    request = Request(
        num=10, batch=8, seed=0, condition=condition_of("fields", 10), guidance=Guidance(2.0)
    )
    first = pipeline(model.params, plan_of(model, 12), request)
    assert pipeline.compilations == 3  # noise, ten rows, one row
    assert first.compile_seconds > 0
    changed = dataclasses.replace(request, condition=model.info.conditioning.nulls(10), seed=4)
    for params, plan, again in (
        (model.params, plan_of(model, 33, eta=0.3), request),
        (model.params, plan_of(model, 21), dataclasses.replace(changed, num=10)),
        (other.params, plan_of(model), dataclasses.replace(request, guidance=Guidance(7.0))),
        (model.params, plan_of(model),
         dataclasses.replace(request, guidance=Guidance(2.0, negative="label=1;pose=0,0,1"))),
    ):  # fmt: skip
        assert pipeline(params, plan, again).compile_seconds == 0
    assert pipeline.compilations == 3
    pipeline(model.params, plan_of(model, eta=0.0), request)  # draws nothing
    assert pipeline.compilations == 5
    pipeline(model.params, plan_of(model), dataclasses.replace(request, guidance=PLAIN))
    assert pipeline.compilations == 7


def test_a_network_is_traced_once_for_each_denoiser(tiny_model):
    """Evaluations of the same denoiser are counted once."""
    model, calls = tiny_model(), []

    def network(*arguments):
        calls.append(len(arguments[1]))
        return model.network(*arguments)

    pipeline = on_devices(model._replace(network=network), 1)
    labels = np.zeros(2, np.int32)
    request = Request(num=2, batch=2, seed=0, condition=labels)
    pipeline(model.params, plan_of(model), request)
    traced = len(calls)
    pipeline(model.params, plan_of(model, 33), request)
    assert len(calls) == traced


# ------------------------------------------------------------------------------- hooks


def test_hooks_are_called_at_multiples(tiny_model):
    model, rows, watched = tiny_model("unconditional"), [], []
    hooks = Hooks(rows.append, lambda *seen: watched.append((*seen[:2], seen[2].shape)), every=2)
    request = Request(num=11, batch=8, seed=0)
    on_devices(model, 8)(model.params, plan_of(model, 3), request, hooks)
    assert watched == [
        (first, done, (8, 4, 4, 1)) for first in (0, 8) for done in (1, 2, 3)
    ]  # single rows, since a plan of three is no ten
    assert sum(rows) == 6
    watched.clear()
    on_devices(model, 8)(model.params, plan_of(model, 20), request, Hooks(watch=hooks.watch))
    assert [done for first, done, _ in watched if first == 0] == [10, 20]


def test_hooks_are_not_timed(tiny_model):
    model = tiny_model("unconditional")
    hooks = Hooks(watch=lambda *seen: time.sleep(0.5))
    pipeline, request = on_devices(model, 1), Request(num=1, batch=1, seed=0)
    pipeline(model.params, plan_of(model), request)
    assert pipeline(model.params, plan_of(model), request, hooks).run_seconds < 0.5


def test_the_stopwatch_pauses():
    stopwatch = Stopwatch()
    with stopwatch.paused():
        time.sleep(0.2)
    assert 0 <= stopwatch.seconds() < 0.2


# ------------------------------------------------------------------------------- bounds and codec


@functools.cache
def halved(bounds):
    """A codec whose images are half of x."""
    return Codec(lambda images: 2 * images, lambda x: x / 2, bounds)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 1.0), None])
def test_x0_is_clipped_to_the_bounds_of_the_codec(bounds, tiny_model):
    model = tiny_model("unconditional", codec=halved(bounds))
    plan, request = sampler.ddim(model.schedule, [100]), Request(num=4, batch=4, seed=0)
    pipeline = on_devices(model, 1)
    clipped = pipeline(model.params, plan, request).x
    free = pipeline(model.params, plan, dataclasses.replace(request, bound=None)).x
    assert np.abs(free).max() > 1
    close(clipped, free if bounds is None else np.clip(free, *bounds))


def test_samples_are_decoded_once(tiny_model):
    calls = []

    def decode(x):
        calls.append(x)
        return x / 2

    model = tiny_model("unconditional", codec=Codec(lambda images: 2 * images, decode, (-2, 2)))
    request = Request(num=3, batch=2, seed=0)
    samples = on_devices(model, 1)(model.params, plan_of(model), request)
    assert calls == []
    assert samples.images.dtype == np.uint8
    np.testing.assert_array_equal(samples.images, to_uint8(samples.x / 2))
    assert len(calls) == 1


def test_images_are_decoded_in_chunks(tiny_model, monkeypatch):
    monkeypatch.setattr(pipeline_module, "DECODED", 2)
    sizes = []

    def decode(x):
        sizes.append(len(x))
        return x / 2

    model = tiny_model("unconditional", codec=Codec(lambda images: 2 * images, decode, (-2, 2)))
    samples = on_devices(model, 1)(model.params, plan_of(model), Request(num=5, batch=5, seed=0))
    np.testing.assert_array_equal(samples.images, to_uint8(samples.x / 2))
    assert sizes == [2, 2, 1]


def test_times_of_latents_have_the_decoder_in_them(tiny_model, monkeypatch):
    """The first decoding counts as compilation, once; without decoding, x alone is timed."""
    now, calls = [0.0], []

    def decode(x):
        calls.append(len(x))
        now[0] += 7.0 if len(calls) == 1 else 2.0
        return x / 2

    codec = Codec(lambda images: 2 * images, decode, None)
    model = tiny_model("unconditional", codec=codec)
    model = model._replace(info=model.info._replace(autoencoder="1234"))
    monkeypatch.setattr(pipeline_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    pipeline = on_devices(model, 1)
    request = Request(num=5, batch=2, seed=0)
    bare = pipeline(model.params, plan_of(model), dataclasses.replace(request, decode=False))
    assert (bare.batch_seconds, bare.compile_seconds, calls) == ((0.0,) * 3, 0.0, [])
    for compiled in (7.0, 0.0):
        samples = pipeline(model.params, plan_of(model), request)
        assert (samples.batch_seconds, samples.compile_seconds) == ((2.0,) * 3, compiled)
    assert calls == 7 * [2]
    np.testing.assert_array_equal(samples.images, to_uint8(samples.x / 2))
    np.testing.assert_array_equal(samples.images, bare.images)
    np.testing.assert_array_equal(samples.x, bare.x)


def test_thresholding_is_dynamic(tiny_model):
    model = tiny_model("unconditional")
    plan, request = sampler.ddim(model.schedule, [100]), Request(num=4, batch=4, seed=0, bound=None)
    pipeline = on_devices(model, 1)
    free = pipeline(model.params, plan, request).x
    bound = DynamicThreshold(0.9)
    x = pipeline(model.params, plan, dataclasses.replace(request, bound=bound)).x
    size = np.maximum(np.quantile(np.abs(free).reshape(4, -1), 0.9, axis=1), 1)[:, None, None, None]
    close(x, np.clip(free, -size, size) / size)


def test_bounds_are_described():
    bounds = (Clip(), None, DynamicThreshold(0.995))
    assert [describe_bound(bound) for bound in bounds] == [
        "clipped", "unclipped", "thresholded 0.995",
    ]  # fmt: skip
    assert describe_devices().startswith("8 x cpu (")


# ------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"batch": 6}, ("batch", 6, 8)),
        ({"batch": 0}, ("batch", 0)),
        ({"num": 0}, ("num", 0)),
        ({"condition": np.array([0, 11], np.int32)}, ("condition", 0, 11, 10)),
        ({"condition": np.array([-1, 0], np.int32)}, ("condition", -1, 10)),
        ({"condition": np.zeros(3, np.int32)}, ("condition", (3,), 2)),
        ({"condition": None}, ("condition",)),
        ({"x": np.zeros((2, 5, 4, 1))}, ("x", (2, 5, 4, 1), (2, 4, 4, 1))),
        ({"inpaint": (np.zeros((3, 4, 4, 1)), np.ones((3, 4, 4, 1)))}, ((3, 4, 4, 1),)),
        ({"inpaint": (np.zeros((2, 4, 4, 1)), np.ones((1, 4, 4, 1)))}, ("mask", (1, 4, 4, 1))),
    ],
)
def test_bad_requests_are_named(fields, names, tiny_model):
    """Before anything is traced, since JAX would clamp a label that is out of range."""
    model = tiny_model()

    def network(*arguments):
        raise AssertionError

    pipeline = on_devices(model._replace(network=network), 8)
    right = {"num": 2, "batch": 8, "seed": 0, "condition": np.zeros(2, np.int32)}
    with pytest.raises(ValueError, match=naming(*names)):
        pipeline(model.params, plan_of(model), Request(**(right | fields)))


def test_a_prediction_that_is_not_usable_is_named(tiny_model):
    """Prediction eps says nothing at a level without signal."""
    model = tiny_model("unconditional")
    levels = schedule.zero_terminal_snr(model.schedule)
    with pytest.raises(ValueError, match=naming("eps")):
        on_devices(model, 1)(
            model.params, sampler.ddim(levels, [100, 50]), Request(num=1, batch=1, seed=0)
        )


def test_a_level_without_a_finite_time_is_named(tiny_model):
    """EDM's time is infinite at a level without signal."""
    model = tiny_model("unconditional")._replace(parameterization=parameterization.edm())
    plan, request = sampler.ddim(schedule.flow(100), [100, 50]), Request(num=1, batch=1, seed=0)
    with pytest.raises(ValueError, match=naming("network_time", "level", "100")):
        on_devices(model, 1)(model.params, plan, request)


@pytest.mark.parametrize("bound", [None, Clip()])
def test_samples_that_are_not_finite_are_refused(tiny_model, bound):
    """Clipping does not hide NaN; the first sample that has it is named."""
    model = tiny_model("unconditional")

    def network(params, x, t, condition, keys=None):
        return jnp.where(x[:, :1, :1] > 5, jnp.nan, x)

    x = np.zeros((14, *model.info.x_shape), np.float32)
    x[[11, 13]] = 9
    request = Request(num=14, batch=8, seed=0, bound=bound, x=x)
    pipeline = on_devices(model._replace(network=network), 8)
    with pytest.raises(NotFiniteError, match=naming("sample", 11, 1)):
        pipeline(model.params, sampler.ddim(model.schedule, [100]), request)


# ------------------------------------------------------------------------------- lowered


@pytest.mark.parametrize("kind", KINDS)
def test_programs_are_lowered_for_shapes_alone(kind, tiny_model):
    model = tiny_model(kind)
    shapes = jax.eval_shape(lambda: model.params)
    rows, *_ = sampler.segments(plan_of(model), jnp.float32)
    guided = kind != "unconditional"
    compiled = on_devices(model, 8).lower(shapes, rows, 8, guided=guided).compile()
    assert compiled.cost_analysis()["flops"] > 0


def test_models_without_a_null_are_sampled_plainly(tiny_model):
    """A class table without a row for the null label, as of some imported networks."""
    model = tiny_model()
    info = model.info._replace(conditioning=ClassLabel(11, has_null_label=False))
    model = model._replace(info=info)
    request = Request(num=1, batch=1, seed=0, condition=np.array([10], np.int32))
    assert on_devices(model, 1)(model.params, plan_of(model), request).nfe == 12
