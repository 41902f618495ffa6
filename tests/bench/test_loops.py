"""Products in loops are counted as often as they run: XLA's count of the same without a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.bench.loops import NO_PRODUCTS, products, uncounted
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.dit import dit
from diffjax.nn.registry import abstract_params

W, X = np.ones((5, 4, 4), np.float32), np.ones((3, 4), np.float32)
PRODUCT = 2 * 3 * 4 * 4  # FLOPs of one
IMAGE, KERNEL = np.ones((2, 6, 5, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)


def chain(x, ws, unroll=1):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, ws, unroll=unroll)[0]


def twice(x, ws):
    return jax.lax.scan(lambda x, _: (chain(x, ws), None), x, length=2)[0]


def convolved(x, kernel):
    def body(x, _):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes), None

    return jax.lax.scan(body, x, length=5)[0]


def counted(function, *arguments):
    """FLOPs by XLA."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("unroll", [1, 2, 3, 5, 9])
def test_a_loop_of_products(unroll):
    """Five run; XLA counts those of one round, and those after the last whole round."""

    def function(x, ws):
        return chain(x, ws, unroll)

    missing = uncounted(function, X, W)
    assert counted(function, X, W) + missing.flops == pytest.approx(5 * PRODUCT, rel=0.05)
    assert missing.bytes == missing.flops / PRODUCT * 4 * (3 * 4 + 4 * 4 + 3 * 4)


def test_loops_in_loops_and_what_runs_inside_them():
    """Also jitted, recomputed, and differentiated: the same as XLA counts without a loop."""

    def unrolled(x, ws):
        for w in [*ws, *ws]:
            x = x @ w
        return x

    x, ws = np.ones((32, 32), np.float32), np.ones((5, 32, 32), np.float32)
    assert uncounted(unrolled, x, ws) == NO_PRODUCTS
    assert products(unrolled, x, ws).flops == products(twice, x, ws).flops == 10 * 2 * 32**3
    for change in (jax.jit, jax.checkpoint, lambda f: jax.grad(lambda *a: f(*a).sum(), (0, 1))):
        expected, looped = counted(change(unrolled), x, ws), change(twice)
        assert counted(looped, x, ws) < 0.5 * expected
        total = counted(looped, x, ws) + uncounted(looped, x, ws).flops
        assert total == pytest.approx(expected, rel=0.05)


def test_convolutions():
    """Without the products of pixels beyond the edge, which XLA leaves out."""
    once = 2 * IMAGE.size * 9 * 4
    assert uncounted(convolved, IMAGE, KERNEL).flops == 4 * once
    assert counted(lambda x, k: convolved(x, k), IMAGE, KERNEL) <= 1.05 * once


def test_a_loop_that_is_counted_already():
    """Those of XLA times `loops` are all of the outer loop, and one round of each inner one."""
    assert uncounted(chain, X, W, loops=5) == NO_PRODUCTS
    assert uncounted(twice, X, W, loops=2).flops == 2 * 4 * PRODUCT
    shapes = jax.eval_shape(lambda: (jnp.asarray(X), jnp.asarray(W)))
    assert uncounted(twice, *shapes).flops == 9 * PRODUCT


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [("S", 2, 6.06), ("B", 4, 5.56), ("L", 2, 80.71), ("XL", 2, 118.64), ("XL", 8, 7.39)],
)
def test_a_network_of_a_paper(size, patch, expected):
    """The giga multiply-adds of arXiv:2212.09748, table 4, for a latent of 32x32x4."""
    labels, x_shape = ClassLabel(1000), (32, 32, 4)
    module = dit(size, patch, learned_variance=True).build(x_shape, labels)
    params = abstract_params(module, x_shape, labels)
    inputs = jnp.zeros((1, *x_shape)), jnp.zeros(1), labels.zeros(1)
    cost = products(lambda params, *x: module.apply({"params": params}, *x), params, *inputs)
    assert cost.flops / 2e9 == pytest.approx(expected, abs=0.02)
