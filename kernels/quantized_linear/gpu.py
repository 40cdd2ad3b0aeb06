"""quantized_linear for GPUs (Hopper): weights are copied as int8, and become bfloat16 on the chip.

A block of threads has 128 output channels, and the width passes by in chunks. One warpgroup copies
chunks of weights and of x to shared memory, as many ahead as there is room for; two others turn 64
channels each into bfloat16, which holds every int8, and multiply them with all rows of x (`wgmma`,
sums in float32). So the channels are the 64 rows that the matrix units want, which those of x, few
as they are, need not fill, and the result comes transposed. A float32 is the sum of three bfloat16,
which are multiplied one after the other. Channels that are too few for a GPU share the width among
several blocks of threads, whose sums XLA adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.dispatch import register
from kernels.gpu import mosaic as plgpu
from kernels.nearest_code.halves import split
from kernels.operands import alike, result, up_to

__all__ = ["quantized_linear"]

_ROWS, _GROUPS = 64, 2  # channels of a warpgroup, and warpgroups that multiply
_CHANNELS = _ROWS * _GROUPS
_CHUNK = 64  # of the width: a line of shared memory in bfloat16
_FEW = 8  # rows of x: a multiple
_MOST = 64  # of them at once
_SLOTS = 8  # chunks on the chip at once, at most
_SPARE = 4 << 10


def _refusal(x, weight, scale):
    if not x.shape[0] or not weight.size:
        return "needs at least one row, one channel and one weight of each"
    if x.shape[1] % _CHUNK:
        return f"needs a multiple of {_CHUNK} weights of a channel, not {x.shape[1]:,}"
    if x.shape[0] > _MOST:
        return f"takes at most {_MOST} rows, not {x.shape[0]:,}"
    return gpu.unfit()


def _slots(parts, rows):
    """How many chunks there is room for, beside the result."""
    room = gpu.ON_CHIP - _SPARE - _CHANNELS * (4 * rows + 2 * _CHUNK)
    return min(_SLOTS, room // (_CHUNK * (_CHANNELS + 2 * parts * rows)))


@register("quantized_linear", "gpu", only_on=("cuda",), refusal=_refusal)
def quantized_linear(x, weight, scale):
    """See `kernels.quantized_linear`."""
    (number, width), channels = x.shape, weight.shape[0]
    parts = [x] if x.dtype == jnp.bfloat16 else split(x.astype(jnp.float32))
    rows = up_to(number, _FEW)
    stacked = jnp.pad(jnp.stack(parts), ((0, 0), (0, rows - number), (0, 0)))
    weight = jnp.pad(weight, ((0, max(_CHANNELS - channels, 0)), (0, 0)))
    blocks, chunks = -(-channels // _CHANNELS), width // _CHUNK
    each = -(-chunks // max(1, gpu.PROCESSORS // blocks))
    sums = _product(
        stacked, weight, each=each, splits=-(-chunks // each), slots=_slots(len(parts), rows)
    ).sum(axis=0)
    # The last block has the last channels, of which the one before it has some as well.
    whole = (blocks - 1) * _CHANNELS
    last = sums[whole + (-channels % _CHANNELS if blocks > 1 else 0) :]
    sums = jnp.concatenate([sums[:whole], last])[:channels, :number]
    return sums.T * scale[None]


@functools.partial(jax.jit, static_argnames=("each", "splits", "slots"))
def _product(x, weight, *, each, splits, slots):
    x, weight = alike(x, weight)
    (parts, rows, width), channels = x.shape, weight.shape[0]
    blocks = -(-channels // _CHANNELS)
    return gpu.kernel(
        functools.partial(_kernel, chunks=width // _CHUNK, each=each),
        name="quantized_linear",
        out_type=result((splits, blocks * _CHANNELS, rows), jnp.float32, x),
        grid=(blocks, splits),
        grid_names=("block", "split"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((slots, _CHANNELS, _CHUNK), jnp.int8),
            plgpu.SMEM((slots, parts, rows, _CHUNK), jnp.bfloat16),
            plgpu.SMEM((_GROUPS, _ROWS, _CHUNK), jnp.bfloat16),
            plgpu.SMEM((_CHANNELS, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=slots),
        ],
    )(x, weight)


def _kernel(x, weight, out, weights, values, factors, sums, full, free, *, chunks, each):
    """Some chunks of one block of channels.

    `full` says that a slot has a chunk, and `free` that both groups are done with it.
    """
    slots = weights.shape[0]
    group, block, split_ = (jax.lax.axis_index(name) for name in ("group", "block", "split"))
    first = split_ * each
    steps = jnp.minimum(each, chunks - first)
    channel = jnp.minimum(block * _CHANNELS, weight.shape[0] - _CHANNELS)

    @pl.when(group == _GROUPS)
    def _():
        @pl.loop(0, steps)
        def _(step):
            slot = jax.lax.rem(step, slots)

            @pl.when(step >= slots)
            def _():
                plgpu.barrier_wait(free.at[slot])

            columns = pl.ds((first + step) * _CHUNK, _CHUNK)
            rows = pl.ds(channel, _CHANNELS)
            plgpu.copy_gmem_to_smem(weight.at[rows, columns], weights.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x.at[:, :, columns], values.at[slot], full.at[slot])

    @pl.when(group < _GROUPS)
    def _():
        rows = pl.ds(group * _ROWS, _ROWS)

        def multiply(total):
            @pl.loop(0, steps)
            def _(step):
                slot = jax.lax.rem(step, slots)
                plgpu.barrier_wait(full.at[slot])
                factors[group] = weights[slot, rows].astype(jnp.bfloat16)
                plgpu.commit_smem()
                for part in range(values.shape[1]):
                    ours = values.at[slot, part].transpose((1, 0))
                    plgpu.wgmma(total, factors.at[group], ours)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return total[...]

        sums[rows] = pl.run_scoped(multiply, plgpu.ACC((_ROWS, values.shape[2]), jnp.float32))
        plgpu.commit_smem()
        where = pl.ds(block * _CHANNELS + group * _ROWS, _ROWS)
        plgpu.copy_smem_to_gmem(sums.at[rows], out.at[split_, where])
        plgpu.wait_smem_to_gmem(0)
