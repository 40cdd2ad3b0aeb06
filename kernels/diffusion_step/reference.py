"""The specification of diffusion_step in plain jax.numpy."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from kernels.dispatch import register
from kernels.threefry import normal_each
from kernels.typing import AnyArray, Scalar

__all__ = ["StepCoefficients", "diffusion_step"]

_Coefficient = Scalar | Float[AnyArray, "..."]


class StepCoefficients(NamedTuple):
    """Coefficients of one step; each a scalar, or an array that broadcasts against the sample."""

    x0_x: _Coefficient
    x0_output: _Coefficient
    next_x0: _Coefficient
    next_x: _Coefficient
    next_output: _Coefficient
    next_history: _Coefficient
    next_noise: _Coefficient


@register("diffusion_step", "reference")
def diffusion_step(x, output, coefficients, *, keys, history, clip):
    """See `kernels.diffusion_step`."""
    c = coefficients
    x0 = c.x0_x * x + c.x0_output * output
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
    following = c.next_x0 * x0 + c.next_x * x + c.next_output * output
    if history is not None:
        following += c.next_history * history
    if keys is not None:
        following += c.next_noise * normal_each(keys, x.shape[1:])
    return following, x0
