"""Operations of a program, counted where it is traced: nothing is compiled or run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend

__all__ = ["count"]


def count(f: Callable[..., Any], *arguments: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions of f(*arguments).

    A fused multiply-add is two. What is done for each element is left out: it is bound by memory. A
    loop of a known number of turns counts as often, any other loop counts once, and of branches
    the most expensive one counts.

    Args:
      f: traced by `jax.make_jaxpr`.
      *arguments: arrays, or their shapes and dtypes.
    """
    return _of_jaxpr(jax.make_jaxpr(f)(*arguments).jaxpr)


def _of_jaxpr(jaxpr):
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * terms * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inside(parameters.values())]
    if name == "cond":
        return max(inner)
    return parameters.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _of_convolution(equation):
    """Products with padding are counted, those with the zeros of a dilated input are not."""
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    window = math.prod(kernel[axis] for axis in numbers.rhs_spec[2:])
    features = kernel[numbers.rhs_spec[1]]  # of a group
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2 * window * features * equation.outvars[0].aval.size // zeros


def _inside(parameters):
    """The programs within an equation: bodies of loops, branches, called functions."""
    for parameter in parameters:
        items = parameter if isinstance(parameter, tuple | list) else (parameter,)
        for item in items:
            if isinstance(item, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                yield getattr(item, "jaxpr", item)  # one class from jax 0.12 on
