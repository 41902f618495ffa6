import json
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import naming

from diffjax.checkpoint import (
    Checkpoints,
    SaveError,
    ema_key,
    latest_config,
    open_checkpoint,
    silence_orbax,
    tree_sha256,
)
from diffjax.devices.parallel import device_mesh, replicated
from diffjax.training.state import init_state, state_from_trees, state_to_trees

OPTIMIZER = optax.adamw(1e-3)


CONFIG = {"a": [1, "x", None]}


def make_state(step, seed=0):
    params = {"a": jax.random.normal(jax.random.key(seed), (30, 40)), "b": {"c": jnp.arange(5.0)}}
    state = init_state(params, OPTIMIZER, averages=2)
    return state._replace(step=jnp.int32(step), ema=(jax.tree.map(lambda p: 2 * p, params), params))


def trees(step, seed=0):
    return state_to_trees(make_state(step, seed))


def save_one(workdir, step, config=None):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, trees(step), config or {})
    checkpoints.close()


@pytest.fixture(autouse=True, scope="module")
def silent():
    silence_orbax()


def test_round_trip_on_any_devices(tmp_path):
    save_one(tmp_path, 7, CONFIG)
    everywhere = replicated(device_mesh())
    checkpoints, step = open_checkpoint(tmp_path)
    assert step == 7
    assert checkpoints.config(7) == CONFIG
    like = make_state(0, seed=1)
    restored = checkpoints.restore(7, state_to_trees(like), everywhere)
    state = state_from_trees(restored, like)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(7))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(7))
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(state))
    for i in range(2):
        ema = checkpoints.restore_weights(7, ema_key(i), make_state(0).params, everywhere)
        jax.tree.map(np.testing.assert_array_equal, ema, make_state(7).ema[i])
    checkpoints.close()


def test_stored_layout(tmp_path):
    """The names on disk, which every version must be able to read."""
    save_one(tmp_path, 7, CONFIG)
    folder = tmp_path / "checkpoints" / "7"
    assert {"params", "rest", "ema", "ema_1", "config"} <= {each.name for each in folder.iterdir()}
    stored = json.loads((folder / "config" / "metadata").read_text())
    assert stored.keys() == {"config", "digests", "digest"}
    assert stored["config"] == CONFIG
    digests = {name: tree_sha256(tree) for name, tree in trees(7).items()}
    assert stored["digests"] == digests


