"""group_norm_silu for GPUs (Hopper): features are read once and written once, and its gradient.

A block of threads has some whole groups of channels of one sample, with all their positions, in
shared memory: statistics, deviations from the mean and the result are three passes there. Each of
four warpgroups goes through a quarter of the positions, so many at a time that the channel of a
register is always the same; what is summed is summed in place, and over the threads once at the
end. The gradient has the features and the cotangents on the chip, and computes the statistics anew.

The gradient is a rule of reverse mode. For forward mode (`jax.jvp`) force the reference.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.dispatch import register
from kernels.gpu import mosaic as plgpu
from kernels.operands import alike, result

__all__ = ["group_norm_silu"]

_GROUPS = 4  # warpgroups
_TRIP = 512  # values of a trip: four of a thread
_THREADS = 128  # of a warpgroup
_COPIED = 16  # bytes: rows that are copied are multiples of so many ...
_LARGEST = 256  # ... and of at most so many values
_SECTOR, _LINE = 32, 64  # bytes of memory that are read at once, at least and with little loss
_SPARE = 4 << 10  # bytes on the chip for barriers, and for what warpgroups tell each other


class _Slab(NamedTuple):
    """What a block of threads has: so many channels of `trips` times `rows` positions."""

    channels: int
    trips: int
    rows: int


def _slab(batch, positions, channels, groups, size):
    """The slab for values of this size in bytes; None where none fits."""
    wanted = _LINE if batch * channels * size >= 2 * gpu.PROCESSORS * _LINE else _SECTOR
    found, each = None, channels // groups
    for number in (n for n in range(1, groups + 1) if groups % n == 0):
        width = number * each
        if width * size % _COPIED or width > _LARGEST:
            continue
        trip = _TRIP if positions * width >= _GROUPS * _TRIP else _THREADS
        rows = trip // math.gcd(trip, width)
        slab = _Slab(width, -(-positions // rows), rows)
        sums = 2 * _GROUPS * rows * width * 4
        fits = 2 * slab.trips * rows * width * size + sums + _SPARE <= gpu.ON_CHIP
        if not fits or max(slab.trips, rows) > _LARGEST:
            break
        found = slab
        if width * size >= wanted:
            break
    return found


def _slab_of(x, groups):
    positions = math.prod(x.shape[1:-1])
    return _slab(len(x), positions, x.shape[-1], groups, x.dtype.itemsize)


def _refusal(x, scale, bias, *, groups, epsilon, silu):
    if not x.size:
        return "needs at least one value"
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"needs float32, bfloat16 or float16, not {x.dtype}"
    channels, size = x.shape[-1], x.dtype.itemsize
    if channels * size % _COPIED:
        return f"needs channels of a multiple of {_COPIED} bytes, not {channels * size}"
    if _slab_of(x, groups) is None:
        return (
            f"has no room for {math.prod(x.shape[1:-1]):,} positions of {channels // groups} "
            f"channels of {x.dtype}, and as many cotangents"
        )
    return gpu.unfit()


@register("group_norm_silu", "gpu", only_on=("cuda",), refusal=_refusal)
def group_norm_silu(x, scale, bias, *, groups, epsilon, silu):
    """See `kernels.group_norm_silu`."""
    return _normalised(x, scale, bias, (int(groups), float(epsilon), bool(silu)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x, scale, bias, options):
    slab = _slab_of(x, options[0])
    (y,) = _run([_tiled(x, slab)], _patterns(scale, bias, slab), slab, x[0].size, options)
    return _untiled(y, x)


def _forward(x, scale, bias, options):
    return _normalised(x, scale, bias, options), (x, scale, bias)


def _backward(options, saved, cotangent):
    x, scale, bias = saved
    slab = _slab_of(x, options[0])
    tiled = [_tiled(array, slab) for array in (x, cotangent)]
    by_x, sums = _run(tiled, _patterns(scale, bias, slab), slab, x[0].size, options)
    by_bias, by_scale = sums.sum(axis=(0, 3)).swapaxes(0, 1).reshape(2, -1)
    return _untiled(by_x, x), by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


_normalised.defvjp(_forward, _backward)


def _tiled(x, slab):
    """[B, trips, rows, C], with zeros where there are no positions."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, -1, channels)
    x = jnp.pad(x, ((0, 0), (0, slab.trips * slab.rows - x.shape[1]), (0, 0)))
    return x.reshape(batch, slab.trips, slab.rows, channels)


