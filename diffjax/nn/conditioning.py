"""Conditionings: objects that embed, parse and describe conditions of a network.

A condition is a pytree of arrays [B, ...], or None. Every conditioning names its null, a pytree of
the same structure without the batch axis: the condition that means "none", which conditions are
dropped to in training and guided away from in sampling.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Condition = Any  # a pytree of arrays [B, ...], or None
LISTED = 20  # names of classes in a sentence, at most


@dataclass(frozen=True)
class Conditioning:
    """Base class: no condition at all. Networks get None, and cannot be guided by it."""

    @property
    def null(self) -> Condition:
        """The condition that means "none", without a batch axis."""
        return None

    @property
    def has_null(self) -> bool:
        """True if a network can be trained with its null condition beside others."""
        return False

    @property
    def is_conditional(self) -> bool:
        """True if networks get anything but None."""
        return self.zeros(1) is not None

    def zeros(self, batch: int) -> Condition:
        """A condition of zeros [batch, ...], of the right structure, shapes and dtypes."""
        return None

    def nulls(self, batch: int) -> Condition:
        """The null condition `batch` times, as numpy arrays."""
        return jax.tree.map(
            lambda leaf, none: np.broadcast_to(np.asarray(none, leaf.dtype), leaf.shape),
            self.zeros(batch),
            self.null,
        )

    def spread(self, num: int) -> Condition:
        """Conditions [num, ...] that cover all that exist, evenly and in order.

        Raises: ValueError if they cannot be enumerated, as vectors cannot.
        """
        return None

    def read(self, example: Mapping[str, Any]) -> Condition:
        """The condition of one example of a data set, without a batch axis."""
        return None

    def parse(self, text: str, num: int) -> Condition:
        """The conditions that a user writes, repeated over `num` samples.

        Raises: ValueError for a text that describes none.
        """
        raise ValueError(f"condition is {text!r}, and the model is unconditional: leave it out")

    def describe(self, condition: Condition) -> list[str] | None:
        """A short caption for each of a batch of conditions; None where there are none."""
        return None

    def list_names(self) -> str:
        """The names of classes, as in "ant, bee, cat"; "" where there are none."""
        return ""

    def labels(self, condition: Condition) -> np.ndarray | None:
        """The class labels among conditions, int [B]; None where there are none."""
        return None

    def check(self, condition: Condition) -> None:
        """Check values before tracing, since JAX clamps an index out of range.

        Raises: ValueError for a condition that networks do not know.
        """
        structure = jax.tree.structure(self.zeros(1))
        if jax.tree.structure(condition) != structure:
            raise ValueError(
                f"condition has structure {jax.tree.structure(condition)}, expected {structure}"
            )

    def embed(self, condition: Condition, width: int) -> Array | float:
        """The embedding [B, width]; to be called in a compact method of Flax."""
        return 0.0

    def __str__(self) -> str:
        """A short description, as in "10 classes"."""
        return "unconditional"


UNCONDITIONAL = Conditioning()


@dataclass(frozen=True)
class ClassLabel(Conditioning):
    """A class label, int32 [B] of 0..classes-1; `classes` itself is the null label.

    Classes are called by their names where these are known, else by their numbers.

    Raises: ValueError for names that are not one per class, each different.
    """

    classes: int
    has_null_label: bool = True  # whether the class table has a row for the null label
    field: str = "label"  # of the examples of a data set, and the name of the class table
    names: tuple[str, ...] = ()  # of the classes, in their order; empty where they are unknown

    def __post_init__(self) -> None:
        """Check the names."""
        if self.names and len(set(self.names)) != self.classes:
            raise ValueError(
                f"names has {len(set(self.names))} different names, and classes is {self.classes}:"
                " use one name per class"
            )

    @property
    def null(self) -> int:
        """The null label."""
        return self.classes

    @property
    def has_null(self) -> bool:
        """True if the class table has a row for the null label."""
        return self.has_null_label

    def zeros(self, batch: int) -> Array:
        """Labels 0, int32 [batch]."""
        return jnp.zeros(batch, jnp.int32)

    def spread(self, num: int) -> np.ndarray:
        """Each class in turn, int32 [num]; of more classes than num, every so many."""
        labels = np.arange(max(num, self.classes)) % self.classes
        return labels[np.arange(num) * len(labels) // max(num, 1)].astype(np.int32)

    def read(self, example: Mapping[str, Any]) -> np.int32:
        """The example's label."""
        return np.int32(example[self.field])

    def parse(self, text: str, num: int) -> np.ndarray:
        """Labels as in "3" or "cat,dog", repeated over `num` samples: int32 [num].

        Classes are written by name, by one of the words between commas of a name if no other name
        has it, or by number from 0, but for names that look like numbers themselves: of the classes
        "1" to "10" the text "1" is the first, and "0" is none.
        """
        words, labels = text.split(","), []
        most = 1 + max((name.count(",") for name in self.names), default=0)  # words of a name
        while words:
            candidates = ((n, self._label_of(words[:n])) for n in range(most, 0, -1))
            taken, label = next((each for each in candidates if each[1] is not None), (1, None))
            if label is None:
                raise ValueError(f"condition is {text!r}: {self._expected(words[0].strip())}")
            labels.append(label)
            del words[:taken]
        return np.resize(np.asarray(labels, np.int32), num)

    def _label_of(self, words: list[str]) -> int | None:
        word = ",".join(words).strip()
        if word in self.names:
            return self.names.index(word)
        is_number = word.isdecimal() and not self._has_numbers_as_names
        if is_number:
            return int(word) if int(word) < self.classes else None
        # Names of ImageNet are several words for one thing, as "tench, Tinca tinca".
        meant = [i for i, name in enumerate(self.names) if word in name.split(", ")]
        return meant[0] if len(meant) == 1 else None

    @property
    def _has_numbers_as_names(self) -> bool:
        return any(re.fullmatch(r"[-+]?\d*\.?\d+", name) for name in self.names)

    def _expected(self, word: str) -> str:
        numbers = f"0 to {self.classes - 1}"
        if not self.names:
            return f"use labels of {numbers}, separated by commas"
        if self._has_numbers_as_names:
            return f"use names of classes ({self.list_names()}), separated by commas"
        near = difflib.get_close_matches(word, self.names, n=1)
        hint = f"did you mean {near[0]!r}? Use" if near else "use"
        names = f"names of classes ({self.list_names()}), or their numbers {numbers}"
        return f"{hint} {names}, separated by commas"

    def list_names(self) -> str:
        """The names in order, as in "ant, bee, cat"; the first ones of many."""
        return ", ".join(self.names[:LISTED]) + ", ..." * (len(self.names) > LISTED)

    def describe(self, condition: Condition) -> list[str]:
        """The names of the classes, or their numbers; "none" for the null label."""
        names = [*(self.names or map(str, range(self.classes))), "none"]
        return [names[label] for label in np.asarray(condition)]

    def labels(self, condition: Condition) -> np.ndarray:
        """The condition itself."""
        return np.asarray(condition)

    def check(self, condition: Condition) -> None:
        """Check that labels are integers that have a row in the class table."""
        super().check(condition)
        labels, last = np.asarray(condition), self.classes - (not self.has_null)
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise ValueError(
                f"condition has {self.field} {labels.dtype} {labels.shape}, expected integers [B]"
            )
        if np.any((labels < 0) | (labels > last)):
            raise ValueError(
                f"condition has {self.field} {labels.min()} to {labels.max()}: use 0 to {last}"
            )

    def embed(self, condition: Condition, width: int) -> Array:
        """The rows of a class table, as large as the embedding of the time.

        A table of small numbers is ignored by the network for long.
        """
        rows = self.classes + self.has_null
        init = nn.initializers.normal(1.0)
        return nn.Embed(rows, width, embedding_init=init, name=self.field)(condition)

    def __str__(self) -> str:
        """The number of classes."""
        return f"{self.classes} classes"


