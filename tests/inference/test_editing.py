"""Edits by untrained networks, which follow laws, and by one that is trained on digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax import sampler, schedule
from diffjax.config import Distillation
from diffjax.data import image_io, tfds
from diffjax.data.batches import first_examples
from diffjax.data.codec import Codec
from diffjax.devices import parallel
from diffjax.evaluation.digits import score_digits
from diffjax.inference import editing
from diffjax.inference.editing import Editor, EditRequest, check_mask, trailing_from
from diffjax.inference.guidance import Guidance
from diffjax.inference.model import load_model
from diffjax.inference.pipeline import Pipeline, Request
from diffjax.nn.conditioning import ClassLabel

HALF = np.arange(8)[None, :, None] * np.ones((8, 1, 1)) < 4  # the left half is known


@functools.cache
def doubling():
    """A codec whose x is twice its images."""
    return Codec(lambda images: 2 * images, lambda x: x / 2, (-2.0, 2.0))


@pytest.fixture
def images():
    r = np.random.default_rng(0)
    return r.uniform(-0.9, 0.9, (11, 4, 4, 1)).astype(np.float32)


# ------------------------------------------------------------------------------- tiny models


def test_an_edit_is_independent_of_its_batch(tiny_model, images):
    editor = Editor(tiny_model("unconditional"))
    mask = np.arange(4)[None, :] * np.ones((4, 1)) < 2
    for edit in (
        lambda some: editor.inpaint(some, mask, EditRequest(10), seed=3),
        lambda some: editor.vary(some, EditRequest(10), level=60, seed=3, eta=1.0),
        lambda some: editor.encode(some, EditRequest(10)),
    ):
        np.testing.assert_allclose(edit(images[:3]), edit(images)[:3], atol=1e-4)


def test_known_pixels_are_kept_to_the_last_bit(tiny_model, images):
    mask = np.zeros((11, 4, 4, 1), np.float32)
    mask[:, :, :2] = 1
    editor = Editor(tiny_model())
    edited = editor.inpaint(
        images,
        mask,
        EditRequest(5, np.arange(11) % 10),
        seed=0,
        resamples=2,
        guidance=Guidance(2.0),
    )
    assert (edited[:, :, :2] == images[:, :, :2]).all()
    assert (edited[:, :, 2:] != images[:, :, 2:]).mean() > 0.9


@pytest.mark.parametrize("kind", ["label", "fields"])
def test_no_condition_is_the_null_condition(kind, tiny_model, images):
    model = tiny_model(kind)
    editor, nulls = Editor(model), model.info.conditioning.nulls(11)
    encoded = editor.encode(images, EditRequest(4))
    np.testing.assert_array_equal(encoded, editor.encode(images, EditRequest(4, nulls)))


def test_conditions_change_edits(tiny_model, condition_of, images):
    editor, condition = Editor(tiny_model("fields")), condition_of("fields", 11)
    edits = [
        editor.vary(images, EditRequest(4, some), level=50, seed=0, guidance=guidance)
        for some, guidance in (
            (None, Guidance()),
            (condition, Guidance()),
            (condition, Guidance(3)),
        )
    ]
    assert np.abs(edits[0] - edits[1]).max() > 1e-3
    assert np.abs(edits[1] - edits[2]).max() > 1e-3


def test_a_model_without_a_null_needs_a_condition(tiny_model, images):
    model = tiny_model()
    info = model.info._replace(conditioning=ClassLabel(11, has_null_label=False))
    with pytest.raises(ValueError, match=naming("condition")):
        Editor(model._replace(info=info)).encode(images, EditRequest(4))


def test_edits_go_through_the_codec(tiny_model, images):
    """What a model in another space does: x is encoded, and images are decoded."""
    pixels = tiny_model("unconditional")
    model = tiny_model("unconditional", codec=doubling())
    edit = EditRequest(4)
    noise = Editor(model).encode(images, edit)
    np.testing.assert_array_equal(noise, Editor(pixels).encode(2 * images, edit))
    decoded = Editor(model).decode(noise, edit)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(2 * decoded, Editor(pixels).decode(noise, edit))
    mask = np.zeros((4, 4))
    mask[0] = 1
    inpainted = Editor(model).inpaint(images, mask, edit, seed=0)
    np.testing.assert_array_equal(inpainted[:, 0], images[:, 0])


def test_variations_are_samples_from_noised_images(tiny_model, images):
    model = tiny_model("unconditional")
    edited = Editor(model).vary(images, EditRequest(3), level=60, seed=2, eta=0.5)
    plan = sampler.ddim(model.schedule, [60, 40, 20], 0.5)
    keys = sampler.image_keys(jax.random.key(2), np.arange(11))
    start = np.asarray(sampler.noise_to_level(plan, jnp.asarray(images), keys))
    request = Request(num=11, batch=16, seed=2, x=start)
    expected = Pipeline.for_model(model)(model.params, plan, request).x
    np.testing.assert_array_equal(edited, expected)


def test_progress_counts_every_batch(tiny_model, images, monkeypatch):
    monkeypatch.setattr(parallel, "LARGEST_BATCH", 8)
    rows, editor = [], Editor(tiny_model("unconditional"))
    editor.encode(images, EditRequest(2, progress=rows.append))
    assert sum(rows) == 2 * editor.batches(11) == 4


def test_levels_have_both_ends(tiny_model):
    levels = Editor(tiny_model()).levels(5)
    assert (levels[0], levels[-1], len(levels)) == (100, 1, 5)


def test_distilled_models_are_refused(tiny_model):
    model = tiny_model(distillation=Distillation(method="progressive", steps=2))
    with pytest.raises(ValueError, match=naming(model.name)):
        Editor(model)


@pytest.mark.parametrize("shape", [(2, 5, 4, 1), (0, 4, 4, 1), (2, 4, 4, 3)])
def test_images_of_another_shape_are_named(shape, tiny_model):
    with pytest.raises(ValueError, match=naming("images", shape, 4)):
        Editor(tiny_model()).encode(np.zeros(shape), EditRequest(2))


def test_levels_start_where_they_are_asked_to():
    levels = schedule.linear(1000)
    assert trailing_from(levels, 300, 3).tolist() == [300, 200, 100]
    for level in (0, 1001):
        with pytest.raises(ValueError, match=naming("level", level, 1000)):
            trailing_from(levels, level, 3)
    with pytest.raises(ValueError, match=naming("steps", 3, 2)):
        trailing_from(levels, 2, 3)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (np.ones((8, 8)), ["white"]),
        (np.zeros((8, 8)), ["black"]),
        (np.full((8, 8), 2), [2]),
        (np.full((8, 8), np.nan), ["nan"]),
        (np.ones((7, 8)), [(7, 8, 1), (3, 8, 8, 1)]),
    ],
)
def test_bad_masks_are_named(mask, names):
    with pytest.raises(ValueError, match=naming("mask", *names)):
        check_mask(mask, (3, 8, 8, 1))


@pytest.mark.parametrize("index", [(..., 0), (...,), (None,), (None, slice(1))])
def test_masks_broadcast(index):
    full = check_mask(HALF[index], (3, 8, 8, 1))
    assert (full.shape, full.dtype) == ((3, 8, 8, 1), np.float32)
    assert (full == np.broadcast_to(HALF, full.shape)).all()


# ------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def editor(digits_run):
    return editing.Editor(load_model(digits_run))


@pytest.fixture(scope="module")
def digits(digits_run, data_dir):
    """Sixteen held-out digits and their labels."""
    source = tfds.load_tfds("digits", str(data_dir)).held_out
    return first_examples(source, 16, ClassLabel(10))


def test_reconstruction_improves_with_the_steps(editor, digits):
    """A fourfold number of steps divides the squared error by more than four.

    Table 2 of DDIM (arXiv:2010.02502).
    """
    images, labels = digits
    errors = [
        np.mean((editor.reconstruct(images, EditRequest(steps, labels)) - images) ** 2) / 4
        for steps in (10, 40)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 5e-3


def test_encoded_digits_are_noise(editor, digits):
    images, labels = digits
    noise = editor.encode(images, EditRequest(50, labels))
    assert 0.6 < noise.std() < 1.1
    assert abs(noise.mean()) < 0.2
    assert abs(np.corrcoef(noise.ravel(), images.ravel())[0, 1]) < 0.4


def test_interpolation_begins_and_ends_at_the_images(editor, digits):
    images, _ = digits
    first, second, edit = images[:2], images[2:4], EditRequest(20)
    between = editor.interpolate(first, second, edit, [0, 0.5, 1])
    assert between.shape == (3, 2, 8, 8, 1)
    for end, expected in ((between[0], first), (between[2], second)):
        np.testing.assert_allclose(end, editor.reconstruct(expected, edit), atol=1e-3)
        assert np.mean((end - expected) ** 2) < 0.05
    assert np.mean((between[1] - first) ** 2) > 0.05
    assert np.mean((between[1] - second) ** 2) > 0.05


def test_variations_keep_less_from_higher_levels(editor, digits):
    images, labels = digits
    lost = []
    for level in (1, 50, 300, 1000):
        edit = EditRequest(min(5, level), labels)
        varied = editor.vary(images, edit, level=level, seed=0)
        lost.append(np.mean((varied - images) ** 2))
    assert (np.diff(lost) > 0).all()
    assert lost[0] < 1e-3


def test_variations_are_guided_to_other_labels(editor, digits):
    images, _ = digits
    edit = EditRequest(20, np.full(16, 6, np.int32))
    varied = editor.vary(images, edit, level=800, guidance=Guidance(3.0), seed=0)
    scores = score_digits(image_io.to_uint8(varied), edit.condition)
    assert scores.class_accuracy > 0.6
    again = editor.vary(images, edit, level=800, guidance=Guidance(3.0), seed=1)
    assert (varied != again).any()


@pytest.mark.parametrize(("eta", "resamples", "scale"), [(0.0, 1, 1.0), (1.0, 3, 2.0)])
def test_inpainted_digits_are_kept_and_recognised(editor, digits, eta, resamples, scale):
    images, labels = digits
    inpainted = editor.inpaint(
        images, HALF, EditRequest(20, labels),
        eta=eta, resamples=resamples, guidance=Guidance(scale), seed=0,
    )  # fmt: skip
    known = np.broadcast_to(HALF, images.shape)
    assert (inpainted[known] == images[known]).all()
    assert (inpainted[~known] != images[~known]).mean() > 0.5  # black stays black
    # One in ten by chance.
    assert score_digits(image_io.to_uint8(inpainted), labels).class_accuracy >= 0.5
