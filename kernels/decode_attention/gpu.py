"""decode_attention for GPUs (Hopper): one new token of each row, against the columns that it sees.

A block of threads has one head of keys and values, and some of the blocks of columns that its row
sees (split over the prefix, Dao et al. 2023, Flash-Decoding). One warpgroup copies blocks to
shared memory, as many ahead as there is room for, and another one keeps a running softmax. The
query heads that share the keys fill a part of the 64 rows that the matrix units want; what is in
the others does not matter, and costs nothing while the copies take longer. The new key and value
are written by XLA, in place, before.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.decode_attention.reference import write
from kernels.decode_attention.seen import seen
from kernels.dispatch import register
from kernels.gpu import mosaic as plgpu
from kernels.operands import alike, result, up_to

__all__ = ["decode_attention"]

_ROWS = 64  # of an operand of the matrix units
_FEW = 8  # rows of which queries and results are copied: a multiple
_LINE = 64  # values of bfloat16 in a line of shared memory
_BLOCKS = (128, 64)  # columns of a block: the first that divides the length of the cache
_SLOTS = 4  # blocks on the chip at once, at most
_SPARE = 4 << 10
_LOG2_E = math.log2(math.e)


def _refusal(q, k, v, cache, column, first, *, window, causal):
    _, kv_heads, width, length = cache.keys.shape
    if q.shape[1] != 1:
        return f"takes one new token, not {q.shape[1]}"
    if cache.keys.dtype != jnp.bfloat16:
        return f"takes a cache in bfloat16, not {cache.keys.dtype}"
    if width % _LINE:
        return f"needs heads of a multiple of {_LINE}, not {width}"
    if q.shape[2] // kv_heads > _ROWS:
        return f"takes at most {_ROWS} query heads for one of keys, not {q.shape[2] // kv_heads}"
    if length % _BLOCKS[-1]:
        return f"needs a cache length that is a multiple of {_BLOCKS[-1]}, not {length}"
    if _slots(cache) < 2:
        return f"has no room for heads of {width}"
    return gpu.unfit()


def _block(length):
    return next(size for size in _BLOCKS if not length % size)


def _slots(cache):
    """How many blocks of keys and values there is room for, beside rows of queries."""
    _, _, width, length = cache.keys.shape
    size = _block(length)
    room = gpu.ON_CHIP - _SPARE - _ROWS * ((2 + 4) * width + 2 * size)
    return min(_SLOTS, room // (2 * 2 * width * size))


@register("decode_attention", "gpu", only_on=("cuda",), refusal=_refusal)
def decode_attention(q, k, v, cache, column, first, *, window, causal):
    """See `kernels.decode_attention`."""
    del causal  # of one new token it says nothing
    batch, _, heads, width = q.shape
    kv_heads, length = cache.keys.shape[1], cache.keys.shape[-1]
    cache = write(cache, k, v, column)
    own, start = seen(column, first, window, batch, length)
    start = jnp.zeros_like(own) if start is None else start
    q = (q[:, 0] / width**0.5).astype(cache.keys.dtype).reshape(batch, kv_heads, -1, width)
    group = q.shape[2]
    splits = max(1, min(gpu.PROCESSORS // (batch * kv_heads), length // _block(length)))
    out, most, mass = _attend(
        jnp.pad(q, ((0, 0), (0, 0), (0, up_to(group, _FEW) - group), (0, 0))),
        cache.keys,
        cache.values,
        jnp.stack([start, own], axis=1),
        slots=_slots(cache),
        splits=splits,
    )
    # A split that sees nothing has the weight 2^-inf = 0.
    weight = jnp.exp2(most - most.max(axis=2, keepdims=True))[..., :group]
    out = jnp.einsum("bksg,bksgd->bkgd", weight, out[..., :group, :])
    out = out / (weight * mass[..., :group]).sum(axis=2)[..., None]
    return out.reshape(batch, 1, heads, width).astype(cache.values.dtype), cache


@functools.partial(jax.jit, static_argnames=("slots", "splits"))  # traced once for all layers
def _attend(q, keys, values, bounds, *, slots, splits):
    q, keys, values, bounds = alike(q, keys, values, bounds)
    batch, heads, rows, width = q.shape
    size = _block(keys.shape[-1])
    statistic = result((batch, heads, splits, rows), jnp.float32, q)
    return gpu.kernel(
        functools.partial(_kernel, splits=splits),
        name="decode_attention",
        out_type=(result((*statistic.shape, width), jnp.float32, q), statistic, statistic),
        grid=(batch, heads, splits),
        grid_names=("row", "head", "split"),
        num_threads=2,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((_ROWS, width), jnp.bfloat16),
            plgpu.SMEM((slots, width, size), jnp.bfloat16),
            plgpu.SMEM((slots, size, width), jnp.bfloat16),
            plgpu.SMEM((_ROWS, size), jnp.bfloat16),
            plgpu.SMEM((_ROWS, width), jnp.float32),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
        ],
    )(q, keys, values, bounds)


def _kernel(q, keys, values, bounds, out, most, mass, *scratch, splits):
    """The blocks of one split. `full` says that a slot has a block, and `free` that it is read."""
    queries, key_slots, value_slots, weights, out_s, most_s, mass_s, arrived, full, free = scratch
    slots, width, size = key_slots.shape
    some = pl.ds(0, q.shape[2])  # rows that have a query
    b, head, split = (jax.lax.axis_index(name) for name in ("row", "head", "split"))
    start, own = bounds[b, 0], bounds[b, 1]
    first, end = jax.lax.div(start, size), jax.lax.div(own, size) + 1
    share = jax.lax.div(end - first + splits - 1, splits)
    first = first + split * share
    blocks = jnp.clip(end - first, 0, share)

    def fetch(i, slot):
        columns = pl.ds((first + i) * size, size)
        plgpu.copy_gmem_to_smem(keys.at[b, head, :, columns], key_slots.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(values.at[b, head, columns], value_slots.at[slot], full.at[slot])

    @pl.when(jax.lax.axis_index("group") == 1)
    def _():
        plgpu.copy_gmem_to_smem(q.at[b, head], queries.at[some], arrived)

        @pl.loop(0, blocks)
        def _(i):
            slot = jax.lax.rem(i, slots)

            @pl.when(i >= slots)
            def _():
                plgpu.barrier_wait(free.at[slot])

            fetch(i, slot)

    @pl.when(jax.lax.axis_index("group") == 0)
    def _():
        plgpu.barrier_wait(arrived)

        def add(i, carry):
            slot = jax.lax.rem(i, slots)
            plgpu.barrier_wait(full.at[slot])
            block = queries, key_slots.at[slot], value_slots.at[slot], weights
            carry = _add_block(*block, (first + i) * size, start, own, carry)
            plgpu.barrier_arrive(free.at[slot])
            return carry

        none = jnp.full((_ROWS,), -jnp.inf, jnp.float32), jnp.zeros((_ROWS,), jnp.float32)
        carry = *none, jnp.zeros((_ROWS, width), jnp.float32)
        most_s[...], mass_s[...], out_s[...] = jax.lax.fori_loop(0, blocks, add, carry)
        plgpu.commit_smem()
        for ours, result_ in ((most_s, most), (mass_s, mass), (out_s, out)):
            plgpu.copy_smem_to_gmem(ours.at[some], result_.at[b, head, split])
        plgpu.wait_smem_to_gmem(0)


def _add_block(queries, keys, values, weights_s, offset, start, own, carry):
    """Adds the columns of a block that are seen to the running softmax, in powers of two."""
    most, mass, total = carry
    shape = queries.shape[0], keys.shape[1]

    def product(one, other, shape):
        def multiply(sums):
            plgpu.wgmma(sums, one, other)
            return sums[...]  # waits for it

        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    scores = product(queries, keys, shape) * _LOG2_E
    columns = offset + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    scores = jnp.where((columns <= own) & (columns >= start), scores, -jnp.inf)
    now = jnp.maximum(most, jnp.max(scores, axis=1))  # finite: every block has one that is seen
    shrink = jnp.exp2(most - now)
    weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(now, shape, (0,)))
    mass = mass * shrink + jnp.sum(weights, axis=1)
    weights_s[...] = weights.astype(values.dtype)
    plgpu.commit_smem()
    ours = product(weights_s, values, total.shape)
    return now, mass, total * jax.lax.broadcast_in_dim(shrink, total.shape, (0,)) + ours
