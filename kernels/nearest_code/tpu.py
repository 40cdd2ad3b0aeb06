"""nearest_code for TPUs: products and running minimum in one kernel, and no N x K in memory.

The kernel gets the score |c|^2 / 2 - x . c from the matrix units alone, as one product of bfloat16
whose results are float32. A float32 is the sum of three bfloat16; of the nine products of such
parts the six that float32 can tell from zero are laid one after the other along the width, and so
is |c|^2 / 2 against rows of ones, wherever the width has room. A matrix unit takes a multiple of
128 rows of weights (256 on a v6e) in any case: at a width of 32 the six products cost two passes
(one) instead of six.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tpu
from kernels.dispatch import register
from kernels.nearest_code.halves import PAIRS, differentiable, is_half, split
from kernels.nearest_code.reference import squared_distance
from kernels.nearest_code.shortlist import CLASSES, nearest_of, shortlist_of
from kernels.operands import alike, result, up_to

__all__ = ["nearest_code", "shortlisted_code"]

_SUBLANES, _PACKED = CLASSES, 16  # of a register, and of one of bfloat16
# Vectors and codes of a block, by the rows of products: what the compiler fits into VMEM.
_BLOCKS = {256: (2048, 1024), 1024: (1024, 1024), 2048: (512, 512)}


def _refusal(x, codebook):
    return _reason(x, 1 if is_half(x, codebook) else len(PAIRS))


def _refusal_of_a_shortlist(x, codebook, *, shortlist):
    return _reason(x, 1)


def _reason(x, products):
    if not x.shape[0]:
        return "needs at least one vector"
    most = max(_BLOCKS) // products // _PACKED * _PACKED
    if x.shape[1] > most:
        return f"needs vectors of {x.dtype} of at most {most} values, not {x.shape[1]}"
    return None


@register("nearest_code", "tpu", default_on=("tpu",), only_on=("tpu",), refusal=_refusal)
@differentiable
def nearest_code(x, codebook):
    """See `kernels.nearest_code`."""
    index, score = _found(x, codebook, is_half(x, codebook))
    return index[0], squared_distance(x.astype(jnp.float32), score[0])


@register(
    "shortlisted_code",
    "tpu",
    default_on=("tpu",),
    only_on=("tpu",),
    refusal=_refusal_of_a_shortlist,
)
def shortlisted_code(x, codebook, *, shortlist):
    """See `kernels.nearest_code`: the candidates of all sublanes, by one product of bfloat16."""
    return nearest_of(_candidates, x, codebook, shortlist)


def _candidates(x, codebook, number):
    code, score = _found(x, codebook, half=True, each=True)
    return shortlist_of(score, code, number)


def _found(x, codebook, half, each=False):
    """Codes and scores [1, N], or [8, N] of each sublane; `half` is with one product alone."""
    (number, width), codes = x.shape, codebook.shape[0]
    dtype = jnp.bfloat16 if half else jnp.float32
    missing = up_to(width, _PACKED) - width
    rows = (width + missing) * (1 if half else len(PAIRS))
    size, block = next(blocks for most, blocks in _BLOCKS.items() if rows <= most)
    size, block = min(size, up_to(number, tpu.LANES)), min(block, up_to(codes, _PACKED))
    vectors = jnp.pad(x.astype(dtype).T, ((0, missing), (0, -number % size)))  # [D, N]
    table = jnp.pad(codebook.astype(dtype), ((0, -codes % block), (0, missing)))
    half_square = 0.5 * jnp.square(codebook.astype(jnp.float32)).sum(axis=1)
    half_square = jnp.pad(half_square, (0, -codes % block), constant_values=jnp.inf)
    parts = [-table] if half else [split(-table)[j] for _, j in PAIRS]
    folded = -rows % tpu.LANES >= _PACKED
    if folded:
        square = jnp.stack(split(half_square), axis=1)
        parts.append(jnp.pad(square, ((0, 0), (0, _PACKED - 3))))
    table = jnp.concatenate(parts, axis=1)  # [K, W]
    half_square = None if folded else half_square[:, None]
    index, score = _search(vectors, table, half_square, size=size, block=block, each=each)
    return index[:, :number], score[:, :number]


@functools.partial(jax.jit, static_argnames=("size", "block", "each"))
def _search(vectors, table, half_square, *, size, block, each):
    (width, number), (codes, rows) = vectors.shape, table.shape
    column = [] if half_square is None else [half_square]
    vectors, table, *column = alike(vectors, table, *column)
    found = CLASSES if each else 1
    row = pl.BlockSpec((found, size), lambda n, k: (0, n))
    return pl.pallas_call(
        functools.partial(_kernel, folded=half_square is None),
        out_shape=[
            result((found, number), jnp.int32, vectors),
            result((found, number), jnp.float32, vectors),
        ],
        grid=(number // size, codes // block),
        in_specs=[
            pl.BlockSpec((width, size), lambda n, k: (0, n)),
            pl.BlockSpec((block, rows), lambda n, k: (k, 0)),
            *(pl.BlockSpec((block, 1), lambda n, k: (k, 0)) for _ in column),
        ],
        out_specs=[row, row],
        scratch_shapes=[
            pltpu.VMEM((rows, size), jnp.bfloat16),
            pltpu.VMEM((_SUBLANES, size), jnp.float32),
            pltpu.VMEM((_SUBLANES, size), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="nearest_code",
    )(vectors, table, *column)


def _kernel(vectors, table, *rest, folded):
    """One block of codes against one of vectors; eight codes are candidates for each vector.

    Sublane s of `best` has the least score of the codes s, s + 8, s + 16, ... and `place` which of
    them that is.
    """
    half_square, (index, score, factors, best, place) = (
        (None, rest) if folded else (rest[0], rest[1:])
    )
    k, block = pl.program_id(1), table.shape[0]

    @pl.when(k == 0)
    def _():
        _store_factors(vectors, factors, folded)
        best[...] = jnp.full(best.shape, jnp.inf, best.dtype)
        place[...] = jnp.zeros(place.shape, place.dtype)

    scores = jnp.dot(table[...], factors[...], preferred_element_type=jnp.float32)
    if not folded:
        scores += half_square[...]
    least, where = best[...], place[...]
    for i in range(block // _SUBLANES):
        ours = scores[i * _SUBLANES : (i + 1) * _SUBLANES]
        better = ours < least
        least = jnp.where(better, ours, least)
        where = jnp.where(better, k * (block // _SUBLANES) + i, where)
    best[...], place[...] = least, where

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        code = place[...] * _SUBLANES + jax.lax.broadcasted_iota(jnp.int32, place.shape, 0)
        if index.shape == code.shape:
            index[...], score[...] = code, best[...]
            return
        least = best[...].min(axis=0, keepdims=True)
        last = jnp.int32(jnp.iinfo(jnp.int32).max)
        index[...] = jnp.where(best[...] == least, code, last).min(axis=0, keepdims=True)
        score[...] = least


def _store_factors(vectors, factors, folded):
    """The vectors as they meet the rows of the table: their parts, and ones."""
    width = vectors.shape[0]
    if vectors.dtype == jnp.bfloat16:
        factors[:width] = vectors[...]
    else:
        rest, parts = vectors[...], []
        for _ in range(3):
            parts.append(rest.astype(jnp.bfloat16))
            rest = rest - parts[-1].astype(jnp.float32)
        for row, (i, _) in enumerate(PAIRS):
            factors[row * width : (row + 1) * width] = parts[i]
    if folded:
        factors[-_PACKED:] = jnp.ones((_PACKED, factors.shape[1]), jnp.bfloat16)