def test_save_while_the_state_is_overwritten(tmp_path):
    """The step after a save reuses the memory of the state that is being written."""
    overwrite = jax.jit(partial(jax.tree.map, lambda leaf: leaf * 0 - 1), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    large = {"w": jax.random.normal(jax.random.key(0), (1000, 2000))}
    expected, everywhere = np.array(large["w"]), replicated(device_mesh())
    current = jax.device_put(large, everywhere)
    checkpoints.save(0, {"params": current}, {})
    jax.block_until_ready(overwrite(current))
    checkpoints.close()
    checkpoints, _ = open_checkpoint(tmp_path)
    like = {"w": jax.ShapeDtypeStruct((1000, 2000), jnp.float32)}
    restored = checkpoints.restore_weights(0, "params", like, everywhere)
    np.testing.assert_array_equal(restored["w"], expected)
    checkpoints.close()


def test_latest_are_kept(tmp_path):
    """A second save of a step does nothing."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        checkpoints.save(step, trees(step, seed=step), {})
    checkpoints.close()
    checkpoints, latest = open_checkpoint(tmp_path)
    assert (checkpoints.steps(), latest) == ([2, 3], 3)
    assert open_checkpoint(tmp_path, 2)[1] == 2


def test_missing_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "nowhere")):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path)):
        open_checkpoint(tmp_path)
    save_one(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match=naming(tmp_path, 5, 4)):
        open_checkpoint(tmp_path, 5)


def test_reading_writes_nothing(tmp_path):
    """What is there stays as it is, also what looks like a save under way."""

    def entries():
        return {path: path.lstat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}

    save_one(tmp_path, 4, CONFIG)
    shutil.copytree(
        tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-0"
    )
    (tmp_path / "checkpoints" / "4 (copy)").mkdir()
    before = entries()
    checkpoints, _ = open_checkpoint(tmp_path)
    assert checkpoints.strays() == ["4 (copy)"]
    assert checkpoints.config(4) == latest_config(tmp_path) == CONFIG
    checkpoints.restore(4, trees(0), replicated(device_mesh()))
    checkpoints.close()
    assert entries() == before


def test_the_latest_readable_configuration(tmp_path):
    """It is found without a damaged one after it."""
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none")):
        latest_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path)):
        latest_config(tmp_path)
    save_one(tmp_path, 4, CONFIG)
    save_one(tmp_path, 5, {"b": 1})
    assert latest_config(tmp_path) == {"b": 1}
    metadata = tmp_path / "checkpoints" / "5" / "config" / "metadata"
    metadata.write_text(metadata.read_text().replace('"b"', '"c"'))
    assert latest_config(tmp_path) == CONFIG
    (tmp_path / "checkpoints" / "4" / "config" / "metadata").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path / "checkpoints" / "5")):
        latest_config(tmp_path)


def test_another_structure(tmp_path):
    save_one(tmp_path, 4)
    checkpoints, _ = open_checkpoint(tmp_path)
    like = {"a": jax.ShapeDtypeStruct((30, 41), jnp.float32)}
    with pytest.raises(ValueError, match=naming(tmp_path / "checkpoints" / "4")):
        checkpoints.restore_weights(4, "params", like, replicated(device_mesh()))
    checkpoints.close()


def test_quarantine(tmp_path):
    save_one(tmp_path, 4)
    save_one(tmp_path, 5)
    checkpoints, _ = open_checkpoint(tmp_path)
    place = checkpoints.quarantine(5)
    assert checkpoints.steps() == [4]
    assert place == tmp_path / "damaged" / "5"
    assert (place / "config").is_dir()
    checkpoints.close()


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    save_one(folder, 7, CONFIG)
    return folder


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_or_harmless(whole_checkpoint, tmp_path, damage):
    """Orbax alone loads wrong values where a byte of an array has changed."""
    files, damaged, errors = [p for p in whole_checkpoint.rglob("*") if p.is_file()], [], []
    everywhere = replicated(device_mesh())
    for file in files:
        run, content = tmp_path / "run", bytearray(file.read_bytes())
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole_checkpoint, run)
        content[len(content) // 2] ^= 1
        path = run / file.relative_to(whole_checkpoint)
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
        if damage == "remove":
            path.unlink()
        checkpoints = Checkpoints(run)
        try:
            assert checkpoints.config(7) == CONFIG
            restored = checkpoints.restore(7, trees(0, seed=1), everywhere)
            jax.tree.map(np.testing.assert_array_equal, restored, trees(7))
        except ValueError as error:
            errors.append(str(error))
            damaged.append(path.relative_to(run))
        checkpoints.close()
    assert any("ocdbt.process_0" in str(path) for path in damaged)
    assert any("config" in str(path) for path in damaged)
    assert all(re.search(naming(run / "checkpoints" / "7"), error) for error in errors)


def test_failed_save_keeps_the_one_before(tmp_path):
    save_one(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(SaveError, match=naming(tmp_path / "checkpoints")):
        checkpoints.save(2, trees(2), {}) or checkpoints.close()
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    checkpoints, step = open_checkpoint(tmp_path)
    assert step == 1
    checkpoints.restore(1, trees(0), replicated(device_mesh()))


def test_digests_are_of_names_dtypes_shapes_and_bytes():
    """Trees of the same bytes differ in their digests where anything else does."""
    x = np.arange(6, dtype=np.int32)
    trees = (
        {"a": x},
        {"b": x},
        {"a": {"a": x}},
        {"a": x.view(np.uint32)},
        {"a": x.view(np.float32)},
        {"a": x.reshape(2, 3)},
        {"a": x.reshape(3, 2)},
        {"a": x[::-1]},
        {"a": x[:3], "b": x[3:]},
        {"a": x[3:], "b": x[:3]},
    )
    assert len({tree_sha256(tree) for tree in trees}) == len(trees)
    assert tree_sha256({"a": jnp.asarray(x)}) == tree_sha256(trees[0])
    # Rows of a transposed array are its numbers in their order, wherever they lie in memory.
    assert tree_sha256({"a": x.reshape(2, 3).T.T}) == tree_sha256({"a": x.reshape(2, 3)})
    assert tree_sha256({"a": x.reshape(2, 3).T}) == tree_sha256({"a": x.reshape(2, 3).T.copy()})
