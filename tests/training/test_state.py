import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax import loss
from diffjax.training.state import (
    init_state,
    state_from_trees,
    state_to_trees,
    step_key,
)

PARAMS = {"w": jnp.arange(3, dtype=jnp.bfloat16), "b": jnp.float32(0.5)}


def test_averages_start_as_float32_copies():
    state = init_state(PARAMS, optax.adam(0.1), averages=2)
    assert (int(state.step), int(state.skipped), len(state.ema)) == (0, 0, 2)
    for average in state.ema:
        chex.assert_trees_all_equal(average, jax.tree.map(jnp.float32, PARAMS))
        assert average["b"] is not state.params["b"]  # memory of its own: states are donated


def test_trees_are_inverted():
    state = init_state(PARAMS, optax.adam(0.1), averages=3)._replace(step=jnp.int32(7))
    trees = state_to_trees(state)
    assert set(trees) == {"params", "rest", "ema", "ema_1", "ema_2"}
    assert set(trees["rest"]) == {"step", "skipped", "opt_state"}
    chex.assert_trees_all_equal(state_from_trees(trees, state), state)


def test_keys_differ():
    """By seed, step and example."""
    index = jnp.arange(50, dtype=jnp.uint32)
    keys = [
        jax.random.key_data(loss.example_keys(step_key(seed, step), index))
        for seed in (0, 1)
        for step in (0, 1, 2)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 300
