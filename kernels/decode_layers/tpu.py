"""decode_layers for TPUs: one kernel, in which the memory of weights and caches is never idle.

A step of few rows takes as long as its weights and caches take to be read. Kernels that follow each
other wait for their own arguments first, and for their results last; here the copies of a layer are
begun, in the order of their use, when the layer before it begins, and the rows stay on the chip.
Attention is two products of all heads at once: each head is a row of queries, which are zero but in
the columns of the head, so that nothing is rearranged among registers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import div, rem  # unlike // and %, without a case for negative numbers

from kernels import tpu
from kernels.decode_attention.reference import MASKED, KVCache
from kernels.decode_attention.seen import seen
from kernels.decode_layers.reference import LayerVectors, normalise
from kernels.dispatch import platform, register
from kernels.operands import alike, result, up_to

__all__ = ["decode_layers"]

_ROWS = 8  # the attention of each of them is code of its own
_BLOCKS = (512, 256, 128)  # columns of a block: the first that divides the length of the caches
_PARTS = (4, 2, 1)  # of the last matrix; the work on the last part alone is not hidden by copies
_SUBLANES = 8  # of a register
_VMEM = 128 << 20  # bytes that a v5e and a v6e have
_SPARE = 16 << 20  # bytes of them for what the compiler puts there
_FIELDS = tuple(LayerVectors._fields)


def _refusal(x, weights, vectors, caches, column, first, *, heads, epsilon, window):
    batch, width = x.shape
    kinds = sorted({str(array.dtype) for array in jax.tree.leaves((x, weights, caches))})
    _, kv_heads, head_width, length = caches[0].keys.shape
    inner = weights[0].up.shape[1]
    if batch > _ROWS:
        return f"takes at most {_ROWS} rows, not {batch}"
    if kinds not in (["float32"], ["bfloat16"]):
        return f"takes all in float32 or all in bfloat16, not {' and '.join(kinds)}"
    if kv_heads != heads or heads * head_width != width:
        return f"needs heads that make up the width, not {kv_heads} of {head_width} for {heads}"
    if head_width % _SUBLANES:
        return f"needs heads of a multiple of {_SUBLANES}, not {head_width}"
    for what, size in (("width", width), ("inner width", inner), ("cache length", length)):
        if size % tpu.LANES:
            return f"needs a multiple of {tpu.LANES} as {what}, not {size}"
    needed = _bytes(_buffers(x, weights, vectors, caches, heads))
    room = _memory() - _SPARE
    if needed > room:
        return f"has room for {room >> 20} MB on the chip, and two layers need {needed >> 20}"
    return None


def _memory():
    """Bytes of VMEM of the TPU that is there, or of those that are not."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if platform() == "tpu" else _VMEM


class _Chip(NamedTuple):
    """What is in VMEM: two layers of all that is copied, and the values of the rows."""

    vectors: Any
    qkv: Any
    out: Any
    up: Any
    down: Any
    keys: Any  # [2, B, D, T]
    values: Any
    residual: Any
    projected: Any  # queries, keys and values of the new tokens
    scores: Any
    shares: Any
    attended: Any
    hidden: Any


def _buffers(x, weights, vectors, caches, heads):
    (batch, width), dtype = x.shape, x.dtype
    rows, heads = up_to(batch, _packed(dtype)), up_to(heads, _packed(dtype))
    length, inner = caches[0].keys.shape[-1], weights[0].up.shape[1]
    return _Chip(
        pltpu.VMEM((2, *vectors.shape[1:]), jnp.float32),
        *(pltpu.VMEM((2, *matrix.shape), dtype) for matrix in weights[0]),
        *[pltpu.VMEM((2, batch, width, length), dtype)] * 2,
        residual=pltpu.VMEM((rows, width), jnp.float32),
        projected=pltpu.VMEM((rows, 3 * width), jnp.float32),
        scores=pltpu.VMEM((heads, length), jnp.float32),
        shares=pltpu.VMEM((heads, length), dtype),
        attended=pltpu.VMEM((rows, width), jnp.float32),
        hidden=pltpu.VMEM((rows, inner), dtype),
    )