def _untiled(y, x):
    positions = math.prod(x.shape[1:-1])
    return y.reshape(len(x), -1, x.shape[-1])[:, :positions].reshape(x.shape)


def _patterns(scale, bias, slab):
    """[2, C / channels, rows, channels]: scale and bias as the registers of a trip have them."""
    both = jnp.stack([scale, bias]).astype(jnp.float32)
    both = both.reshape(2, -1, 1, slab.channels)
    return jnp.broadcast_to(both, (*both.shape[:2], slab.rows, slab.channels))


@functools.partial(jax.jit, static_argnames=("slab", "values", "options"))
def _run(arrays, patterns, slab, values, options):
    """[y] of features, or [gradient, sums] of features and cotangents.

    Args:
      arrays: [features] or [features, cotangents], each [B, trips, rows, C].
      patterns: of scale and bias.
      slab: of a block of threads.
      values: of a sample.
      options: groups, epsilon, silu.
    """
    patterns, *arrays = alike(patterns, *arrays)
    batch, *_, channels = arrays[0].shape
    groups, epsilon, silu = options
    slabs, inside = channels // slab.channels, slab.channels * groups // channels
    shape, dtype = (slab.trips, slab.rows, slab.channels), arrays[0].dtype
    out_type = [result(arrays[0].shape, dtype, arrays[0])]
    scratch = [plgpu.SMEM(shape, dtype) for _ in arrays]
    backward = len(arrays) == 2
    if backward:
        sums = batch, slabs, 2, *shape[1:]
        out_type.append(result(sums, jnp.float32, arrays[0]))
        scratch.append(plgpu.SMEM((2, _GROUPS, *shape[1:]), jnp.float32))
    options = {"inside": inside, "epsilon": epsilon, "silu": silu, "values": values // groups}
    return gpu.kernel(
        functools.partial(_gradient_kernel if backward else _kernel, **options),
        name="group_norm_silu_gradient" if backward else "group_norm_silu",
        out_type=out_type,
        grid=(batch, slabs),
        grid_names=("row", "slab"),
        num_threads=_GROUPS,
        thread_name="group",
        scratch_types=[
            *scratch,
            plgpu.SMEM((4 * inside * _GROUPS,), jnp.float32),
            plgpu.Barrier(num_arrivals=len(arrays)),
            plgpu.Barrier(num_arrivals=_GROUPS),
        ],
    )(*arrays, patterns)


class _Block:
    """The slab of this block of threads, of which this warpgroup has every fourth trip.

    Args:
      patterns: of scale and bias, in memory.
      features: [trips, rows, channels], on the chip.
      told: float32, what the warpgroups tell each other: once for each sum over groups.
      meeting: the barrier at which all warpgroups meet.
      inside: how many groups of channels the slab has.
      values: how many values a group has.
    """

    def __init__(self, patterns, features, told, meeting, inside, values):
        self.row, self.slab = jax.lax.axis_index("row"), jax.lax.axis_index("slab")
        self.group = jax.lax.axis_index("group")
        self.features, self.told, self.meeting = features, told, meeting
        self.inside, self.values, self.shape = inside, values, features.shape[1:]
        self.scale, self.bias = patterns[0, self.slab], patterns[1, self.slab]
        channel = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        self.group_of = jax.lax.div(channel, jnp.int32(self.shape[1] // inside))
        self.sums = 0

    def place(self, array):
        """The slab, in an array in memory."""
        channels = self.shape[1]
        return array.at[self.row, :, :, pl.ds(self.slab * channels, channels)]

    def load(self, arrays, slots, arrived):
        """Copies the slab of each array, and waits for all."""

        @pl.when(self.group == 0)
        def _():
            for array, slot in zip(arrays, slots, strict=True):
                plgpu.copy_gmem_to_smem(self.place(array), slot, arrived)

        plgpu.barrier_wait(arrived)

    def store(self, slot, array):
        """Copies what all warpgroups have written."""
        plgpu.commit_smem()
        self.meet()

        @pl.when(self.group == 0)
        def _():
            plgpu.copy_smem_to_gmem(slot, self.place(array))
            plgpu.wait_smem_to_gmem(0)

    def meet(self):
        """Waits until all warpgroups are here."""
        plgpu.barrier_arrive(self.meeting)
        plgpu.barrier_wait(self.meeting)

    def fold(self, start, step):
        """Carries a tree through step(carry, trip, features), over the trips of this group."""
        number = self.features.shape[0]

        def trip(i, carry):
            at = self.group + i * _GROUPS
            return step(carry, at, self.features[at].astype(jnp.float32))

        trips = jax.lax.div(number - self.group + _GROUPS - 1, _GROUPS)
        return jax.lax.fori_loop(0, trips, trip, start)

    def zeros(self):
        """An array of one trip."""
        return jnp.zeros(self.shape, jnp.float32)

    def is_there(self, at):
        """Which values of a trip are of a position that there is; None where all are."""
        count, (rows, channels) = self.values * self.inside // self.shape[1], self.shape
        if count % rows == 0:
            return None
        return at * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, channels), 0) < count

    def means(self, *own):
        """Of arrays of sums, one for each warpgroup: the mean of each group, at all its channels.

        What was written to the chip before is seen by all warpgroups afterwards.
        """
        first = [(self.sums + i) * self.inside * _GROUPS for i in range(len(own))]
        self.sums += len(own)

        @pl.loop(0, self.inside)
        def _(group):
            for start, sums in zip(first, own, strict=True):
                total = jnp.sum(jnp.where(self.group_of == group, sums, 0))
                self.told[start + group * _GROUPS + self.group] = total

        self.meet()

        def add(group, means):
            found = []
            for start, mean in zip(first, means, strict=True):
                place = start + group * _GROUPS
                total = sum(self.told[place + i] for i in range(_GROUPS))
                found.append(jnp.where(self.group_of == group, total / self.values, mean))
            return tuple(found)

        return jax.lax.fori_loop(0, self.inside, add, tuple(self.zeros() for _ in own))

    def statistics(self, epsilon):
        """Mean and 1 / deviation of each group, at all its channels."""
        (mean,) = self.means(self.fold(self.zeros(), lambda total, _, x: total + x))

        def add(total, at, x):
            square, is_there = jnp.square(x - mean), self.is_there(at)
            return total + (square if is_there is None else jnp.where(is_there, square, 0))

        (variance,) = self.means(self.fold(self.zeros(), add))
        return mean, jax.lax.rsqrt(variance + epsilon)


def _kernel(x, patterns, y, features, told, arrived, meeting, *, inside, values, epsilon, silu):
    """One slab; the result takes the place of the features."""
    block = _Block(patterns, features, told, meeting, inside, values)
    block.load([x], [features], arrived)
    mean, factor = block.statistics(epsilon)
    gain = factor * block.scale
    shift = block.bias - mean * gain

    def write(_, at, x):
        out = x * gain + shift
        if silu:
            out = out * jax.lax.logistic(out)
        features[at] = out.astype(features.dtype)

    block.fold(None, write)
    block.store(features, y)


def _gradient_kernel(x, cotangent, patterns, by_x, sums, *scratch, inside, values, epsilon, silu):
    """One slab; the gradient by x takes the place of the features."""
    features, changes, parts, told, arrived, meeting = scratch
    block = _Block(patterns, features, told, meeting, inside, values)
    block.load([x, cotangent], [features, changes], arrived)
    mean, factor = block.statistics(epsilon)

    def normalised(at, x):
        """The features after GroupNorm without scale and bias, and the cotangents with both."""
        own = (x - mean) * factor
        change = changes[at].astype(jnp.float32)
        if silu:
            z = own * block.scale + block.bias
            gate = jax.lax.logistic(z)
            change = change * gate * (1 + z * (1 - gate))
        return own, change

    def add(totals, at, x):
        own, change = normalised(at, x)
        return [total + part for total, part in zip(totals, (change, change * own), strict=True)]

    by_bias, by_scale = block.fold([block.zeros(), block.zeros()], add)
    parts[0, block.group], parts[1, block.group] = by_bias, by_scale
    level, slope = block.means(block.scale * by_bias, block.scale * by_scale)

    @pl.when(block.group == 0)
    def _():
        for i in range(2):
            sums[block.row, block.slab, i] = sum(parts[i, group] for group in range(_GROUPS))

    def write(_, at, x):
        own, change = normalised(at, x)
        out = factor * (block.scale * change - level - own * slope)
        features[at] = out.astype(features.dtype)

    block.fold(None, write)
    block.store(features, by_x)
