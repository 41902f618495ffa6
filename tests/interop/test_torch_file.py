"""The reader of .pt files: what torch wrote, what it must refuse, and 2,000 damaged files."""

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax.interop.torch_file import DTYPES, read_pt

R = np.random.default_rng(0)
BASE = R.normal(size=24)
VALUES = BASE.astype(np.float32)


# A writer of the format that needs no torch: the classes below are pickled under torch's names.


class FloatStorage: ...


class HalfStorage: ...


class BFloat16Storage: ...


class LongStorage: ...


def _rebuild_tensor_v2(): ...


def _rebuild_parameter(): ...


KINDS = {"float32": FloatStorage, "float16": HalfStorage, "bfloat16": BFloat16Storage,
         "int64": LongStorage}  # fmt: skip
for kind in KINDS.values():
    kind.__module__ = "torch"
for function in (_rebuild_tensor_v2, _rebuild_parameter):
    function.__module__ = "torch._utils"


class Stored:
    """A tensor on disk: a view of a storage."""

    def __init__(self, storage, offset, shape, strides):
        self.storage, self.view = storage, (offset, shape, strides)

    def __reduce__(self):
        return _rebuild_tensor_v2, (self.storage, *self.view, False, OrderedDict())


class Parameter:
    """A tensor that is trained."""

    def __init__(self, tensor):
        self.tensor, self.storage = tensor, tensor.storage

    def __reduce__(self):
        return _rebuild_parameter, (self.tensor, True, OrderedDict())


class Bytes:
    """A storage on disk."""

    def __init__(self, key, values, size=None):
        self.key, self.values, self.size = key, values, values.size if size is None else size


class Writer(pickle._Pickler):
    """A pickler that takes the classes above for torch's, and keeps storages apart."""

    rest = ()  # of the identity of a storage

    def persistent_id(self, obj):
        if isinstance(obj, Bytes):
            kind = KINDS[obj.values.dtype.name]
            return "storage", kind, obj.key, "cpu", obj.size, *self.rest
        return None

    def save_global(self, obj, name=None):
        text = f"c{obj.__module__}\n{name or obj.__name__}\n"
        self.write(text.encode())
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch.copy()
    dispatch[type] = save_global
    dispatch[type(naming)] = save_global


def write(path, value, storages, root="archive", compression=zipfile.ZIP_STORED, **files):
    data = io.BytesIO()
    Writer(data, 2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data.getvalue())
        for name, text in files.items():
            archive.writestr(f"{root}/{name}", text)
        for each in storages:
            archive.writestr(f"{root}/data/{each.key}", each.values.tobytes())
    return path


def write_old(path, value, storages, little_endian=True, view=None):
    """The format of before torch 1.6: five pickles, and the storages one after the other."""
    data = io.BytesIO()
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    keys = [each.key for each in storages]
    for each in (0x1950A86A20F9469CFC6C, 1001, machine, value, keys):
        writer = Writer(data, 2)
        writer.rest = (view,)
        writer.dump(each)
    for each in storages:
        data.write(each.size.to_bytes(8, "little") + each.values.tobytes())
    path.write_bytes(data.getvalue())
    return path


def stored(values, key="0", **view):
    values = np.asarray(values)
    steps = tuple(n // values.itemsize for n in values.strides)
    storage = Bytes(key, values.ravel())
    given = {"offset": 0, "shape": values.shape, "strides": steps} | view
    return Stored(storage, **given)


def save(path, tensors, **options):
    return write(path, tensors, [each.storage for each in tensors.values()], **options)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64"])
def test_values_of_every_kind(tmp_path, name):
    values = (100 * BASE).reshape(2, 3, 4).astype(name if name != "bfloat16" else jnp.bfloat16)
    found = read_pt(save(tmp_path / "a.pt", {"w": stored(values)}))
    assert found.part == ""
    assert found.tensors["w"].dtype == values.dtype
    np.testing.assert_array_equal(found.tensors["w"], values)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (4, 6), (6, 1)),
        (0, (6, 4), (1, 6)),
        (5, (2, 3), (8, 2)),
        (23, (), ()),
        (23, (1, 1), (100, 100)),
        (0, (3, 0), (1, 1)),
    ],
)
def test_layouts(tmp_path, offset, shape, strides):
    """A tensor is any view of its storage: element i is at offset + i*strides."""
    values = BASE.astype(np.float32)
    view = {"offset": offset, "shape": shape, "strides": strides}
    found = read_pt(save(tmp_path / "a.pt", {"w": stored(values, **view)})).tensors["w"]
    assert found.shape == shape
    for index in np.ndindex(shape):
        assert found[index] == values[offset + np.dot(index, strides).astype(int)]