def _packed(dtype):
    """Rows of a register."""
    return 4 * _SUBLANES // jnp.dtype(dtype).itemsize


def _bytes(buffers):
    """All have whole registers."""
    return sum(math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize for buffer in buffers)


@register("decode_layers", "tpu", default_on=("tpu",), only_on=("tpu",), refusal=_refusal)
def decode_layers(x, weights, vectors, caches, column, first, *, heads, epsilon, window):
    """See `kernels.decode_layers`."""
    (batch, width), shape = x.shape, caches[0].keys.shape
    own, start = seen(column, first, window, batch, shape[-1])
    scalars = [own] if start is None else [own, start]
    # Columns are innermost in both, which is how XLA keeps them: nothing is moved.
    flat = batch, width, shape[-1]
    keys = [cache.keys.reshape(flat) for cache in caches]
    values = [cache.values.transpose(0, 1, 3, 2).reshape(flat) for cache in caches]
    buffers = _buffers(x, weights, vectors, caches, heads)
    out, *cached = _call(scalars, x, vectors, weights, keys, values, buffers, heads, epsilon)
    cached = [array.reshape(shape) for array in cached]
    grown = zip(cached[: len(keys)], cached[len(keys) :], strict=True)
    return out, tuple(KVCache(keys, values.transpose(0, 1, 3, 2)) for keys, values in grown)


def _call(scalars, x, vectors, weights, keys, values, buffers, heads, epsilon):
    operands = alike(*scalars, x, vectors, *jax.tree.leaves(weights), *keys, *values)
    number, cached = len(scalars), len(keys) + len(values)
    in_hbm, on_chip = (pl.BlockSpec(memory_space=space) for space in (pl.ANY, pltpu.VMEM))
    return pl.pallas_call(
        functools.partial(
            _kernel, layers=len(keys), ragged=number > 1, heads=heads, epsilon=epsilon
        ),
        out_shape=[result(a.shape, a.dtype, operands[0]) for a in (x, *operands[-cached:])],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=number,
            grid=(1,),
            in_specs=[on_chip, *[in_hbm] * (len(operands) - number - 1)],
            out_specs=[on_chip, *[in_hbm] * cached],
            scratch_shapes=[
                *buffers,
                pltpu.SemaphoreType.DMA((2, len(_Chip._fields) + _PARTS[0])),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={len(operands) - cached + i: 1 + i for i in range(cached)},
        # All of it: what XLA keeps there from step to step, it would copy to HBM and back.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_memory()
        ),
        name="decode_layers",
    )(*operands)