@dataclass(frozen=True)
class Vector(Conditioning):
    """A vector of real numbers, float32 [B, width]; the zero vector is its null."""

    width: int
    field: str = "vector"

    @property
    def null(self) -> np.ndarray:
        """The zero vector [width]."""
        return np.zeros(self.width, np.float32)

    @property
    def has_null(self) -> bool:
        """Always true."""
        return True

    def zeros(self, batch: int) -> Array:
        """Zero vectors, float32 [batch, width]."""
        return jnp.zeros((batch, self.width), jnp.float32)

    def spread(self, num: int) -> Condition:
        """Always raises, since vectors cannot be enumerated."""
        raise ValueError(f"{self.field} is a vector of {self.width} numbers: give its values")

    def read(self, example: Mapping[str, Any]) -> np.ndarray:
        """The example's vector, float32 [width]."""
        return np.asarray(example[self.field], np.float32).reshape(self.width)

    def parse(self, text: str, num: int) -> np.ndarray:
        """Vectors as in "0.1,0.2" or "0.1,0.2/1,0", repeated over `num` samples."""
        try:
            rows = [[float(number) for number in row.split(",")] for row in text.split("/")]
        except ValueError:
            rows = []
        if not rows or any(len(row) != self.width for row in rows) or not np.isfinite(rows).all():
            raise ValueError(
                f"condition is {text!r}: use {self.width} numbers separated by commas, and slashes"
                " between vectors"
            )
        return np.resize(np.asarray(rows, np.float32), (num, self.width))

    def describe(self, condition: Condition) -> list[str]:
        """The numbers of each vector, to three digits."""
        return [",".join(f"{number:.3g}" for number in row) for row in np.asarray(condition)]

    def check(self, condition: Condition) -> None:
        """Check that vectors are finite and of the right width."""
        super().check(condition)
        if np.shape(condition)[1:] != (self.width,) or not np.isfinite(condition).all():
            raise ValueError(
                f"condition has {self.field} of shape {np.shape(condition)}, expected finite"
                f" [B, {self.width}]"
            )

    def embed(self, condition: Condition, width: int) -> Array:
        """Two dense layers."""
        return _embed_numbers(condition, width, self.field, nn.linear.default_kernel_init)

    def __str__(self) -> str:
        """The width."""
        return f"vector of {self.width}"


