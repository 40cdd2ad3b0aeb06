"""conv_3x3 by Winograd's F(4 x 4, 3 x 3): 36 products for 16 outputs instead of 144.

Lavin & Gray 2016 (1509.09308): output tile = A' [ (G g G') * (B' d B) ] A for an input tile d of
6 x 6 pixels, summed over channels between the brackets: 36 matrix products [tiles, C] x
[C, Cout]. Exact in real arithmetic. In float32 it rounds about five times as much as the direct
sum (1e-6 of the size of the result), with the points 0, 3/4, -3/4, 3/2, -3/2 and infinity: with
0, 1, -1, 2, -2 of the paper it would be ten times. Maps whose sides are no multiples of 4 are
padded with zeros.

The transformed tiles are 2.25 times the size of the input. They pay only while they stay in the
cache, so a batch is worked through in slices of about 256 tiles. The transformed weights are
four times the size of the weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from kernels.dispatch import register
from kernels.typing import AnyArray

__all__ = ["conv_3x3", "pays_for", "transform_kernel"]

_P, _Q = 0.75, 1.5  # the points, and their negatives; their squares and products are exact
_P2, _Q2 = _P**2, _Q**2
_SIDE = 4  # of an output tile
_TILES = 256  # in a slice
_CHANNELS = 64  # fewest in and out for which it pays


def transform_kernel(kernel: Float[AnyArray, "3 3 C Cout"]) -> Float[Array, "36 C Cout"]:
    """The weights as the products read them, in the same dtype."""
    rows = jnp.stack(_weights(*kernel), axis=1)  # [3, 6, C, Cout]: columns, rows
    return jnp.stack(_weights(*rows)).reshape(36, *kernel.shape[2:])


def _weights(first, second, third):
    """G times three parts."""
    parts = [first / (_P2 * _Q2)]
    for point, divisor in ((_P, 2 * _P2 * (_P2 - _Q2)), (_Q, 2 * _Q2 * (_Q2 - _P2))):
        even, odd = (first + point**2 * third) / divisor, second * (point / divisor)
        parts += [even + odd, even - odd]
    return [*parts, third]


def _inputs(parts):
    """B' times six parts: the values at the points of a polynomial that has these coefficients."""
    a, b, c, d, e, f = parts
    even_p, odd_p = e - _Q2 * c, _P * (d - _Q2 * b)
    even_q, odd_q = e - _P2 * c, _Q * (d - _P2 * b)
    return [
        e - (_P2 + _Q2) * c + _P2 * _Q2 * a,
        even_p + odd_p,
        even_p - odd_p,
        even_q + odd_q,
        even_q - odd_q,
        f - (_P2 + _Q2) * d + _P2 * _Q2 * b,
    ]


def _outputs(parts):
    """A' times six parts."""
    a, b, c, d, e, f = parts
    even_p, odd_p, even_q, odd_q = b + c, b - c, d + e, d - e
    return [
        a + even_p + even_q,
        _P * odd_p + _Q * odd_q,
        _P2 * even_p + _Q2 * even_q,
        _P**3 * odd_p + _Q**3 * odd_q + f,
    ]


def pays_for(kernel_shape: tuple[int, ...], dtype) -> bool:
    """Whether it was measured to be faster than the direct sum on a CPU with these weights."""
    return dtype == jnp.float32 and min(kernel_shape[2:]) >= _CHANNELS


def _refusal(x, kernel, prepared):
    return None if x.dtype == jnp.float32 else f"needs float32, not {x.dtype}"


def _is_prepared(x, kernel, prepared):
    return prepared is not None


@register("conv_3x3", "winograd", default_on=("cpu",), default_when=_is_prepared, refusal=_refusal)
def conv_3x3(
    x: Float32[AnyArray, "B height width C"],
    kernel: Float[AnyArray, "3 3 C Cout"],
    prepared: Float32[AnyArray, "36 C Cout"] | None,
) -> Float32[Array, "B height width Cout"]:
    """See `kernels.conv_3x3`; it transforms the weights where they are not prepared."""
    if prepared is None:
        prepared = transform_kernel(kernel)
    batch, height, width, channels = x.shape
    tiles = -(-height // _SIDE) * -(-width // _SIDE)
    size = max(1, min(batch, _TILES // tiles))
    while batch % size:
        size -= 1
    if size == batch:
        return _slice(x, prepared)
    slices = x.reshape(batch // size, size, height, width, channels)
    y = jax.lax.map(lambda part: _slice(part, prepared), slices)
    return y.reshape(batch, height, width, -1)


def _slice(x, prepared):
    batch, height, width, channels = x.shape
    down, across = -(-height // _SIDE), -(-width // _SIDE)
    below, right = _SIDE * down - height, _SIDE * across - width
    padded = jnp.pad(x, ((0, 0), (1, 1 + below), (1, 1 + right), (0, 0)))
    # Rows, then columns: in one expression all of 36 would be computed anew for each of 36.
    rows = jnp.stack(_inputs([_every_fourth(padded, k, down, axis=1) for k in range(6)]))
    rows = jax.lax.optimization_barrier(rows)  # [6, B, height / 4, width, C]
    tiles = jnp.stack(_inputs([_every_fourth(rows, k, across, axis=3) for k in range(6)]))
    products = jnp.einsum("snc,scd->snd", tiles.reshape(36, -1, channels), prepared)
    products = products.reshape(6, 6, batch, down, across, -1)  # columns, rows
    columns = jnp.stack(_outputs(list(products)))
    columns = jax.lax.optimization_barrier(columns)  # [4, 6, B, height / 4, width / 4, Cout]
    y = jnp.stack(_outputs([columns[:, k] for k in range(6)]))  # [4, 4, ...]: row, column
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(batch, _SIDE * down, _SIDE * across, -1)
    return y[:, :height, :width]


def _every_fourth(x, first, number, axis):
    stop = first + _SIDE * (number - 1) + 1
    return jax.lax.slice_in_dim(x, first, stop, _SIDE, axis)
