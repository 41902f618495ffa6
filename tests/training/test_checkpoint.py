from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.training.checkpoint import Checkpoints, average, open_checkpoint
from diffjax.training.parallel import device_mesh, whole
from diffjax.training.step import init_state

OPTIMIZER = optax.adamw(1e-3)


def state(step, seed=0):
    params = {"a": jax.random.normal(jax.random.key(seed), (3, 4)), "b": {"c": jnp.arange(5.0)}}
    made = init_state(params, OPTIMIZER, averages=2)
    return made._replace(step=jnp.int32(step), ema=(jax.tree.map(lambda p: 2 * p, params), params))


def test_a_state_comes_back_bit_for_bit_on_any_devices(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(state(7), {"a": [1, "x", None]})
    saved.close()
    everywhere = whole(device_mesh())
    checkpoints, step = open_checkpoint(tmp_path)
    assert step == 7
    assert checkpoints.config(7) == {"a": [1, "x", None]}
    found = checkpoints.restore(7, state(0, seed=1), everywhere)
    jax.tree.map(np.testing.assert_array_equal, found, state(7))
    assert jax.tree.structure(found) == jax.tree.structure(state(7))
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))
    for i in range(2):
        ema = checkpoints.restore_weights(7, average(i), state(0).params, everywhere)
        jax.tree.map(np.testing.assert_array_equal, ema, state(7).ema[i])
    checkpoints.close()


def test_saving_in_the_background_is_not_disturbed_by_the_next_step(tmp_path):
    """The step after a save reuses the memory of the state that is being written."""
    overwrite = jax.jit(partial(jax.tree.map, lambda leaf: leaf * 0 - 1), donate_argnums=0)
    saved, large = Checkpoints(tmp_path), {"w": jax.random.normal(jax.random.key(0), (1000, 2000))}
    expected = np.array(large["w"])
    current = jax.device_put(init_state(large, OPTIMIZER), whole(device_mesh()))
    saved.save(current, {})
    jax.block_until_ready(overwrite(current))
    saved.close()
    checkpoints, _ = open_checkpoint(tmp_path)
    like = jax.eval_shape(lambda: init_state({"w": jnp.zeros((1000, 2000))}, OPTIMIZER))
    found = checkpoints.restore(0, like, whole(device_mesh()))
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
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    saved = Checkpoints(tmp_path)
    saved.save(state(4), {})
    saved.close()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of step 5: it has 4"):
        open_checkpoint(tmp_path, 5)