@dataclass(frozen=True)
class Fields(Conditioning):
    """Several conditions at once, as a dict by field. They are dropped together."""

    parts: tuple[ClassLabel | Vector, ...]

    def _map(self, function: Callable[[Any], Any]) -> dict[str, Any]:
        return {part.field: function(part) for part in self.parts}

    @property
    def null(self) -> dict[str, Condition]:
        """The null of each part."""
        return self._map(lambda part: part.null)

    @property
    def has_null(self) -> bool:
        """True if every part has a null."""
        return all(part.has_null for part in self.parts)

    def zeros(self, batch: int) -> dict[str, Condition]:
        """The zeros of each part."""
        return self._map(lambda part: part.zeros(batch))

    def spread(self, num: int) -> dict[str, Condition]:
        """The spread of each part, where all of them have one."""
        return self._map(lambda part: part.spread(num))

    def read(self, example: Mapping[str, Any]) -> dict[str, Condition]:
        """Each part's condition of the example."""
        return self._map(lambda part: part.read(example))

    def parse(self, text: str, num: int) -> dict[str, Condition]:
        """The parts as in "label=0,1;vector=0.1,0.2"."""
        split = [pair.partition("=") for pair in text.split(";")]
        texts = {name.strip(): value for name, _, value in split}
        names = [part.field for part in self.parts]
        if sorted(texts) != sorted(names) or len(split) != len(texts):
            raise ValueError(
                f"condition is {text!r}: use {';'.join(f'{name}=...' for name in names)}"
            )
        return self._map(lambda part: part.parse(texts[part.field], num))

    def describe(self, condition: Condition) -> list[str]:
        """The captions of all parts."""
        captions = [part.describe(condition[part.field]) for part in self.parts]
        return [" ".join(words) for words in zip(*captions, strict=True)]

    def list_names(self) -> str:
        """The names of the first part that has any."""
        return next(filter(None, (part.list_names() for part in self.parts)), "")

    def labels(self, condition: Condition) -> np.ndarray | None:
        """The labels of the first part that has any."""
        found = (part.labels(condition[part.field]) for part in self.parts)
        return next((labels for labels in found if labels is not None), None)

    def check(self, condition: Condition) -> None:
        """Check each part."""
        super().check(condition)
        for part in self.parts:
            part.check(condition[part.field])

    def embed(self, condition: Condition, width: int) -> Array | float:
        """The sum of the parts' embeddings."""
        return sum(part.embed(condition[part.field], width) for part in self.parts)

    def __str__(self) -> str:
        """The description of each part."""
        return " and ".join(map(str, self.parts))


@dataclass(frozen=True)
class WithGuidanceScale(Conditioning):
    """A condition and a guidance scale, as (condition, float32 [B, 1]).

    A network that is distilled for it computes guidance in one evaluation (arXiv:2210.03142).
    """

    base: Conditioning

    @property
    def null(self) -> Condition:
        """The null of the condition, at scale 1."""
        return self.base.null, np.ones(1, np.float32)

    def zeros(self, batch: int) -> Condition:
        """The zeros of the condition, and scales 0."""
        return self.base.zeros(batch), jnp.zeros((batch, 1), jnp.float32)

    def embed(self, condition: Condition, width: int) -> Array:
        """The embedding of the condition, plus that of the scale.

        Beside a condition the scale's last layer starts at zero, so that a network that knows the
        condition learns the scale without forgetting it.
        """
        base, scale = condition
        init = nn.initializers.zeros if self.base.is_conditional else nn.linear.default_kernel_init
        embedding = self.base.embed(base, width)
        return embedding + _embed_numbers(scale, width, "condition", init)

    def __str__(self) -> str:
        """The description of the condition, and of the scale."""
        return f"{self.base} and a guidance scale"


