"""nearest_code over blocks of vectors and of codes, whose scores fit in a core's caches.

The whole score comes from one product: |c|^2 / 2 is one more column of the codes, against a column
of ones. A block is searched in two passes that compilers vectorise, the least score and then the
first place where it stands: an arg-min with its pairs of value and index is not vectorised on CPUs,
nor is a minimum along the last axis, or of integers. So vectors are the last axis, and places are
float32. The least scores of the blocks before are carried along.
"""

import jax
import jax.numpy as jnp

from kernels.dispatch import EVERYWHERE, register
from kernels.nearest_code.reference import squared_distance

__all__ = ["nearest_code"]

_VECTORS, _CODES = 1024, 2048  # in a block: eight megabytes of scores
_FEW = 1 << 19  # scores that are found at once


def _needs_blocks(x, codebook):
    return x.shape[0] * codebook.shape[0] > _FEW


@register("nearest_code", "blocks", default_on=EVERYWHERE, default_when=_needs_blocks)
def nearest_code(x, codebook):
    """See `kernels.nearest_code`."""
    x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
    number = x.shape[0]
    half_square = 0.5 * jnp.square(codebook).sum(axis=1, keepdims=True)
    table = jnp.concatenate([-codebook, half_square], axis=1)  # [K, D + 1]
    rows = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    size = min(number, _VECTORS)
    rows = jnp.pad(rows, ((0, -number % size), (0, 0))).reshape(-1, size, rows.shape[1])
    least, index = jax.lax.map(lambda block: _search(block, table), rows.swapaxes(1, 2))
    return index.reshape(-1)[:number], squared_distance(x, least.reshape(-1)[:number])


def _search(columns, table):
    """Of one block of vectors [D + 1, N]: blocks of codes in turn, whose last may be shorter."""
    number, size = table.shape[0], min(table.shape[0], _CODES)
    best = jnp.full_like(columns[0], jnp.inf), jnp.zeros_like(columns[0], jnp.int32)

    def block(i, best):
        codes = jax.lax.dynamic_slice_in_dim(table, i * size, size)
        return _better(best, columns, codes, i * size)

    whole = number // size
    best = jax.lax.fori_loop(0, whole, block, best)
    if number % size:
        best = _better(best, columns, table[whole * size :], whole * size)
    return best


def _better(best, columns, codes, first):
    """(least score, its index) after the codes first, first + 1, ..."""
    scores = jnp.matmul(codes, columns, precision=jax.lax.Precision.HIGHEST)
    least = scores.min(axis=0)
    places = jnp.arange(codes.shape[0], dtype=jnp.float32)[:, None]
    place = jnp.where(scores == least[None], places, codes.shape[0]).min(axis=0)
    better = least < best[0]
    index = first + place.astype(jnp.int32)
    return jnp.where(better, least, best[0]), jnp.where(better, index, best[1])