def test_dictionaries(tmp_path):
    """Parameters, shared storages, and what is no tensor, which is left out."""
    first = stored(BASE.astype(np.float32))
    second = Parameter(stored(BASE.astype(np.float16), "1"))
    values = OrderedDict(a=first, b=second, c=Stored(first.storage, 4, (2,), (1,)), step=7)
    values._metadata = {"": {"version": 1}}
    storages = [first.storage, second.storage]
    path = write(tmp_path / "a.pt", values, storages, byteorder="little")
    found = read_pt(path).tensors
    assert list(found) == ["a", "b", "c"]
    np.testing.assert_array_equal(found["b"], BASE.astype(np.float16))
    np.testing.assert_array_equal(found["c"], BASE.astype(np.float32)[4:6])


@pytest.mark.parametrize(
    ("keys", "part"),
    [(("opt", "model", "ema"), "ema"), (("state_dict", "model"), "model"), (("a",), None)],
)
def test_parts_of_a_checkpoint(tmp_path, keys, part):
    """The moving average is taken before the model."""
    tensors = {key: stored(np.full(2, i, np.float32), str(i)) for i, key in enumerate(keys)}
    values = {"steps": 3} | {key: OrderedDict(w=value) for key, value in tensors.items()}
    path = write(tmp_path / "a.pt", values, [each.storage for each in tensors.values()])
    if part is None:
        with pytest.raises(ValueError, match=naming(path, "ema", "steps")):
            read_pt(path)
        return
    found = read_pt(path)
    assert found.part == part
    np.testing.assert_array_equal(found.tensors["w"], np.full(2, keys.index(part)))


def test_the_format_of_before_torch_1_6(tmp_path):
    tensors = {"a": stored(VALUES), "b": Parameter(stored(VALUES.astype(np.float16), "1"))}
    storages = [each.storage for each in tensors.values()]
    values = {"ema": OrderedDict(tensors), "steps": 3}
    found = read_pt(write_old(tmp_path / "a.pt", values, storages))
    assert found.part == "ema"
    np.testing.assert_array_equal(found.tensors["a"], VALUES)
    np.testing.assert_array_equal(found.tensors["b"], VALUES.astype(np.float16))
    mistakes = {
        "big": ({"little_endian": False}, ["byteorder"]),
        "views": ({"view": ("2", 0, 1)}, ["storage"]),
    }
    for name, (options, names) in mistakes.items():
        path = write_old(tmp_path / name, values, storages, **options)
        with pytest.raises(ValueError, match=naming(path, *names)):
            read_pt(path)
    for missing in ([], storages[:1]):
        with pytest.raises(ValueError, match=naming(tmp_path / "b.pt")):
            read_pt(write_old(tmp_path / "b.pt", values, missing))
    path = write_old(tmp_path / "c.pt", values, storages)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=naming(path, "ends", 1)):
        read_pt(path)
    storages[1].size = 2**50
    with pytest.raises(ValueError, match=naming(tmp_path / "d.pt")):
        read_pt(write_old(tmp_path / "d.pt", values, storages))


# ----------------------------------------------------------------------------- what is refused


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_names_of_code_are_refused_by_name(tmp_path):
    """Nothing of them is imported or called."""
    ran = tmp_path / "ran"
    for function in (os.system, subprocess.check_output, eval, getattr, pickle.loads, np.zeros):
        path = write(tmp_path / "a.pt", {"w": Call(function, f"touch {ran}")}, [])
        named = write(tmp_path / "b.pt", {"w": stored(VALUES), "x": [function]}, [])
        for each in (path, named):
            with pytest.raises(
                ValueError, match=f"names {function.__module__}.{function.__name__}"
            ):
                read_pt(each)
    assert not ran.exists()


REFUSED = {
    "outside": (stored(VALUES, offset=1), ["w", (24,), 24]),
    "repeated": (stored(VALUES, shape=(10, 24), strides=(0, 1)), ["w", (10, 24), 24]),
    "negative": (stored(VALUES, offset=23, strides=(-1,)), ["w", "strides"]),
    "of other dimensions": (stored(VALUES, strides=(1, 1)), ["w", "strides"]),
    "no numbers": (stored(VALUES, shape=("2",)), ["w", "shape"]),
    "true": (stored(VALUES, shape=(True,)), ["w", "shape"]),
    "huge": (stored(VALUES, shape=(2**62,), strides=(0,)), ["w", 24]),
    "huge and empty": (stored(VALUES, shape=(0, 2**62), strides=(1, 1)), []),
    "of many dimensions": (stored(VALUES, shape=(1,) * 99, strides=(1,) * 99), []),
}


@pytest.mark.parametrize("case", REFUSED)
def test_views_that_are_not_inside(tmp_path, case):
    tensor, names = REFUSED[case]
    path = save(tmp_path / "a.pt", {"w": tensor})
    with pytest.raises(ValueError, match=naming(path, *names)):
        read_pt(path)