def _embed_numbers(values: Array, width: int, name: str, last_init: Any) -> Array:
    hidden = nn.Dense(width, name=f"{name}_in")(values.astype(jnp.float32))
    return nn.Dense(width, kernel_init=last_init, name=f"{name}_out")(nn.silu(hidden))


KINDS: dict[str, type[Conditioning]] = {
    "none": Conditioning, "class_label": ClassLabel, "vector": Vector, "fields": Fields,
}  # fmt: skip


def select(fields: Mapping[str, Conditioning], names: Sequence[str]) -> Conditioning:
    """The conditioning on the named fields of a data set: on none, one or several.

    Raises: ValueError for a field that the data set has not.
    """
    for name in names:
        if name not in fields:
            has = ", ".join(fields) or "none"
            raise ValueError(
                f"conditions are {tuple(names)}, and the data has no {name!r}: it has {has}"
            )
    parts: tuple[Any, ...] = tuple(fields[name] for name in names)
    return UNCONDITIONAL if not parts else parts[0] if len(parts) == 1 else Fields(parts)


def check_structure(conditioning: Conditioning, condition: Condition) -> None:
    """Check that a network gets its condition, of the right structure.

    Raises: ValueError for a condition missing or unexpected.
    """
    if condition is None and conditioning.is_conditional:
        raise ValueError(
            f"condition is None, and the network is conditioned on {conditioning}: give one for"
            " each sample, or its null condition"
        )
    structure = jax.tree.structure(conditioning.zeros(1))
    if jax.tree.structure(condition) != structure:
        raise ValueError(
            f"condition has structure {jax.tree.structure(condition)}, expected {structure} for"
            f" a network with {conditioning}"
        )


def difference(data: Conditioning, model: Conditioning) -> str:
    """A clause that names how conditions of data differ from a model's, or "".

    Two things of a model may be unknown: the names of its classes, and, to data, whether its class
    table has a row for the null label.
    """
    for ours, theirs in zip(_parts(data), _parts(model), strict=False):
        if isinstance(ours, ClassLabel) and isinstance(theirs, ClassLabel):
            clause = _name_difference(ours.names, theirs.names)
            if clause:
                return clause
    plain = [tuple(map(_without_names, _parts(each))) for each in (data, model)]
    return "" if plain[0] == plain[1] else f"the data has {data}, and the model has {model}"


def with_names(model: Conditioning, data: Conditioning) -> Conditioning:
    """A model's conditioning, whose classes have the names of data where it has none.

    data: without a `difference`.
    """
    if isinstance(model, Fields):
        pairs = zip(model.parts, _parts(data), strict=True)
        parts: Any = tuple(with_names(*pair) for pair in pairs)
        return Fields(parts)
    if isinstance(model, ClassLabel) and isinstance(data, ClassLabel) and not model.names:
        return dataclasses.replace(model, names=data.names)
    return model


def _name_difference(data: tuple[str, ...], model: tuple[str, ...]) -> str:
    if not data or not model or data == model:
        return ""
    new = [name for name in data if name not in model]
    gone = [name for name in model if name not in data]
    if new and gone:
        return f"the data has the class {new[0]!r}, and the model has {gone[0]!r}"
    if new or gone:
        has, lacks = ("data", "model") if new else ("model", "data")
        return f"the {has} has the class {[*new, *gone][0]!r}, and the {lacks} has not"
    i = next(i for i, (ours, theirs) in enumerate(zip(data, model, strict=True)) if ours != theirs)
    return f"class {i} of the data is {data[i]!r}, and of the model {model[i]!r}"


def _parts(conditioning: Conditioning) -> tuple[Conditioning, ...]:
    return conditioning.parts if isinstance(conditioning, Fields) else (conditioning,)


def _without_names(part: Conditioning) -> Conditioning:
    if isinstance(part, ClassLabel):
        return dataclasses.replace(part, has_null_label=True, names=())
    return part


def conditioning_to_dict(conditioning: Conditioning) -> dict[str, Any]:
    """The conditioning for JSON, with its kind."""
    kind = next(name for name, kind in KINDS.items() if kind is type(conditioning))
    if isinstance(conditioning, Fields):
        return {"kind": kind, "parts": [conditioning_to_dict(part) for part in conditioning.parts]}
    return {"kind": kind, **dataclasses.asdict(conditioning)}


def conditioning_from_dict(values: Mapping[str, Any]) -> Conditioning:
    """The inverse of `conditioning_to_dict`, through JSON."""
    rest: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name != "kind"
    }
    if values["kind"] == "fields":
        rest = {"parts": tuple(conditioning_from_dict(part) for part in rest["parts"])}
    return KINDS[values["kind"]](**rest)
