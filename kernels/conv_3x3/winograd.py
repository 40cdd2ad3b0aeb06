"""conv_3x3 by Winograd's F(2 x 2, 3 x 3): 16 products for 4 outputs instead of 36.

Lavin & Gray 2016 (1509.09308): output tile = A' [ (G g G') * (B' d B) ] A for an input tile d of
4 x 4 pixels, summed over channels between the brackets: 16 matrix products [tiles, C] x
[C, Cout].
Exact in real arithmetic; in float32 it rounds about as the direct sum does.

The transformed tiles are four times the size of the input. They pay only while they stay in the
cache, so a batch is worked through in slices of about 256 tiles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from kernels.dispatch import register
from kernels.typing import AnyArray

__all__ = ["conv_3x3", "pays_for", "transform_kernel"]

# The matrices B' [4, 4] and A' [2, 4] of section 4.1; G is in `_rows`.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

_TILES = 256  # in a slice
_CHANNELS = 128  # fewest in and out for which it pays


def transform_kernel(kernel: Float[AnyArray, "3 3 C Cout"]) -> Float[Array, "16 C Cout"]:
    """The weights as the products read them, in the same dtype."""
    entries = [entry for row in _rows(list(kernel)) for entry in _rows(list(row))]
    return jnp.stack(entries)


def _rows(parts):
    """G times three parts."""
    first, second, third = parts
    outer = 0.5 * (first + third)
    return [first, outer + 0.5 * second, outer - 0.5 * second, third]


def pays_for(kernel_shape: tuple[int, ...], dtype) -> bool:
    """Whether it was measured to be faster than the direct sum on a CPU with these weights."""
    return dtype == jnp.float32 and min(kernel_shape[2:]) >= _CHANNELS


def _refusal(x, kernel, prepared):
    if x.dtype != jnp.float32:
        return f"needs float32, not {x.dtype}"
    if x.shape[1] % 2 or x.shape[2] % 2:
        return f"needs even height and width, not {x.shape[1]} x {x.shape[2]}"
    return None


def _is_prepared(x, kernel, prepared):
    return prepared is not None


@register("conv_3x3", "winograd", default_on=("cpu",), default_when=_is_prepared, refusal=_refusal)
def conv_3x3(
    x: Float32[AnyArray, "B height width C"],
    kernel: Float[AnyArray, "3 3 C Cout"],
    prepared: Float32[AnyArray, "16 C Cout"] | None,
) -> Float32[Array, "B height width Cout"]:
    """See `kernels.conv_3x3`; it transforms the weights where they are not prepared."""
    if prepared is None:
        prepared = transform_kernel(kernel)
    batch, height, width, channels = x.shape
    size = max(1, min(batch, _TILES * 4 // (height * width)))
    while batch % size:
        size -= 1
    if size == batch:
        return _slice(x, prepared)
    slices = x.reshape(batch // size, size, height, width, channels)
    y = jax.lax.map(lambda part: _slice(part, prepared), slices)
    return y.reshape(batch, height, width, -1)


def _slice(x, prepared):
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _combine(_INPUT, [padded[:, k : k + height - 1 : 2] for k in range(4)])
    tiles = [
        tile
        for row in rows
        for tile in _combine(_INPUT, [row[:, :, k : k + width - 1 : 2] for k in range(4)])
    ]  # 16 of [B, height / 2, width / 2, C]
    stacked = jnp.stack([tile.reshape(-1, channels) for tile in tiles])
    products = jnp.einsum("snc,scd->snd", stacked, prepared)
    products = products.reshape(4, 4, batch, height // 2, width // 2, -1)
    rows = _combine(_OUTPUT, list(products))
    outputs = [jnp.stack(_combine(_OUTPUT, list(row)), axis=3) for row in rows]
    return jnp.stack(outputs, axis=2).reshape(batch, height, width, -1)


def _combine(matrix, parts):
    """Rows of `matrix`, whose entries are 0, 1 and -1, times `parts`; no multiplications."""
    combined = []
    for row in matrix:
        terms = [
            part if entry > 0 else -part for entry, part in zip(row, parts, strict=True) if entry
        ]
        combined.append(sum(terms[1:], terms[0]))
    return combined