def test_sizes_that_lie(tmp_path):
    lying = stored(VALUES)
    lying.storage.size = 2**40
    with pytest.raises(ValueError, match=naming("storage", 0, 96, 2**40)):
        read_pt(save(tmp_path / "a.pt", {"w": lying}))
    with pytest.raises(ValueError, match=naming("data/0")):
        read_pt(write(tmp_path / "b.pt", {"w": stored(VALUES)}, []))
    # A megabyte of zeros in a kilobyte: torch compresses nothing.
    zeros = stored(np.zeros(2**18, np.float32))
    with pytest.raises(ValueError, match=naming("compressed")):
        read_pt(save(tmp_path / "c.pt", {"w": zeros}, compression=zipfile.ZIP_DEFLATED))


def nested(depth):
    value = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize("place", ["shape", "strides", "offset"])
def test_a_nest_that_doubles_is_not_walked(tmp_path, place):
    """A pickle of 60 tuples, each twice the one before, would take 2**60 steps to print."""
    path = save(tmp_path / "a.pt", {"w": stored(VALUES, **{place: nested(60)})})
    with pytest.raises(ValueError, match=naming("w")):
        read_pt(path)


def test_other_files(tmp_path):
    cases = {
        "other.pt": (3 * pickle.dumps({"w": 1}, 2), ["pickle", "torch"]),
        "short.pt": (pickle.dumps({"w": 1}, 2), []),
        "text.pt": (b"no archive", ["zip"]),
        "empty.pt": (b"", ["zip"]),
    }
    for name, (data, names) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=naming(path, *names)):
            read_pt(path)
    big = write(tmp_path / "big.pt", {"w": stored(VALUES)}, [], byteorder="big")
    with pytest.raises(ValueError, match=naming(big, "byteorder")):
        read_pt(big)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ValueError, match=naming("data.pkl")):
        read_pt(tmp_path / "zip.pt")
    with pytest.raises(OSError, match=r"none\.pt"):
        read_pt(tmp_path / "none.pt")


def test_damaged_files(tmp_path):
    """2,000 files with bytes changed, cut out or put in: a ValueError, or a dictionary of arrays.

    In a part of them the pickle alone is damaged, and the archive is right; a part has the format
    of before torch 1.6.
    """
    r, path = np.random.default_rng(0), tmp_path / "damaged.pt"
    tensors = {"a": stored(VALUES), "b": Parameter(stored(VALUES.astype(np.float16), "1"))}
    data, inner = io.BytesIO(), io.BytesIO()
    write(data, OrderedDict(ema=OrderedDict(tensors)), [each.storage for each in tensors.values()])
    Writer(inner, 2).dump(OrderedDict(tensors))
    old = write_old(path, tensors, [each.storage for each in tensors.values()]).read_bytes()
    sources, refused = (inner.getvalue(), data.getvalue(), old), 0
    for i in range(2000):
        changed = bytearray(sources[i % 3])
        for _ in range(r.integers(1, 4)):
            at, kind = int(r.integers(len(changed))), r.integers(3)
            if kind == 0:
                changed[at] = int(r.integers(256))
            elif kind == 1:
                del changed[at : at + int(r.integers(1, 9))]
            else:
                changed[at:at] = r.bytes(int(r.integers(1, 9)))
        if i % 3:
            path.write_bytes(changed)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", bytes(changed))
                for each in tensors.values():
                    archive.writestr(f"archive/data/{each.storage.key}", each.storage.values)
        try:
            found = read_pt(path)
        except ValueError:
            refused += 1
        else:
            for value in found.tensors.values():
                assert value.size <= 24
                assert np.asarray(value, np.float32).shape == value.shape
    assert 1500 < refused < 2000


# ----------------------------------------------------------------------------- torch itself


def test_torch_reads_the_same(tmp_path):
    """Tensors of every dtype, sliced, transposed, shared, empty, in any dictionary."""
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    base = torch.from_numpy(100 * BASE.reshape(4, 6))
    kinds = [getattr(torch, dtype.name) for dtype in DTYPES.values()]
    tensors = {str(kind): base.to(kind) for kind in kinds}
    tensors |= {"transposed": base.T, "sliced": base[1:3, ::2], "scalar": base[2, 3]}
    tensors |= {"empty": base[:0], "parameter": torch.nn.Parameter(base[:2].float())}
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for protocol in (2, 4, "old"):
        for part, given in (("", tensors), ("ema", layer.state_dict())):
            path = tmp_path / f"{protocol}{part}.pt"
            value = {"ema": given, "steps": 1} if part else given
            if protocol == "old":
                torch.save(value, path, _use_new_zipfile_serialization=False)
            else:
                torch.save(value, path, pickle_protocol=protocol)
            found, expected = read_pt(path), torch.load(path, weights_only=protocol != 4)
            assert found.part == part
            expected = expected[part] if part else expected
            assert list(found.tensors) == list(expected)
            for name, tensor in expected.items():
                ours = found.tensors[name]
                assert ours.dtype.name == str(tensor.dtype).removeprefix("torch.")
                theirs = tensor.detach().double().numpy()
                np.testing.assert_array_equal(ours.astype(np.float64), theirs)
