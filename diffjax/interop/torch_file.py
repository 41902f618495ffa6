"""PyTorch's .pt files, read without torch and without running what they hold.

A file is a zip of ROOT/data.pkl, a pickle, and of ROOT/data/KEY, the raw bytes of each storage;
before torch 1.6 it was these one after the other. The pickle is a program for a stack machine. It
is interpreted here, by the opcodes that dictionaries of tensors need: names of classes and
functions are looked up in a short table; none is imported, and nothing is called.
"""

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
PARTS = ("ema", "model", "state_dict")  # of a checkpoint, in the order of preference
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # at the start of files of before torch 1.6
LONGEST = 300  # characters of a reason, which may quote the file


class TorchFile(NamedTuple):
    """The tensors of a file."""

    tensors: dict[str, np.ndarray]  # read-only, in the dtypes of the file
    part: str  # the key that they stood under, as "ema"; "" for a dictionary of tensors alone


def read_pt(path: Path) -> TorchFile:
    """Read a dictionary of tensors, or the average or the model of a checkpoint.

    Tensors may be of any layout in their storage, and share it. What else is in the dictionary, as
    a number of steps, is left out.

    Raises: ValueError, naming the file, for one that is damaged, or has anything but tensors,
    dictionaries, lists and numbers, which is named; OSError for one that cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _read(file)
        except Exception as error:  # of zipfile and pickletools there are a dozen kinds
            reason = str(error)[:LONGEST] or type(error).__name__
            raise ValueError(f"{path} cannot be read as a .pt file: {reason}") from error


def _read(file: Any) -> TorchFile:
    size = os.fstat(file.fileno()).st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entries = _Entries(archive, size)
            value, _ = _run(io.BytesIO(entries.read("data.pkl")))
            return _assemble(value, lambda key: entries.read(f"data/{key}"))
    file.seek(0)
    if file.read(1) != b"\x80":
        raise ValueError("it is neither a zip archive nor a pickle")
    file.seek(0)
    value, data = _read_old(file, size)
    return _assemble(value, lambda key: data[key])


def _assemble(value: Any, read: Callable[[str], bytes]) -> TorchFile:
    part, found = _choose(value)
    storages = _Storages(read)
    tensors = {
        name: storages.tensor(name, each)
        for name, each in found.items()
        if isinstance(name, str) and isinstance(each, _Tensor)
    }
    return TorchFile(tensors, part)


def _choose(value: Any) -> tuple[str, dict[Any, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__.strip('_')}, and no dictionary")
    if any(isinstance(leaf, _Tensor) for leaf in value.values()):
        return "", value
    for part in PARTS:
        if isinstance(value.get(part), dict):
            return part, value[part]
    keys = ", ".join(str(key) for key in list(value)[:5])
    raise ValueError(
        f"it has no tensors, nor any under {', '.join(PARTS)}, but {keys or 'nothing'}"
    )


# ------------------------------------------------------------------------------- storages


class _Storage(NamedTuple):
    """A reference to the bytes of ROOT/data/KEY."""

    kind: str  # as "FloatStorage"
    key: str
    size: int  # numbers


class _Tensor(NamedTuple):
    """A view of a storage, whose values are not checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Entries:
    """The files of an archive."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._files = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self._files if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl in one folder: torch.save writes such a file")
        self._root = pickles[0].removesuffix("data.pkl")
        # torch.save compresses nothing: a small file cannot fill the memory.
        if sum(info.file_size for info in self._files.values()) > size:
            raise ValueError("its parts are larger than itself, compressed or overlapping")
        if self._root + "byteorder" in self._files and self.read("byteorder") != b"little":
            raise ValueError("it has another byteorder than little")

    def read(self, name: str) -> bytes:
        """The bytes of a file in the folder of data.pkl."""
        if self._root + name not in self._files:
            raise ValueError(f"it has no {name}")
        return self._archive.read(self._files[self._root + name])


def _read_old(file: Any, size: int) -> tuple[Any, dict[str, bytes]]:
    """The value and the storages, by their keys, of a file of before torch 1.6.

    Five pickles, a magic number, a version, the kind of machine, the value and the keys of its
    storages; then of each of these the size in 8 bytes, and its numbers.
    """
    bounded = _Bounded(file, size)
    (magic, _), (version, _), (machine, _) = (_run(bounded) for _ in range(3))
    if type(magic) is not int or magic != MAGIC or version != VERSION:
        raise ValueError("it is a pickle of another program than torch")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it has another byteorder than little")
    (value, storages), (keys, _) = (_run(bounded) for _ in range(2))
    expected, data = {each.key: each for each in storages}, {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        if type(key) is not str or key not in expected or count != expected[key].size:
            raise ValueError("it has a storage of another size or key than its tensors")
        length = count * DTYPES[expected[key].kind].itemsize
        if length > size - file.tell():
            raise ValueError(f"it ends before storage {key} does")
        data[key] = file.read(length)
    return value, data


class _Bounded:
    """A file whose reads are cut to its size, so that a false count takes no memory."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self.tell, self.readline = file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size - self._file.tell()))


