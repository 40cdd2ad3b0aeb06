"""decode_attention for TPUs: one new token of each row, against the columns that it sees.

One kernel owns the cache: it reads blocks of keys and values that a row sees and no others, keeps
a running softmax (Milakov & Gimelshein 2018, 1805.02867), and writes the new key and value where
they were read. Columns are innermost in both, which is how XLA lays out both arrays; a register has
128 of them, so that the least that can be written is 128 columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import div, rem  # unlike // and %, without a case for negative numbers

from kernels import tpu
from kernels.decode_attention.reference import MASKED, KVCache
from kernels.decode_attention.seen import seen
from kernels.dispatch import register
from kernels.operands import alike, result

__all__ = ["decode_attention"]

_BLOCKS = (512, 256, 128)  # columns of a block: the first that divides the length of the cache
_MEMORY = 12 << 20  # bytes of VMEM for blocks


def _refusal(q, k, v, cache, column, first, *, window, causal):
    length = cache.keys.shape[-1]
    if q.shape[1] != 1:
        return f"takes one new token, not {q.shape[1]}"
    if cache.keys.dtype == jnp.float16:
        return "takes a cache in float32 or bfloat16, not float16"
    if length % tpu.LANES:
        return f"needs a cache length that is a multiple of {tpu.LANES}, not {length}"
    if not _block(cache):
        heads, width = cache.keys.shape[1:3]
        return f"has no room for {tpu.LANES} columns of {heads} heads of {width} {cache.keys.dtype}"
    return None


def _block(cache):
    _, heads, width, length = cache.keys.shape
    column = 4 * heads * width * cache.keys.dtype.itemsize  # keys and values, in two buffers
    able = [size for size in _BLOCKS if not length % size and size * column <= _MEMORY]
    return able[0] if able else None


@register("decode_attention", "tpu", default_on=("tpu",), only_on=("tpu",), refusal=_refusal)
def decode_attention(q, k, v, cache, column, first, *, window, causal):
    """See `kernels.decode_attention`."""
    del causal  # of one new token it says nothing
    batch, _, heads, width = q.shape
    kv_heads, length = cache.keys.shape[1], cache.keys.shape[-1]
    size = _block(cache)
    own, start = seen(column, first, window, batch, length)
    scalars = [own] if start is None else [own, start]
    out, keys, values = _attend(
        scalars,
        (q / width**0.5).astype(cache.keys.dtype).reshape(batch, kv_heads, -1, width),
        k[:, 0].transpose(0, 2, 1).astype(cache.keys.dtype),
        v[:, 0].transpose(0, 2, 1).astype(cache.values.dtype),
        cache.keys,
        cache.values.transpose(0, 1, 3, 2),
        size=size,
    )
    out = out.reshape(batch, 1, heads, width).astype(cache.values.dtype)
    return out, KVCache(keys, values.transpose(0, 1, 3, 2))


@functools.partial(jax.jit, static_argnames="size")  # traced once for all layers
def _attend(scalars, q, k, v, keys, values, *, size):
    batch, kv_heads, groups, width = q.shape
    new = pl.BlockSpec((1, width, kv_heads), lambda b, *_: (b, 0, 0))
    heads = pl.BlockSpec((1, kv_heads, groups, width), lambda b, *_: (b, 0, 0, 0))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    operands = alike(*scalars, q, k, v, keys, values)
    statistic = pltpu.VMEM((kv_heads, groups, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, size=size, ragged=len(scalars) > 1),
        out_shape=[
            result(q.shape, jnp.float32, operands[0]),
            result(keys.shape, keys.dtype, operands[0]),
            result(values.shape, values.dtype, operands[0]),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch,),
            in_specs=[heads, new, new, in_place, in_place],
            out_specs=[heads, in_place, in_place],
            scratch_shapes=[
                pltpu.VMEM((2, 2, kv_heads, width, size), keys.dtype),
                pltpu.VMEM((2, kv_heads, width, tpu.LANES), keys.dtype),
                statistic,
                statistic,
                pltpu.VMEM((kv_heads, groups, width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={len(scalars) + 3: 1, len(scalars) + 4: 2},
        # Rows follow each other: the first block of one is fetched during the last of the other.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="decode_attention",
    )(*operands)


def _kernel(owns, *refs, size, ragged):
    """All blocks of one row. The new token itself is not read from the cache.

    `blocks` has two buffers for keys and values each, of which `buffer` says which one is next.
    """
    starts, refs = (refs[0], refs[1:]) if ragged else (None, refs)
    q, k, v, keys, values, out, new_keys, new_values, *scratch = refs
    blocks, tiles, most, mass, total, buffer, arrived, written = scratch
    b, rows = pl.program_id(0), pl.num_programs(0)

    def first(row):
        return div(starts[row], size) if ragged else 0

    def fetched(row, place, slot):
        columns = pl.ds(pl.multiple_of(place * size, size), size)
        return [
            pltpu.make_async_copy(
                array.at[row, :, :, columns], blocks.at[slot, i], arrived.at[slot, i]
            )
            for i, array in enumerate((keys, values))
        ]

    def replaced(row):
        columns = pl.ds(pl.multiple_of(owns[row] - rem(owns[row], tpu.LANES), tpu.LANES), tpu.LANES)
        return [
            pltpu.make_async_copy(tiles.at[i], array.at[row, :, :, columns], written.at[i])
            for i, array in enumerate((new_keys, new_values))
        ]

    @pl.when(b == 0)
    def _():
        buffer[0] = 0
        for copy in fetched(0, first(0), 0):
            copy.start()

    new_k, new_v = k[0].astype(jnp.float32).T[:, None], v[0].astype(jnp.float32).T[:, None]
    most[...] = (q[0].astype(jnp.float32) * new_k).sum(-1, keepdims=True)
    mass[...] = jnp.ones(mass.shape, mass.dtype)
    total[...] = jnp.broadcast_to(new_v, total.shape)
    own, last = owns[b], div(owns[b], size)
    start = starts[b] if ragged else 0

    @pl.loop(first(b), last + 1)
    def _(place):
        slot = buffer[0]
        buffer[0] = 1 - slot
        ends = place == last

        @pl.when(~ends)
        def _():
            for copy in fetched(b, place + 1, 1 - slot):
                copy.start()

        @pl.when(ends & (b + 1 < rows))
        def _():
            for copy in fetched(b + 1, first(jnp.minimum(b + 1, rows - 1)), 1 - slot):
                copy.start()

        for copy in fetched(b, place, slot):
            copy.wait()
        _add_block(q[0], blocks.at[slot], most, mass, total, place * size, start, own)

    out[0] = total[...] / mass[...]

    @pl.when(b > 0)
    def _():
        for copy in replaced(b - 1):
            copy.wait()

    slot, lane = 1 - buffer[0], rem(own, tpu.LANES)
    columns = pl.ds(pl.multiple_of(rem(own, size) - lane, tpu.LANES), tpu.LANES)
    is_own = jax.lax.broadcasted_iota(jnp.int32, (1, tpu.LANES), 1) == lane
    for i, new in enumerate((k, v)):
        for head in range(tiles.shape[1]):
            tile = blocks[slot, i, head, :, columns]
            tiles[i, head] = jnp.where(is_own, new[0, :, head : head + 1], tile)
    for copy in replaced(b):
        copy.start()

    @pl.when(b + 1 == rows)
    def _():
        for copy in replaced(b):
            copy.wait()


def _add_block(q, block, most, mass, total, offset, start, own):
    """Adds the columns of a block that are seen to the running softmax."""
    keys, values = block[0], block[1]
    columns = offset + jax.lax.broadcasted_iota(jnp.int32, (1, 1, keys.shape[-1]), 2)
    seen = (columns < own) & (columns >= start)
    scores = jnp.einsum("kgd,kdt->kgt", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores, MASKED)
    before = most[...]
    now = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - now), 0)
    shrink = jnp.exp(before - now)
    most[...] = now
    mass[...] = shrink * mass[...] + weights.sum(axis=-1, keepdims=True)
    ours = jnp.einsum(
        "kgt,kdt->kgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    total[...] = shrink * total[...] + ours
