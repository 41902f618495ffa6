import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import loss, process, schedule
from diffjax.training.step import example_keys

LEVELS = schedule.linear(1000)


def keys(n, seed=0):
    return example_keys(seed, 0, jnp.arange(n, dtype=jnp.uint32))


def test_levels_are_uniform_over_all_noisy_ones():
    levels = schedule.linear(10)
    t = np.asarray(loss.sample_t(keys(20_000), levels))
    assert set(t) == set(range(1, 11))
    # Each share is 0.1 with standard deviation 0.0021.
    np.testing.assert_allclose(np.bincount(t)[1:] / len(t), 0.1, atol=0.011)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_withheld_at_the_rate(rate):
    dropped = np.asarray(loss.drop_condition(keys(20_000), jnp.zeros(20_000, jnp.int32), 10, rate))
    assert set(dropped) <= {0, 10}
    assert np.mean(dropped == 10) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("name", process.PREDICTIONS)
def test_the_loss_is_the_distance_to_the_target(name):
    """A network that knows x0 has no loss; one that is off by 0.5 everywhere has 0.25."""
    prediction, x0 = process.PREDICTIONS[name], jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    table = jax.tree.map(jnp.asarray, schedule.at(LEVELS, LEVELS.t))

    def network(offset, x_t, t, condition, keys):
        level = jax.tree.map(lambda leaf: leaf[t + 1], table)
        return prediction.target(x0, process.eps_from_x0(x_t, x0, level), level) + offset

    objective = loss.simple(network, prediction, LEVELS)
    for offset in (0.0, 0.5):
        np.testing.assert_allclose(objective(offset, {"image": x0}, keys(8)), offset**2, atol=3e-3)


def test_examples_do_not_share_noise_nor_depend_on_their_batch():
    x0 = jnp.zeros((8, 4, 4, 1))
    objective = loss.simple(lambda params, x, t, condition, keys: x, process.PREDICTIONS["x0"], LEVELS)
    whole = objective(None, {"image": x0}, keys(8))
    assert len(np.unique(whole)) == 8
    np.testing.assert_allclose(objective(None, {"image": x0[:3]}, keys(8)[:3]), whole[:3], rtol=1e-6)