class _Copies:
    """The copies of a layer to one of two places on the chip, and back.

    To wait for one its size and semaphore matter, and not of which layer it is.
    """

    def __init__(self, owns, starts, sources, targets, chip, arrived, written):
        self.owns, self.starts, self.sources, self.targets = owns, starts, sources, targets
        self.chip, self.arrived, self.written = chip, arrived, written
        self.block = next(size for size in _BLOCKS if not chip.keys.shape[-1] % size)
        inner = chip.down.shape[1]
        parts = next(number for number in _PARTS if not inner % (number * tpu.LANES))
        self.parts = [pl.ds(part * (inner // parts), inner // parts) for part in range(parts)]

    def whole(self, name, slot, layer=0):
        """Of the vectors, or of a matrix."""
        semaphore = self.arrived.at[slot, _Chip._fields.index(name)]
        buffer = getattr(self.chip, name).at[slot]
        return pltpu.make_async_copy(self.sources[name][layer], buffer, semaphore)

    def part(self, number, slot, layer=0):
        """Of the last matrix."""
        semaphore = self.arrived.at[slot, len(_Chip._fields) + number]
        source, buffer = self.sources["down"][layer], self.chip.down.at[slot]
        rows = self.parts[number]
        return pltpu.make_async_copy(source.at[rows], buffer.at[rows], semaphore)

    def blocks(self, row):
        """The first block of columns that a row sees, and the one after the last."""
        start = 0 if self.starts is None else div(self.starts[row], self.block)
        return start, div(self.owns[row], self.block) + 1

    def columns(self, place):
        """Of a block."""
        return pl.ds(pl.multiple_of(place * self.block, self.block), self.block)

    def each_block(self, do, name, slot, layer=0):
        """Does something with the copy of each block of keys or of values."""
        buffer, source = getattr(self.chip, name).at[slot], self.sources[name][layer]
        semaphore = self.arrived.at[slot, _Chip._fields.index(name)]
        for row in range(buffer.shape[0]):

            @pl.loop(*self.blocks(row))
            def _(place, row=row):
                where = row, slice(None), self.columns(place)
                do(pltpu.make_async_copy(source.at[where], buffer.at[where], semaphore))

    def start(self, slot, layer):
        """Begins all copies of a layer in the order of their use."""
        self.whole("vectors", slot, layer).start()
        self.whole("qkv", slot, layer).start()
        self.each_block(lambda copy: copy.start(), "keys", slot, layer)
        self.each_block(lambda copy: copy.start(), "values", slot, layer)
        self.whole("out", slot, layer).start()
        self.whole("up", slot, layer).start()
        for number in range(len(self.parts)):
            self.part(number, slot, layer).start()

    def own(self, row):
        """Where the column of the new token is: the least that fills registers."""
        column = self.owns[row]
        start = pl.multiple_of(column - rem(column, tpu.LANES), tpu.LANES)
        return row, slice(None), pl.ds(start, tpu.LANES)

    def replaced(self, slot, layer=0):
        """The copies of these columns back to the caches."""
        return [
            pltpu.make_async_copy(
                getattr(self.chip, name).at[slot].at[self.own(row)],
                self.targets[name][layer].at[self.own(row)],
                self.written.at[i],
            )
            for i, name in enumerate(("keys", "values"))
            for row in range(self.chip.keys.shape[1])
        ]


def _kernel(owns, *refs, layers, ragged, heads, epsilon):
    """All layers, one after the other."""
    starts, refs = (refs[0], refs[1:]) if ragged else (None, refs)
    x, vectors, *refs = refs
    matrices, refs = refs[: 4 * layers], refs[4 * layers :]
    sources = {name: matrices[i::4] for i, name in enumerate(("qkv", "out", "up", "down"))}
    sources |= {"keys": refs[:layers], "values": refs[layers : 2 * layers]}
    sources["vectors"] = [vectors.at[layer] for layer in range(layers)]
    out, *refs = refs[2 * layers :]
    targets = {"keys": refs[:layers], "values": refs[layers : 2 * layers]}
    *buffers, arrived, written = refs[2 * layers :]
    chip = _Chip(*buffers)
    copies = _Copies(owns, starts, sources, targets, chip, arrived, written)

    copies.start(0, 0)
    chip.residual[...] = jnp.zeros(chip.residual.shape, jnp.float32)
    chip.residual[: x.shape[0]] = x[...].astype(jnp.float32)
    chip.attended[...] = jnp.zeros(chip.attended.shape, jnp.float32)

    @pl.loop(0, layers)
    def _(layer):
        slot = rem(layer, 2)

        @pl.when(layer > 0)
        def _():  # before what was written is replaced by the next layer
            for copy in copies.replaced(1 - slot):
                copy.wait()

        for following in range(1, layers):

            @pl.when(layer + 1 == following)
            def _(following=following):
                copies.start(1 - slot, following)

        _attend(copies, chip, layer, slot, layers, heads, epsilon)
        _feed_forward(copies, chip, slot, epsilon)

    for copy in copies.replaced((layers - 1) % 2):
        copy.wait()
    out[...] = chip.residual[: x.shape[0]].astype(out.dtype)


def _vector(chip, slot, name, size):
    place = _FIELDS.index(name)
    return chip.vectors[slot, place : place + 1, :size]


def _normalised(chip, slot, which, epsilon):
    width = chip.residual.shape[1]
    scale, bias = (_vector(chip, slot, f"{which}_{kind}", width) for kind in ("scale", "bias"))
    return normalise(chip.residual[...], scale, bias, epsilon).astype(chip.hidden.dtype)


def _product(x, matrix):
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


def _add(chip, rows):
    """To the residual stream, which is rounded to the type of the network."""
    dtype = chip.hidden.dtype
    total = chip.residual[...].astype(dtype) + rows.astype(dtype)
    chip.residual[...] = total.astype(jnp.float32)


def _attend(copies, chip, layer, slot, layers, heads, epsilon):
    """The first half of a layer."""
    width, dtype = chip.residual.shape[1], chip.hidden.dtype
    copies.whole("vectors", slot).wait()
    copies.whole("qkv", slot).wait()
    projected = _product(_normalised(chip, slot, "attention", epsilon), chip.qkv[slot])
    chip.projected[...] = projected + _vector(chip, slot, "qkv", 3 * width)
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, tpu.LANES), 1)
    for i, name in enumerate(("keys", "values"), start=1):
        copies.each_block(lambda copy: copy.wait(), name, slot)
        new = chip.projected[:, i * width : (i + 1) * width].T.astype(dtype)
        buffer = getattr(chip, name)
        for row in range(buffer.shape[1]):
            where = slot, *copies.own(row)
            is_own = lanes == rem(copies.owns[row], tpu.LANES)
            buffer[where] = jnp.where(is_own, new[:, row : row + 1], buffer[where])
    for this in range(layers):

        @pl.when(layer == this)
        def _(this=this):
            for copy in copies.replaced(slot, this):
                copy.start()

    for row in range(chip.keys.shape[1]):
        chip.attended[row : row + 1] = _attended(copies, chip, slot, row, heads)
    copies.whole("out", slot).wait()
    rows = _product(chip.attended[...].astype(dtype), chip.out[slot])
    _add(chip, rows + _vector(chip, slot, "out", width))


def _attended(copies, chip, slot, row, heads):
    """What a row attends to, [1, D]: the columns that it sees, a block after the other."""
    width, dtype = chip.residual.shape[1], chip.hidden.dtype
    shape = chip.scores.shape[0], width
    start = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * (width // heads)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - start
    of_head = (place >= 0) & (place < width // heads)
    q = chip.projected[row : row + 1, :width] * (width // heads) ** -0.5
    q = jnp.where(of_head, q, 0).astype(dtype)

    @pl.loop(*copies.blocks(row))
    def _(place):
        columns = copies.columns(place)
        chip.scores[:, columns] = _product(q, chip.keys[slot, row, :, columns])

    columns = jax.lax.broadcasted_iota(jnp.int32, chip.scores.shape, 1)
    seen = columns <= copies.owns[row]
    if copies.starts is not None:
        seen = seen & (columns >= copies.starts[row])
    scores = jnp.where(seen, chip.scores[...], MASKED)
    shares = jnp.where(seen, jnp.exp(scores - scores.max(axis=1, keepdims=True)), 0)
    chip.shares[...] = shares.astype(dtype)

    def add(place, total):
        columns = copies.columns(place)
        return total + jax.lax.dot_general(
            chip.shares[:, columns],
            chip.values[slot, row, :, columns],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    total = jax.lax.fori_loop(*copies.blocks(row), add, jnp.zeros(shape, jnp.float32))
    total = total / shares.sum(axis=1, keepdims=True)
    return jnp.where(of_head, total, 0).sum(axis=0, keepdims=True)


def _feed_forward(copies, chip, slot, epsilon):
    """The second half of a layer."""
    width, inner, dtype = chip.residual.shape[1], chip.hidden.shape[1], chip.hidden.dtype
    copies.whole("up", slot).wait()
    hidden = _product(_normalised(chip, slot, "feed_forward", epsilon), chip.up[slot])
    hidden = jax.nn.gelu(hidden + _vector(chip, slot, "up", inner), approximate=True)
    chip.hidden[...] = hidden.astype(dtype)
    rows = jnp.broadcast_to(_vector(chip, slot, "down", width), chip.residual.shape)
    for number, part in enumerate(copies.parts):
        copies.part(number, slot).wait()
        rows = rows + _product(chip.hidden[:, part], chip.down[slot, part])
    _add(chip, rows)
