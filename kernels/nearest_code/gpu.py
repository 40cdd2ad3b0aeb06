"""nearest_code for GPUs (Hopper): products and running minimum in one kernel, and no N x K.

A block of threads has 128 vectors, and the codes pass by in tiles. One warpgroup copies tiles to
shared memory, as many ahead as there is room for; two others multiply 64 vectors each with a tile
(`wgmma` of bfloat16, sums in float32) and keep the least score of every column of tiles. So one of
them compares while the other one has the matrix units. A float32 is the sum of three bfloat16, and
of the nine products of such parts the six that float32 can tell from zero are added up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.dispatch import register
from kernels.gpu import mosaic as plgpu
from kernels.nearest_code.halves import PAIRS, differentiable, is_half, split
from kernels.nearest_code.reference import squared_distance
from kernels.operands import alike, result, up_to

__all__ = ["nearest_code"]

_ROWS, _GROUPS = 64, 2  # vectors of a warpgroup, and warpgroups that multiply
_TILE = 64  # codes of a tile: with more registers spill where vectors are wide
_SLOTS = 8  # tiles on the chip at once, at most
_LARGEST = 1 << 24  # an index goes through float32
_SPARE = 4 << 10  # bytes on the chip for barriers, results and halves of squares


def _chunk(width):
    """Values that are copied at once: the swizzle of shared memory has lines of 32 or 64."""
    return min((64, 32), key=lambda chunk: up_to(width, chunk))


def _slots(width, parts):
    """How many tiles there is room for."""
    chunk = _chunk(width)
    vectors = 2 * parts * _GROUPS * _ROWS * up_to(width, chunk)
    tile = 2 * parts * _TILE * chunk + 4 * _TILE
    return min(_SLOTS, (gpu.ON_CHIP - _SPARE - vectors) // tile)


def _refusal(x, codebook):
    if not x.shape[0]:
        return "needs at least one vector"
    if _slots(x.shape[1], _parts(x, codebook)) < 2:
        return f"has no room for vectors of {x.shape[1]} values of {x.dtype}"
    if codebook.shape[0] > _LARGEST:
        return f"takes at most {_LARGEST:,} codes, not {codebook.shape[0]:,}"
    return gpu.unfit()


def _parts(x, codebook):
    return 1 if is_half(x, codebook) else 3


@register("nearest_code", "gpu", only_on=("cuda",), refusal=_refusal)
@differentiable
def nearest_code(x, codebook):
    """See `kernels.nearest_code`."""
    (number, width), codes = x.shape, codebook.shape[0]
    size = _GROUPS * _ROWS
    half_square = 0.5 * jnp.square(codebook.astype(jnp.float32)).sum(axis=1)
    # Blocks of vectors that are too few for a GPU share the codes among several blocks of threads.
    tiles = -(-codes // _TILE)
    each = -(-tiles // max(1, gpu.PROCESSORS // -(-number // size)))
    splits = -(-tiles // each)
    missing = _TILE * splits * each - codes
    index, score = _search(
        _prepared(x, codebook, x, -number % size),
        _prepared(x, codebook, codebook, missing),
        jnp.pad(half_square, (0, missing), constant_values=jnp.inf),
        slots=_slots(width, _parts(x, codebook)),
        splits=splits,
    )
    best = jnp.argmin(score, axis=0)[None]  # the first of equals, whose codes come first
    index, score = (jnp.take_along_axis(a, best, axis=0)[0, :number] for a in (index, score))
    return index, squared_distance(x.astype(jnp.float32), score)


def _prepared(x, codebook, rows, missing):
    """[P, R, D]: the parts of the rows, padded to whole blocks."""
    parts = [rows] if is_half(x, codebook) else split(rows.astype(jnp.float32))
    width = rows.shape[1]
    missing = (0, 0), (0, missing), (0, up_to(width, _chunk(width)) - width)
    return jnp.pad(jnp.stack(parts), missing)


@functools.partial(jax.jit, static_argnames=("slots", "splits"))
def _search(vectors, table, half_square, *, slots, splits):
    vectors, table, half_square = alike(vectors, table, half_square)
    (parts, number, width), codes = vectors.shape, table.shape[1]
    chunk, size = _chunk(width), _GROUPS * _ROWS
    shape = splits, number
    return gpu.kernel(
        functools.partial(_kernel, tiles=codes // _TILE // splits),
        name="nearest_code",
        out_type=(result(shape, jnp.int32, vectors), result(shape, jnp.float32, vectors)),
        grid=(number // size, splits),
        grid_names=("block", "split"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((width // chunk, parts, size, chunk), jnp.bfloat16),
            plgpu.SMEM((slots, parts, _TILE, chunk), jnp.bfloat16),
            plgpu.SMEM((slots, _TILE), jnp.float32),
            plgpu.SMEM((size,), jnp.int32),
            plgpu.SMEM((size,), jnp.float32),
            plgpu.Barrier(num_arrivals=width // chunk),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=slots),
        ],
    )(vectors, table, half_square)


def _kernel(vectors, table, half_square, index, score, *scratch, tiles):
    """One block of vectors against some of the tiles of codes.

    `full` says that a slot has a chunk of a tile, and `free` that both groups are done with it.
    """
    ours, slots, halves, best_index, best_score, arrived, full, free = scratch
    chunks, (number, _, _, chunk) = ours.shape[0], slots.shape
    group, first = jax.lax.axis_index("group"), jax.lax.axis_index("split") * tiles
    start, steps = jax.lax.axis_index("block") * _GROUPS * _ROWS, tiles * chunks

    def fetch(step, slot):
        codes = pl.ds((first + jax.lax.div(step, chunks)) * _TILE, _TILE)
        columns = pl.ds(jax.lax.rem(step, chunks) * chunk, chunk)
        plgpu.copy_gmem_to_smem(table.at[:, codes, columns], slots.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(half_square.at[codes], halves.at[slot], full.at[slot])

    @pl.when(group == _GROUPS)
    def _():
        for i in range(chunks):
            place = vectors.at[:, pl.ds(start, _GROUPS * _ROWS), pl.ds(i * chunk, chunk)]
            plgpu.copy_gmem_to_smem(place, ours.at[i], arrived)
        for step in range(min(number, steps)):
            fetch(jnp.int32(step), step)

        @pl.loop(0, max(steps - number, 0))
        def _(step):
            slot = jax.lax.rem(step, number)
            plgpu.barrier_wait(free.at[slot])
            fetch(step + number, slot)

    @pl.when(group < _GROUPS)
    def _():
        rows = pl.ds(group * _ROWS, _ROWS)
        plgpu.barrier_wait(arrived)
        search = functools.partial(_compare, ours, rows, slots, halves, full, free)
        shape = _ROWS, _TILE
        start_ = jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
        least, place = jax.lax.fori_loop(0, tiles, search, start_)
        best_index[rows], best_score[rows] = _first_of_the_least(least, first + place)
        plgpu.commit_smem()
        for own, out in ((best_index, index), (best_score, score)):
            where = pl.ds(start + group * _ROWS, _ROWS)
            plgpu.copy_smem_to_gmem(own.at[rows], out.at[jax.lax.axis_index("split"), where])
        plgpu.wait_smem_to_gmem(0)


def _compare(ours, rows, slots, halves, full, free, tile, carry):
    """The least scores [R, T] of all tiles so far, and which tiles they are of."""
    chunks, number = ours.shape[0], slots.shape[0]

    def slot_of(i):
        return jax.lax.rem(tile * chunks + i, number)

    def multiply_chunk(sums, i):
        slot = slot_of(i)
        plgpu.barrier_wait(full.at[slot])
        for one, other in PAIRS if slots.shape[1] > 1 else ((0, 0),):
            codes = slots.at[slot, other].transpose((1, 0))
            plgpu.wgmma(sums, ours.at[i, one, rows], codes)
        return slot

    def multiply(sums):
        @pl.loop(0, chunks - 1)
        def _(i):
            slot = multiply_chunk(sums, i)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])

        multiply_chunk(sums, chunks - 1)
        return sums[...]  # waits for all products

    product = pl.run_scoped(multiply, plgpu.ACC((_ROWS, _TILE), jnp.float32))
    last = slot_of(chunks - 1)
    half_square = halves[last]
    plgpu.barrier_arrive(free.at[last])
    scores = jax.lax.broadcast_in_dim(half_square, product.shape, (1,)) - product
    least, place = carry
    better = scores < least
    return jnp.where(better, scores, least), jnp.where(better, tile, place)


def _first_of_the_least(least, tile):
    """Codes int32 [R] and scores [R], from one candidate for each place in a tile."""
    score = -jnp.max(-least, axis=1)
    code = tile * _TILE + jax.lax.broadcasted_iota(jnp.int32, least.shape, 1)
    is_best = least == jax.lax.broadcast_in_dim(score, least.shape, (0,))
    negative = jnp.where(is_best, -code.astype(jnp.float32), -2.0 * _LARGEST)
    return (-jnp.max(negative, axis=1)).astype(jnp.int32), score
