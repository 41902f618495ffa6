import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax.devices import parallel
from diffjax.devices.parallel import AXIS, BatchMapper, device_mesh

MODES = ["pmap", "shard_map", "jit"]
sizes = st.sampled_from([1, 2, 4, 8])


def mean(x, axis_name):
    return jax.lax.pmean(x, axis_name) if axis_name else x


def step(state, batch, *extra, axis_name=None):
    """One step of gradient descent on the mean square of x - state - sum of the extras."""
    gradient = mean((batch["x"] - state["w"] - sum(extra)).mean(0), axis_name)
    return {"w": state["w"] + 0.1 * gradient}


@settings(max_examples=12)
@given(sizes, st.sampled_from(MODES), st.integers(0, 2), st.booleans())
def test_step_is_that_of_one_device(devices, mode, extras, donate):
    mesh = device_mesh(jax.devices()[:devices])
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    extra = tuple(np.float32(i + 1) for i in range(extras))
    expected = step({"w": np.ones(3, np.float32)}, {"x": x}, *extra)["w"]
    run = parallel.parallelize(mesh, mode, step, donate=donate, extra_args=extras)
    whole = parallel.replicated(parallel.state_mesh(mesh, mode))
    state = jax.device_put({"w": np.ones(3, np.float32)}, whole)
    batch = parallel.shard_batch(mesh, mode, {"x": x})
    found = run(state, batch, *jax.device_put(extra, whole))
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6)
    on_all = parallel.on_mesh(mesh, found)["w"]
    np.testing.assert_array_equal(on_all, found["w"])
    assert on_all.sharding == parallel.replicated(mesh)


@pytest.mark.parametrize("mode", MODES)
def test_examples_along_another_axis(mode):
    """A batch [K, B, ...] of K steps is divided along its second axis."""
    mesh = device_mesh()
    x = np.arange(2 * 16, dtype=np.float32).reshape(2, 16)

    def means(state, batch, axis_name=None):
        return mean(batch["x"].mean(1), axis_name)

    run = parallel.parallelize(mesh, mode, means, axis=1)
    found = run(np.zeros(1), parallel.shard_batch(mesh, mode, {"x": x}, axis=1))
    np.testing.assert_allclose(found, x.mean(1))


@given(st.integers(1, 8), st.integers(1, 5))
def test_process_slices_are_the_batch(count, rows):
    batch = {
        "x": np.arange(count * rows * 2).reshape(count * rows, 2),
        "i": np.arange(count * rows),
    }
    slices = [parallel.process_slice(batch, i, count) for i in range(count)]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices)
    jax.tree.map(np.testing.assert_array_equal, whole, batch)


@given(st.integers(1, 100), st.integers(1, 9))
def test_round_up(number, devices):
    rounded = parallel.round_up(number, devices)
    assert rounded % devices == 0
    assert 0 <= rounded - number < devices


def test_default_batch():
    assert [parallel.default_batch(num) for num in (1, 8, 9, 64, 1000)] == [8, 8, 16, 64, 64]


def test_indivisible_batch():
    parallel.check_divisible(16, 8, parts=2)
    for batch, parts, multiple in ((12, 1, 8), (0, 1, 8), (24, 2, 16)):
        with pytest.raises(ValueError, match=naming("train.batch", batch, multiple)):
            parallel.check_divisible(batch, 8, "train.batch", parts)


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 40), sizes)
def test_mapped_batches_are_the_function(num, batch, devices):
    x, labels = np.arange(num, dtype=np.float32), np.arange(num) % 3
    arrays = (x[:, None], {"label": labels}, None)

    def function(params, x, condition, nothing):
        assert nothing is None
        return {"double": params * x, "label": condition["label"]}

    mapper = BatchMapper(function, np.float32(2), batch, device_mesh(jax.devices()[:devices]))
    calls = []
    found = mapper(arrays, calls.append)
    np.testing.assert_array_equal(found["double"], 2 * x[:, None])
    np.testing.assert_array_equal(found["label"], labels)
    assert calls == [1] * mapper.num_batches(num)
    assert mapper.batch_of(num) % devices == 0
    assert mapper.batch_of(num) < min(num, batch) + devices


def test_mapper_compiles_once():
    traces = []

    def function(params, x):
        traces.append(x.shape)
        return params + x

    mapper = BatchMapper(function, jnp.float32(1), 16)
    for num in (40, 16, 33):
        np.testing.assert_array_equal(mapper((np.arange(num),)), np.arange(num) + 1)
    assert traces == [(2,)]
    assert AXIS in device_mesh().axis_names
