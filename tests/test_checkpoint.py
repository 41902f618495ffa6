import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import naming

from diffjax.checkpoint import Checkpoints, SaveError, ema_key, open_checkpoint, silence_orbax
from diffjax.devices.parallel import device_mesh, replicated
from diffjax.training.step import init_state

OPTIMIZER = optax.adamw(1e-3)


def state(step, seed=0):
    params = {"a": jax.random.normal(jax.random.key(seed), (30, 40)), "b": {"c": jnp.arange(5.0)}}
    made = init_state(params, OPTIMIZER, averages=2)
    return made._replace(step=jnp.int32(step), ema=(jax.tree.map(lambda p: 2 * p, params), params))


@pytest.fixture(autouse=True, scope="module")
def silent():
    silence_orbax()


def test_a_state_comes_back_bit_for_bit_on_any_devices(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(state(7), {"a": [1, "x", None]})
    saved.close()
    everywhere = replicated(device_mesh())
    checkpoints, step = open_checkpoint(tmp_path)
    assert step == 7
    assert checkpoints.config(7) == {"a": [1, "x", None]}
    found = checkpoints.restore(7, state(0, seed=1), everywhere)
    jax.tree.map(np.testing.assert_array_equal, found, state(7))
    assert jax.tree.structure(found) == jax.tree.structure(state(7))
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))
    for i in range(2):
        ema = checkpoints.restore_weights(7, ema_key(i), state(0).params, everywhere)
        jax.tree.map(np.testing.assert_array_equal, ema, state(7).ema[i])
    checkpoints.close()


def test_saving_in_the_background_is_not_disturbed_by_the_next_step(tmp_path):
    """The step after a save reuses the memory of the state that is being written."""
    overwrite = jax.jit(partial(jax.tree.map, lambda leaf: leaf * 0 - 1), donate_argnums=0)
    saved, large = Checkpoints(tmp_path), {"w": jax.random.normal(jax.random.key(0), (1000, 2000))}
    expected = np.array(large["w"])
    current = jax.device_put(init_state(large, OPTIMIZER), replicated(device_mesh()))
    saved.save(current, {})
    jax.block_until_ready(overwrite(current))
    saved.close()
    checkpoints, _ = open_checkpoint(tmp_path)
    like = jax.eval_shape(lambda: init_state({"w": jnp.zeros((1000, 2000))}, OPTIMIZER))
    found = checkpoints.restore(0, like, replicated(device_mesh()))
    np.testing.assert_array_equal(found.params["w"], expected)
    checkpoints.close()


def test_the_latest_are_kept_and_a_second_save_of_a_step_does_nothing(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        saved.save(state(step, seed=step), {})
    saved.close()
    checkpoints, latest = open_checkpoint(tmp_path)
    assert (checkpoints.steps(), latest) == ([2, 3], 3)
    assert open_checkpoint(tmp_path, 2)[1] == 2


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "nowhere")):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path)):
        open_checkpoint(tmp_path)
    saved = Checkpoints(tmp_path)
    saved.save(state(4), {})
    saved.close()
    with pytest.raises(FileNotFoundError, match=naming(tmp_path, 5, 4)):
        open_checkpoint(tmp_path, 5)


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    saved = Checkpoints(folder)
    saved.save(state(7), {"a": [1, "x", None]})
    saved.close()
    return folder


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_or_does_no_harm(whole_checkpoint, tmp_path, damage):
    """Orbax alone loads wrong values where a byte of an array has changed."""
    files, found, told = [p for p in whole_checkpoint.rglob("*") if p.is_file()], [], []
    everywhere = replicated(device_mesh())
    for file in files:
        run, content = tmp_path / "run", bytearray(file.read_bytes())
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole_checkpoint, run)
        content[len(content) // 2] ^= 1
        where = run / file.relative_to(whole_checkpoint)
        where.write_bytes(content if damage == "flip" else content[: len(content) // 2])
        if damage == "remove":
            where.unlink()
        checkpoints = Checkpoints(run)
        try:
            assert checkpoints.config(7) == {"a": [1, "x", None]}
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, state(0, seed=1), everywhere), state(7))
        except ValueError as error:
            told.append(str(error))
            found.append(where.relative_to(run))
        checkpoints.close()
    assert any("ocdbt.process_0" in str(path) for path in found)
    assert any("config" in str(path) for path in found)
    assert all(re.search(naming(run / "checkpoints" / "7"), sentence) for sentence in told)


def test_a_save_that_fails_is_told_and_the_one_before_it_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(state(1), {})
    saved.close()
    saved = Checkpoints(tmp_path, keep=1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(SaveError, match=naming(tmp_path / "checkpoints")):
        saved.save(state(2), {}) or saved.close()
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    checkpoints, step = open_checkpoint(tmp_path)
    assert step == 1
    checkpoints.restore(1, state(0), replicated(device_mesh()))
