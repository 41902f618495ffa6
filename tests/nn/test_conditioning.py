import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.nn.conditioning import (
    UNCONDITIONAL,
    ClassLabel,
    Fields,
    Vector,
    WithGuidanceScale,
    conditioning_from_dict,
    conditioning_to_dict,
    difference,
    select,
    with_names,
)


def named(*names, **fields):
    return ClassLabel(len(names), names=names, **fields)


PETS = named("cat", "dog", "owl")
words = st.text("ab1. ", min_size=1).map(str.strip).filter(bool)
named_labels = st.lists(words, min_size=1, max_size=5, unique=True).map(lambda its: named(*its))
labels = st.builds(ClassLabel, st.integers(1, 12), st.booleans())
vectors = st.builds(Vector, st.integers(1, 4))
fields = st.tuples(labels, vectors).map(Fields)
unnamed = st.one_of(st.just(UNCONDITIONAL), labels, vectors, fields)
conditionings = st.one_of(unnamed, named_labels)
batches = st.integers(1, 7)


def spec(condition):
    """Structure, shapes and dtypes."""
    shapes = jax.tree.map(lambda leaf: (np.shape(leaf), str(np.asarray(leaf).dtype)), condition)
    return jax.tree.structure(condition), shapes


def example_of(conditioning, seed):
    r = np.random.default_rng(seed)
    classes = next((p.classes for p in parts(conditioning) if isinstance(p, ClassLabel)), 1)
    width = next((p.width for p in parts(conditioning) if isinstance(p, Vector)), 1)
    return {"label": int(r.integers(classes)), "vector": r.normal(size=width)}


def parts(conditioning):
    return conditioning.parts if isinstance(conditioning, Fields) else (conditioning,)


def text_of(conditioning, condition):
    """What a user writes for a batch of conditions."""
    if isinstance(conditioning, ClassLabel):
        return ",".join(conditioning.describe(condition))
    if isinstance(conditioning, Vector):
        return "/".join(",".join(str(float(number)) for number in row) for row in condition)
    texts = [f"{p.field}={text_of(p, condition[p.field])}" for p in conditioning.parts]
    return "; ".join(texts)


class Embedding(nn.Module):
    conditioning: object
    width: int = 6

    @nn.compact
    def __call__(self, condition):
        return self.conditioning.embed(condition, self.width) + jnp.zeros((1, self.width))


def embed(conditioning, condition, seed=0):
    module = Embedding(conditioning)
    params = module.init(jax.random.key(seed), condition)
    return params.get("params", {}), module.apply(params, condition)


# ------------------------------------------------------------------------------- laws


@given(conditionings, batches)
def test_every_condition_has_the_structure_of_zeros(conditioning, batch):
    expected = spec(conditioning.zeros(batch))
    assert spec(conditioning.nulls(batch)) == expected
    read = [conditioning.read(example_of(conditioning, i)) for i in range(batch)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *read)
    assert spec(stacked) == expected
    conditioning.check(stacked)
    if conditioning.has_null:
        conditioning.check(conditioning.nulls(batch))
    if conditioning.is_conditional:
        parsed = conditioning.parse(text_of(conditioning, stacked), batch)
        assert spec(parsed) == expected
        jax.tree.map(np.testing.assert_array_equal, parsed, stacked)
        assert len(conditioning.describe(stacked)) == batch
    else:
        assert conditioning.describe(stacked) is None
    if not any(isinstance(part, Vector) for part in parts(conditioning)):
        assert spec(conditioning.spread(batch)) == expected
        conditioning.check(conditioning.spread(batch))


@given(conditionings, batches)
def test_nulls_are_the_null(conditioning, batch):
    nulls = conditioning.nulls(batch)
    jax.tree.map(
        lambda leaf, null: np.testing.assert_array_equal(leaf, np.broadcast_to(null, leaf.shape)),
        nulls,
        conditioning.null,
    )


@given(conditionings)
def test_round_trip_through_json(conditioning):
    stored = json.dumps(conditioning_to_dict(conditioning))
    assert conditioning_from_dict(json.loads(stored)) == conditioning
    hash(conditioning)  # it is a static argument of compiled functions


