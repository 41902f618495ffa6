"""The products in loops that XLA leaves out of a program's cost.

XLA counts the body of a loop once, however often it runs. Nearly all FLOPs of a network are those
of its products of matrices and convolutions, whose shapes a traced program has.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Products(NamedTuple):
    """The cost of products of matrices and convolutions."""

    flops: float = 0.0
    bytes: float = 0.0  # of operands and results


NO_PRODUCTS = Products()


def products(function: Callable[..., Any], *arguments: Any) -> Products:
    """The cost of all products of a function.

    arguments: pytrees of arrays, or of their shapes.
    """
    return _total((runs, product) for runs, _, product in _trace(function, *arguments))


def uncounted(function: Callable[..., Any], *arguments: Any, loops: int = 1) -> Products:
    """The cost of a function's products that XLA's cost, times `loops`, does not have.

    arguments: pytrees of arrays, or of their shapes.
    """
    found = _trace(function, *arguments)
    return _total((runs - loops * counted, product) for runs, counted, product in found)


def _trace(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[int, int, Products]]:
    yield from _products(jax.make_jaxpr(function)(*arguments).jaxpr, 1, 1)


def _total(found: Iterable[tuple[int, Products]]) -> Products:
    pairs = list(found)
    return Products(
        sum(times * product.flops for times, product in pairs),
        sum(times * product.bytes for times, product in pairs),
    )


def _products(jaxpr: core.Jaxpr, runs: int, counted: int) -> Iterator[tuple[int, int, Products]]:
    """Each product, how often it runs, and how often XLA counts it."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            yield runs, counted, _matrices(equation)
        elif name == "conv_general_dilated":
            yield runs, counted, _convolution(equation)
        rounds = copies = 1
        if name == "scan":
            rounds, unroll = equation.params["length"], equation.params["unroll"]
            # As many rounds as are unrolled are a loop no more; others are written after it.
            copies = rounds if rounds <= unroll else unroll + rounds % unroll
        for inner in _inner(equation.params):
            yield from _products(inner, runs * rounds, counted * copies)


def _inner(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in jax.tree.leaves(parameters, is_leaf=_is_jaxpr):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def _matrices(equation: Any) -> Products:
    left, _ = equation.invars
    (contracting, _), _ = equation.params["dimension_numbers"]
    length = math.prod(left.aval.shape[axis] for axis in contracting)
    return Products(2.0 * length * equation.outvars[0].aval.size, _bytes(equation))


def _convolution(equation: Any) -> Products:
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return Products(2.0 * out.size * kernel.size / features, _bytes(equation))


def _bytes(equation: Any) -> float:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return float(sum(array.size * array.dtype.itemsize for array in arrays))
