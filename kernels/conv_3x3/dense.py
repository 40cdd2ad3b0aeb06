"""conv_3x3 of maps of at most 2 x 2 positions: one product with every pair of positions.

On such a map every output reads every input, so the convolution is a matrix [positions x C,
positions x Cout] whose blocks are the taps of the kernel. The CPU backend leaves maps of this size
to a loop without vectors: a step of training spent a third of its time there.
"""

import jax.numpy as jnp

from kernels.dispatch import register

__all__ = ["conv_3x3"]

_SIDE = 2  # the largest at which all taps of a position are inside
_FLOATS = 131_072  # of C x Cout, above which the matrix is not worth building for a single map


def _refusal(x, kernel, prepared):
    if max(x.shape[1:3]) > _SIDE:
        return f"needs maps of at most {_SIDE} x {_SIDE}, not {x.shape[1]} x {x.shape[2]}"
    return None


def _pays(x, kernel, prepared):
    batch, height, width, channels = x.shape
    return batch > 1 or height * width == 1 or channels * kernel.shape[3] <= _FLOATS


@register("conv_3x3", "dense", default_on=("cpu",), default_when=_pays, refusal=_refusal)
def conv_3x3(x, kernel, prepared):
    """See `kernels.conv_3x3`; it reads the weights as they are."""
    del prepared
    batch, height, width, channels = x.shape
    taps = [
        kernel[1 - i : 1 - i + height, 1 - j : 1 - j + width]
        for i in range(height)
        for j in range(width)
    ]  # for each output, the weights [height, width, C, Cout] of all inputs
    matrix = jnp.concatenate(taps, axis=-1).reshape(height * width * channels, -1)
    return (x.reshape(batch, -1) @ matrix).reshape(batch, height, width, -1)