@settings(max_examples=20)
@given(unnamed, batches, st.booleans())
def test_embeddings(conditioning, batch, with_scale):
    """[B, width], row by row: as for each condition alone."""
    conditioning = WithGuidanceScale(conditioning) if with_scale else conditioning
    r = np.random.default_rng(0)
    condition = jax.tree.map(
        lambda leaf: (
            np.zeros(leaf.shape, leaf.dtype)
            if leaf.dtype == np.int32
            else r.normal(size=leaf.shape).astype(np.float32)
        ),
        conditioning.zeros(batch),
    )
    params, embedding = embed(conditioning, condition)
    expected = set()
    base = conditioning.base if with_scale else conditioning
    for part in parts(base):
        if isinstance(part, ClassLabel):
            expected |= {"label"}
            assert params["label"]["embedding"].shape == (part.classes + part.has_null_label, 6)
        if isinstance(part, Vector):
            expected |= {"vector_in", "vector_out"}
    expected |= {"condition_in", "condition_out"} if with_scale else set()
    assert params.keys() == expected
    assert embedding.shape == (batch if expected else 1, 6)
    for i in range(batch if expected else 0):
        row = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], condition)
        alone = Embedding(conditioning).apply({"params": params}, row)
        np.testing.assert_allclose(alone[0], embedding[i], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- each of them


def test_spread_of_labels():
    assert ClassLabel(3).spread(7).tolist() == [0, 1, 2, 0, 1, 2, 0]


@given(st.integers(1, 50), st.integers(0, 120))
def test_spread_is_even(classes, num):
    """Each class, in order and equally often but for one, or every so many of them."""
    found = ClassLabel(classes).spread(num).tolist()
    if num >= classes:
        assert found == [i % classes for i in range(num)]
    else:
        assert found == sorted(set(found))
        assert found == [classes * i // num for i in range(num)]


def test_spread_of_many_classes():
    assert ClassLabel(1000).spread(10).tolist() == [100 * i for i in range(10)]


def test_names_of_classes():
    assert PETS.describe(np.array([2, 0, 3])) == ["owl", "cat", "none"]
    assert PETS.spread(4).tolist() == [0, 1, 2, 0]
    assert PETS.list_names() == "cat, dog, owl"
    many = named(*(f"c{i}" for i in range(1000)))
    assert many.list_names() == ", ".join(many.names[:20]) + ", ..."
    assert Fields((Vector(2), PETS)).list_names() == "cat, dog, owl"
    assert [each.list_names() for each in (UNCONDITIONAL, Vector(2), ClassLabel(3))] == [""] * 3
    with pytest.raises(ValueError, match=naming("names", 2, "classes", 3)):
        ClassLabel(3, names=("a", "b"))
    with pytest.raises(ValueError, match=naming("names", 1, "classes", 2)):
        named("a", "a")


@pytest.mark.parametrize(
    ("conditioning", "text", "expected"),
    [
        (PETS, "owl", [2, 2, 2]),
        (PETS, "dog, cat", [1, 0, 1]),
        (PETS, "2,cat", [2, 0, 2]),
        # Names that look like numbers are names.
        (named(*map(str, range(12))), "10,2", [10, 2, 10]),
        (named(*map(str, range(1, 11))), "1,10", [0, 9, 0]),
        (named("7", "300000"), "300000", [1, 1, 1]),
        (named("tench, Tinca tinca", "tench", "b"), "tench, Tinca tinca,b", [0, 2, 0]),
        (named("tench, Tinca tinca", "tench", "b"), "tench,b", [1, 2, 1]),
    ],
)
def test_classes_are_written_by_name(conditioning, text, expected):
    assert conditioning.parse(text, 3).tolist() == expected


CLASSES = ClassLabel(3)
DIFFERENCES = [
    (named("cat", "wolf", "owl"), PETS, ["wolf", "dog"]),
    (named("cat", "dog"), PETS, ["owl"]),
    (named("bee", "cat", "dog", "owl"), PETS, ["bee"]),
    (named("dog", "cat", "owl"), PETS, [0, "dog", "cat"]),
    (named("1", "2", "3"), named("0", "1", "2"), ["3", "0"]),
    (ClassLabel(4), PETS, ["4 classes", "3 classes"]),
    (UNCONDITIONAL, PETS, ["unconditional", "3 classes"]),
    (ClassLabel(3, field="kind"), CLASSES, ["3 classes"]),
    (Fields((Vector(2), named("cat", "dog"))), Fields((Vector(2), named("cat", "owl"))), ["owl"]),
    (Fields((CLASSES, Vector(2))), Fields((CLASSES, Vector(3))), ["vector of 2", "vector of 3"]),
    (Fields((CLASSES, Vector(2))), CLASSES, ["vector of 2"]),
]


@pytest.mark.parametrize(("data", "model", "words"), DIFFERENCES)
def test_differences_are_named(data, model, words):
    for pair in ((data, model), (model, data)):
        assert re.search(naming(*words), difference(*pair)), difference(*pair)


def test_names_and_nulls_may_be_unknown():
    for data in (PETS, CLASSES):
        for model in (PETS, CLASSES, ClassLabel(3, has_null_label=False)):
            assert difference(data, model) == ""
    both = Fields((PETS, Vector(2)))
    assert difference(both, Fields((ClassLabel(3, has_null_label=False), Vector(2)))) == ""


def test_a_model_without_names_takes_those_of_its_data():
    """It keeps its own names, and whether it has a null label."""
    imported, vector = ClassLabel(3, has_null_label=False), Vector(2)
    taken = named(*PETS.names, has_null_label=False)
    assert with_names(imported, PETS) == taken
    assert with_names(PETS, ClassLabel(3)) == PETS
    assert with_names(PETS, named("a", "b", "c")) == PETS
    both = with_names(Fields((imported, vector)), Fields((PETS, vector)))
    assert both == Fields((taken, vector))
    for same in (UNCONDITIONAL, vector):
        assert with_names(same, same) == same


def test_captions():
    assert ClassLabel(3).describe(np.array([0, 2, 3])) == ["0", "2", "none"]
    assert Vector(2).describe(np.array([[0.5, -1 / 3]])) == ["0.5,-0.333"]
    both = Fields((ClassLabel(3), Vector(1)))
    condition = {"label": np.array([1, 3]), "vector": np.array([[2.0], [0.5]])}
    assert both.describe(condition) == ["1 2", "none 0.5"]


def test_labels():
    both = Fields((Vector(1), ClassLabel(3)))
    condition = {"label": np.array([1, 3]), "vector": np.zeros((2, 1))}
    assert both.labels(condition).tolist() == [1, 3]
    assert Vector(1).labels(condition["vector"]) is None
    assert UNCONDITIONAL.labels(None) is None


@pytest.mark.parametrize(
    ("conditioning", "text", "num", "expected"),
    [
        (ClassLabel(10), "3", 3, [3, 3, 3]),
        (ClassLabel(10), "0, 9", 3, [0, 9, 0]),
        (Vector(2), "0.1,-2", 2, [[0.1, -2], [0.1, -2]]),
        (Vector(2), "1,2/3,4", 3, [[1, 2], [3, 4], [1, 2]]),
    ],
)
def test_parsing_repeats(conditioning, text, num, expected):
    np.testing.assert_array_equal(conditioning.parse(text, num), np.float32(expected))


def test_parsing_several_fields():
    both = Fields((ClassLabel(3), Vector(2)))
    parsed = both.parse("label=0,1;vector=0.1,0.2", 3)
    np.testing.assert_array_equal(parsed["label"], [0, 1, 0])
    np.testing.assert_array_equal(parsed["vector"], np.float32([[0.1, 0.2]] * 3))
    again = both.parse("vector=0.1,0.2; label=0,1", 3)
    jax.tree.map(np.testing.assert_array_equal, again, parsed)


@pytest.mark.parametrize(
    ("conditioning", "text", "names"),
    [
        (UNCONDITIONAL, "3", ["3"]),
        (ClassLabel(10), "10", ["10", 0, 9]),
        (ClassLabel(10), "-1", ["-1", 9]),
        (ClassLabel(10), "cat", ["cat", 9]),
        (ClassLabel(10), "", [9]),
        (PETS, "cow", ["cow", "cat", "dog", "owl", 0, 2]),
        (PETS, "cat,3", ["cat,3", "owl"]),
        (PETS, "cats", ["cat", "did you mean"]),
        (named("1", "2"), "0", ["0", "1", "2"]),
        (Vector(2), "1", ["1", 2]),
        (Vector(2), "1,nan", ["1,nan", 2]),
        (Vector(2), "1,2/", ["1,2/", 2]),
        (Fields((ClassLabel(3), Vector(2))), "label=1", ["label", "vector"]),
        (Fields((ClassLabel(3), Vector(2))), "label=1;vector=1,2;label=2", ["label", "vector"]),
        (Fields((ClassLabel(3), Vector(2))), "label=3;vector=1,2", ["3", 2]),
    ],
)
def test_bad_text(conditioning, text, names):
    with pytest.raises(ValueError, match=naming("condition", *names)):
        conditioning.parse(text, 4)


@pytest.mark.parametrize(
    ("conditioning", "condition", "names"),
    [
        (UNCONDITIONAL, np.zeros(3, int), ["condition", "structure"]),
        (ClassLabel(3), None, ["condition", "structure"]),
        (ClassLabel(3), np.array([0, 4]), ["label", 4, 3]),
        (ClassLabel(3), np.array([-1, 0]), ["label", -1, 3]),
        (ClassLabel(3, has_null_label=False), np.array([0, 3]), ["label", 3, 2]),
        (ClassLabel(3), np.zeros(2), ["label", "float64"]),
        (ClassLabel(3), np.zeros((2, 1), int), ["label", (2, 1)]),
        (Vector(2), np.zeros((4, 3)), ["vector", (4, 3), 2]),
        (Vector(2), np.full((4, 2), np.inf), ["vector", 2]),
        (Fields((ClassLabel(3), Vector(2))), {"label": np.zeros(1, int)}, ["structure"]),
        (
            Fields((ClassLabel(3), Vector(2))),
            {"label": np.array([9]), "vector": np.zeros((1, 2))},
            ["label", 9, 3],
        ),
    ],
)
def test_bad_condition(conditioning, condition, names):
    with pytest.raises(ValueError, match=naming(*names)):
        conditioning.check(condition)


def test_null_needs_a_row():
    assert ClassLabel(3).has_null
    assert not ClassLabel(3, has_null_label=False).has_null
    assert Fields((ClassLabel(3), Vector(1))).has_null
    assert not Fields((ClassLabel(3, has_null_label=False), Vector(1))).has_null
    assert not UNCONDITIONAL.has_null


def test_vectors_cannot_be_enumerated():
    for conditioning in (Vector(3), Fields((ClassLabel(3), Vector(3)))):
        with pytest.raises(ValueError, match=naming("vector", 3)):
            conditioning.spread(4)


def test_scale_beside_a_label_starts_without_influence():
    label, scales = np.array([0, 2]), np.float32([[1], [3]])
    beside, alone = WithGuidanceScale(ClassLabel(3)), WithGuidanceScale(UNCONDITIONAL)
    params, embedding = embed(beside, (label, scales))
    plain = Embedding(ClassLabel(3)).apply({"params": {"label": params["label"]}}, label)
    np.testing.assert_array_equal(embedding, plain)
    _, moved = embed(alone, (None, scales))
    assert np.abs(moved[0] - moved[1]).max() > 1e-3
    assert beside.zeros(2)[1].shape == (2, 1)
    assert beside.null[1].tolist() == [1]


def test_selected_fields():
    fields = {"label": ClassLabel(3), "angle": Vector(1, "angle")}
    assert select(fields, ()) == UNCONDITIONAL
    assert select(fields, ("angle",)) == Vector(1, "angle")
    assert select(fields, ("angle", "label")) == Fields((Vector(1, "angle"), ClassLabel(3)))
    with pytest.raises(ValueError, match=naming("conditions", "colour", "label", "angle")):
        select(fields, ("label", "colour"))


def test_descriptions():
    assert str(UNCONDITIONAL) == "unconditional"
    assert str(ClassLabel(3)) == "3 classes"
    assert str(Fields((ClassLabel(3), Vector(2)))) == "3 classes and vector of 2"
