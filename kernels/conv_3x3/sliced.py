"""conv_3x3 whose gradient by the weights is summed over slices of the batch, as matrix products.

The compiler's own gradient is a convolution with batch and channels exchanged. For that the CPU
backend transposes features and cotangents, and computes whatever produced them once more, out of
order, inside of the transposition: in a training step this took three times as long as the forward
convolution. Here the gradient of one slice is three products [C, positions] x [positions, 3 Cout],
and a slice is as large as the cache likes. The convolution itself is the reference's.

The gradient is a rule of reverse mode. For forward mode (`jax.jvp`) force the reference.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.conv_3x3.reference import conv_3x3 as convolve
from kernels.dispatch import register

__all__ = ["conv_3x3"]

_FLOATS = 131_072  # of features in a slice: half a megabyte


def _refusal(x, kernel, prepared):
    return None if x.dtype == jnp.float32 else f"needs float32, not {x.dtype}"


def _is_not_prepared(x, kernel, prepared):
    return prepared is None


@register(
    "conv_3x3", "sliced", default_on=("cpu",), default_when=_is_not_prepared, refusal=_refusal
)
def conv_3x3(x, kernel, prepared):
    """See `kernels.conv_3x3`; it reads the weights as they are."""
    del prepared
    return _conv_3x3(x, kernel)


@jax.custom_vjp
def _conv_3x3(x, kernel):
    return convolve(x, kernel, None)


def _forward(x, kernel):
    return convolve(x, kernel, None), (x, kernel)


def _backward(saved, cotangent):
    x, kernel = saved
    by_x = convolve(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), None)
    return by_x, _by_kernel(x, cotangent)


_conv_3x3.defvjp(_forward, _backward)


def _by_kernel(x, cotangent):
    """The gradient [3, 3, C, Cout], summed over slices of the batch."""
    batch, height, width, channels = x.shape
    size = max(1, min(batch, _FLOATS // (height * width * channels)))
    while batch % size:
        size -= 1
    if size == batch:
        return _slice_gradient(x, cotangent)

    def slice_gradient(i):
        part = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
        return _slice_gradient(part(x, i * size), part(cotangent, i * size))

    def add(i, total):
        return total + slice_gradient(i)

    return jax.lax.fori_loop(1, batch // size, add, slice_gradient(0))


def _slice_gradient(x, cotangent):
    """Of one slice: products of the features with the cotangents of the neighbours of a pixel."""
    height, width, channels = x.shape[1:]
    padded = jnp.pad(cotangent, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.concatenate([padded[:, :, j : j + width] for j in (2, 1, 0)], axis=-1)
    products = [
        jnp.einsum(
            "nc,nd->cd",
            x.reshape(-1, channels),
            rows[:, i : i + height].reshape(-1, rows.shape[-1]),
        )
        for i in (2, 1, 0)
    ]
    return jnp.stack(products).reshape(3, channels, 3, -1).swapaxes(1, 2)