class _Storages:
    """The storages read so far."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read, self._found = read, {}

    def tensor(self, name: str, tensor: _Tensor) -> np.ndarray:
        """A tensor as a view of its storage, all of which is inside."""
        storage, offset, shape, strides = tensor
        if not _are_sizes(shape, strides, (offset,)) or len(shape) != len(strides):
            raise ValueError(f"tensor {name} has a shape, strides or an offset that are none")
        values, count = self._storage(name, storage), math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # More numbers than are stored would be a small file that fills the memory.
        if count > len(values) or (count and last >= len(values)):
            raise ValueError(
                f"tensor {name} of shape {shape} is not inside of its storage of {len(values)}"
            )
        if not count:
            return np.zeros(shape, values.dtype)
        steps = [step * values.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)

    def _storage(self, name: str, storage: Any) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise ValueError(f"tensor {name} has no storage")
        if storage not in self._found:
            data, dtype = self._read(storage.key), DTYPES[storage.kind]
            if len(data) != storage.size * dtype.itemsize:
                raise ValueError(
                    f"storage {storage.key} has {len(data)} bytes, and {storage.size} numbers of"
                    f" {dtype.name} are expected"
                )
            self._found[storage] = np.frombuffer(data, dtype)
        return self._found[storage]


def _are_sizes(*values: Any) -> bool:
    return all(
        type(value) is tuple and all(type(n) is int and n >= 0 for n in value) for value in values
    )


# ------------------------------------------------------------------------------- the pickle


class _Name(NamedTuple):
    """The name of a class or a function, of the few that are known."""

    name: str


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _first(value: Any, *_: Any) -> Any:
    return value


# What a pickle may name, and what stands for it here.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": _first,
}
STORAGES = {f"torch.{kind}": kind for kind in DTYPES}
# Opcodes whose argument is the value, and those of a constant.
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
}  # fmt: skip
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


def _run(file: Any) -> tuple[Any, list[_Storage]]:
    """The value of the pickle that a file is at, and the storages that it names.

    Raises: ValueError, naming it, for an opcode or a name that is not known.
    """
    stack, memo, storages = [], {}, []
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in TUPLES:
            stack.append(tuple(_pop(stack, TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_known(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack.append(_known(".".join(_pop(stack, 2))))
        elif name in CHANGES:
            CHANGES[name](stack)
            if name == "BINPERSID":
                storages.append(stack[-1])
        elif name == "STOP":
            return stack.pop(), storages
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the opcode {name}, which tensors do not need")
    raise ValueError("its pickle has no end")


def _known(name: str) -> _Name:
    if name not in FUNCTIONS and name not in STORAGES:
        raise ValueError(
            f"its pickle names {name}, which could be any code: save the dictionary of tensors"
            " alone"
        )
    return _Name(name)


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("its pickle takes more than there is")
    found = stack[-count:]
    del stack[-count:]
    return found


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    found = []
    while (value := stack.pop()) is not MARK:
        found.append(value)
    return found[::-1]


# No unchecked value is hashed or printed: a nest of tuples would take for ever.


def _reduce(stack: list[Any]) -> None:
    function, arguments = _pop(stack, 2)
    name = function.name if isinstance(function, _Name) else type(function).__name__
    if name not in FUNCTIONS:
        raise ValueError(f"its pickle calls {name}, which is no function of tensors")
    stack.append(FUNCTIONS[name](*arguments))


def _persistent(stack: list[Any]) -> None:
    kind, name, key, _, size, *view = stack.pop()
    known = (
        kind == "storage"
        and view in ([], [None])
        and isinstance(name, _Name)
        and name.name in STORAGES
    )
    if not known or type(key) is not str or type(size) is not int:
        raise ValueError("its pickle has a persistent object that is no storage")
    stack.append(_Storage(STORAGES[name.name], key, size))


def _set_items(stack: list[Any]) -> None:
    found = _pop_to_mark(stack)
    for key, value in zip(found[::2], found[1::2], strict=True):
        _set(stack[-1], key, value)


def _set_item(stack: list[Any]) -> None:
    key, value = _pop(stack, 2)
    _set(stack[-1], key, value)


def _set(into: Any, key: Any, value: Any) -> None:
    if not isinstance(into, dict) or type(key) not in (str, int):
        raise ValueError("its pickle has a dictionary whose keys are no names")
    into[key] = value


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    stack[-1].append(value)


def _extend(stack: list[Any]) -> None:
    found = _pop_to_mark(stack)
    stack[-1].extend(found)


# Attributes, as _metadata of a dictionary, are dropped.
CHANGES: dict[str, Callable[[list[Any]], Any]] = {
    "REDUCE": _reduce,
    "BINPERSID": _persistent,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _extend,
    "BUILD": lambda stack: stack.pop(),
}
