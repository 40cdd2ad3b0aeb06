"""Operations of a program, counted where it is traced: nothing is compiled or run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend

__all__ = ["cost", "count", "occurrences", "peak_memory"]


def count(f: Callable[..., Any], *arguments: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions of f(*arguments).

    A fused multiply-add is two. What is done for each element is left out: it is bound by memory. A
    loop of a known number of turns counts as often, any other loop counts once, and of branches
    the most expensive one counts.

    Args:
      f: traced by `jax.make_jaxpr`.
      *arguments: arrays, or their shapes and dtypes.
    """
    return _of_jaxpr(_of_product, jax.make_jaxpr(f)(*arguments).jaxpr)


def occurrences(primitive: str, f: Callable[..., Any], *arguments: Any) -> int:
    """How often f(*arguments) runs a primitive of this name; loops and branches as in `count`."""

    def of_equation(equation):
        return 1 if equation.primitive.name == primitive else None

    return _of_jaxpr(of_equation, jax.make_jaxpr(f)(*arguments).jaxpr)


def cost(program: Any) -> dict[str, float]:
    """What XLA says that a compiled program costs: its "operations", and "bytes" moved.

    Of branches the most expensive one counts, and of loops one turn.
    """
    analysis = program.cost_analysis() or {}
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return {
        "operations": analysis.get("flops", 0.0),
        "bytes": analysis.get("bytes accessed", 0.0),
    }


def peak_memory(program: Any) -> int:
    """Bytes that a compiled program needs on a device: arguments, results and what is between."""
    memory = program.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _of_jaxpr(of_equation, jaxpr):
    return sum(_of_program(of_equation, equation) for equation in jaxpr.eqns)


def _of_program(of_equation, equation):
    """The value of an equation, or of the programs within it where it has none itself."""
    value = of_equation(equation)
    if value is not None:
        return value
    name, parameters = equation.primitive.name, equation.params
    inner = [_of_jaxpr(of_equation, jaxpr) for jaxpr in _inside(parameters.values())]
    if name == "cond":
        return max(inner)
    return parameters.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _of_product(equation):
    """Operations of a matrix product or a convolution; None of anything else."""
    if equation.primitive.name == "conv_general_dilated":
        return _of_convolution(equation)
    if equation.primitive.name != "dot_general":
        return None
    (contracted, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * terms * equation.outvars[0].aval.size


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
