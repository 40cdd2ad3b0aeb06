"""Choice of the next token for TPUs: logits stay on the chip, and nothing is sorted.

The head is read once, in tiles of the vocabulary, and the logits of a block of rows are kept in
VMEM. There every filter is a threshold that is found bit by bit, in counting passes, and the last
pass draws the Gumbel noise and takes the largest.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tpu
from kernels.dispatch import register
from kernels.operands import alike, result, up_to
from kernels.sample_token.passes import first_of_the_largest, scan
from kernels.threefry import gumbel_of

__all__ = ["sample_logits", "sample_token"]

_TILES = (1024, 512, 256, 128)  # tokens that are read at once: the most that are not too many
_ROWS = (128, 64, 32, 16, 8)  # of a block: the first that fits
_MEMORY = 64 << 20  # bytes of VMEM for logits, half of what a chip has
_TINY = jnp.iinfo(jnp.int32).min


def _rows(batch, vocabulary, top_p):
    """Rows of a block, or None where not even eight fit."""
    row = 4 * up_to(vocabulary, _tile(vocabulary)) * (1 if top_p == 1 else 2)
    able = [rows for rows in _ROWS if rows * row <= _MEMORY]
    return min(able[0], up_to(batch, _ROWS[-1])) if able else None


def _tile(vocabulary):
    return next(size for size in _TILES if size <= up_to(vocabulary, tpu.LANES))


def _is_transposed(depth, vocabulary):
    """Whether XLA keeps a head [D, V] by columns, since rows would be padded more."""
    by_rows = up_to(depth, 8) * up_to(vocabulary, tpu.LANES)
    return up_to(vocabulary, 8) * up_to(depth, tpu.LANES) < by_rows


def _refusal(logits, keys, *, temperature, top_p, **filters):
    if _rows(1, logits.shape[-1], top_p) is None:
        most = _MEMORY // 4 // _ROWS[-1] // (1 if top_p == 1 else 2)
        return f"has room for {most} tokens, not {logits.shape[-1]}"
    return None


def _refusal_with_head(hidden, head, keys, **choice):
    if head.dtype == jnp.float16:
        return "takes a head in float32 or bfloat16, not float16"
    return _refusal(head, keys, **choice)  # both are [.., V]


def _pays(rows, keys, *, temperature, top_k, top_p, min_p, vocabulary=None):
    """Whether XLA would sort or pass over all logits again and again, and rows fill registers.

    Elsewhere it is as fast by the count of cycles.
    """
    vocabulary = vocabulary or rows.shape[-1]
    filters = temperature > 0 and (0 < top_k < vocabulary or top_p < 1)
    return filters and rows.shape[0] >= _ROWS[-1]


def _pays_with_head(hidden, head, keys, **choice):
    return _pays(hidden, keys, **choice, vocabulary=head.shape[-1])


@register(
    "sample_logits",
    "tpu",
    default_on=("tpu",),
    default_when=_pays,
    only_on=("tpu",),
    refusal=_refusal,
)
def sample_logits(logits, keys, *, temperature, top_k, top_p, min_p):
    """See `kernels.sample_logits`."""
    return _choose(tpu.readable(logits), None, keys, temperature, top_k, top_p, min_p)


@register(
    "sample_token",
    "tpu",
    default_on=("tpu",),
    default_when=_pays_with_head,
    only_on=("tpu",),
    refusal=_refusal_with_head,
)
def sample_token(hidden, head, keys, *, temperature, top_k, top_p, min_p):
    """See `kernels.sample_token`."""
    return _choose(hidden.astype(head.dtype), head, keys, temperature, top_k, top_p, min_p)


def _choose(rows, head, keys, temperature, top_k, top_p, min_p):
    batch, vocabulary = rows.shape[0], (rows if head is None else head).shape[-1]
    token = _run(
        rows,
        head,
        jax.random.key_data(keys),
        size=_rows(batch, vocabulary, top_p),
        temperature=float(temperature),
        top_k=int(top_k) if top_k < vocabulary else 0,
        top_p=float(top_p),
        min_p=float(min_p),
    )
    return token[:batch, 0]


@functools.partial(jax.jit, static_argnames=("size", "temperature", "top_k", "top_p", "min_p"))
def _run(rows, head, keys, *, size, temperature, top_k, top_p, min_p):
    vocabulary = (rows if head is None else head).shape[-1]
    missing = ((0, -rows.shape[0] % size), (0, 0))
    rows, keys = jnp.pad(rows, missing), jnp.pad(keys, missing)
    tile = _tile(vocabulary)
    width = up_to(vocabulary, tile)
    if head is None:
        operands, specs = [rows], [pl.BlockSpec((size, tile), lambda r, v: (r, v))]
    else:
        operands, depth = [rows, head], head.shape[0]
        specs = [
            pl.BlockSpec((size, depth), lambda r, v: (r, 0)),
            pl.BlockSpec((depth, tile), lambda r, v: (0, v)),
        ]
        if _is_transposed(*head.shape):
            operands[1], specs[1] = head.T, pl.BlockSpec((tile, depth), lambda r, v: (v, 0))
    keys, *operands = alike(keys, *operands)
    scratch = [pltpu.VMEM((size, width), jnp.float32)] * (1 if top_p == 1 else 2)
    taken = sum(4 * size * width for _ in scratch)
    taken += sum(2 * math.prod(spec.block_shape) * 4 for spec in specs)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            has_head=head is not None,
            is_transposed=head is not None and _is_transposed(*head.shape),
            vocabulary=vocabulary,
            choose=functools.partial(
                _token, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            ),
            temperature=temperature,
        ),
        out_shape=result((rows.shape[0], 1), jnp.int32, keys),
        grid=(rows.shape[0] // size, width // tile),
        in_specs=[pl.BlockSpec((size, 2), lambda r, v: (r, 0)), *specs],
        out_specs=pl.BlockSpec((size, 1), lambda r, v: (r, 0)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=taken + (8 << 20)
        ),
        name="sample_token",
    )(keys, *operands)


def _kernel(keys, *refs, has_head, is_transposed, vocabulary, choose, temperature):
    """One tile of the vocabulary; after the last one a token for each row."""
    operands, (token, *scratch) = (refs[:2], refs[2:]) if has_head else (refs[:1], refs[1:])
    logits, v = scratch[0], pl.program_id(1)
    if has_head:
        rows, head = operands
        ours = jax.lax.dot_general(
            rows[...],
            head[...],
            (((1,), (1 if is_transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    else:
        ours = operands[0][...].astype(jnp.float32)
    if temperature > 0:
        ours = ours / temperature
    tile = ours.shape[1]
    first = pl.multiple_of(v * tile, tile)
    ids = first + jax.lax.broadcasted_iota(jnp.int32, ours.shape, 1)
    # The last tile reads beyond the vocabulary, where anything may be.
    logits[:, pl.ds(first, tile)] = jnp.where(ids < vocabulary, ours, -jnp.inf)

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        token[...] = choose(keys[...], *scratch)


def _token(keys, logits, weights=None, *, temperature, top_k, top_p, min_p):
    """[R, 1]: drawn from the logits [R, V], which are those over the temperature."""
    if temperature == 0:
        return _largest(logits, lambda x, ids: x)
    largest = _reduce(logits, jnp.maximum, -jnp.inf)
    # What is kept is what reaches an edge, and of those that are equal to it the first few.
    edge, last = jnp.full_like(largest, -jnp.inf), None
    if top_k:
        edge = _kth_largest(logits, top_k)
        last = _last_equal(logits, edge, top_k - _count(logits, lambda x, ids: x > edge))
    kept = functools.partial(_kept, edge=edge, last=last)
    if top_p < 1:
        edge = jnp.maximum(edge, _nucleus(logits, weights, kept, largest, top_p))
    if min_p > 0:
        edge = jnp.maximum(edge, largest + jnp.log(jnp.float32(min_p)))
    # An edge that was raised is above those that were equal to the first one, or is that one.
    kept = functools.partial(_kept, edge=edge, last=last, first_edge=kept.keywords["edge"])
    key = keys[:, :1], keys[:, 1:]

    def noisy(x, ids):
        return jnp.where(kept(x, ids), x + gumbel_of(key, ids), -jnp.inf)

    return _largest(logits, noisy)


def _kept(x, ids, edge, last, first_edge=None):
    """Which logits are kept: from the edge on, of those equal to the first one up to id `last`."""
    if last is None:
        return (x >= edge) & (x > -jnp.inf)
    first_edge = edge if first_edge is None else first_edge
    return (x >= edge) & (x > -jnp.inf) & ((x > first_edge) | (ids <= last))


def _reduce(x, join, start):
    lanes = jnp.full((x.shape[0], tpu.LANES), start, jnp.float32)
    lanes = scan(x, lanes, lambda carry, chunk, ids: join(carry, chunk))
    return lanes.max(axis=1, keepdims=True)


def _count(x, holds):
    """[R, 1]: of how many entries holds(x, ids) is true."""
    lanes = jnp.zeros((x.shape[0], tpu.LANES), jnp.int32)
    lanes = scan(x, lanes, lambda carry, x, ids: carry + holds(x, ids).astype(jnp.int32))
    return lanes.sum(axis=1, keepdims=True)


def _raised(bits, like, enough):
    """The largest int32 [R, 1] that is enough, of those that differ in these bits from `like`."""

    def raise_bit(i, value):
        higher = value + (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(enough(higher), higher, value)

    return jax.lax.fori_loop(0, bits, raise_bit, like)


def _kth_largest(x, k):
    """[R, 1]: a float of x that exactly k or, with equals, more entries reach."""

    def value(ordered):
        return jax.lax.bitcast_convert_type(
            jnp.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered), jnp.float32
        )

    least = jnp.full((x.shape[0], 1), _TINY, jnp.int32)
    ordered = _raised(32, least, lambda v: _count(x, lambda x, ids: x >= value(v)) >= k)
    # Below -inf are only the bits of NaN, with which nothing compares.
    return jnp.where(jnp.isnan(value(ordered)), -jnp.inf, value(ordered))


def _last_equal(x, edge, room):
    """[R, 1]: the id up to which entries equal to the edge are kept, `room` of them."""
    start = jnp.zeros_like(room)

    def few_enough(end):
        return _count(x, lambda x, ids: (x == edge) & (ids < end)) <= room

    def search():
        return _raised(x.shape[1].bit_length(), start, few_enough) - 1

    # Equals at the edge are rare: where there is room for all, nothing is searched.
    all_fit = jnp.all(few_enough(start + x.shape[1]))
    return jax.lax.cond(all_fit, lambda: start + x.shape[1], search)


def _nucleus(x, weights, kept, largest, mass):
    """[R, 1]: the smallest logit of the smallest set with this share of the kept mass."""

    lanes = jnp.zeros((x.shape[0], tpu.LANES), jnp.float32)

    def fill(i, total):
        first = pl.multiple_of(i * tpu.LANES, tpu.LANES)
        chunk = x[:, pl.ds(first, tpu.LANES)]
        ids = first + jax.lax.broadcasted_iota(jnp.int32, lanes.shape, 1)
        weight = jnp.where(kept(chunk, ids), jnp.exp(chunk - largest), 0)
        weights[:, pl.ds(first, tpu.LANES)] = weight
        return total + weight

    total = jax.lax.fori_loop(0, x.shape[1] // tpu.LANES, fill, lanes)
    wanted = mass * total.sum(axis=1, keepdims=True)

    def enough(bits):
        edge = jax.lax.bitcast_convert_type(bits, jnp.float32)
        reached = scan(weights, lanes, lambda t, w, ids: t + jnp.where(w >= edge, w, 0))
        return reached.sum(axis=1, keepdims=True) >= wanted

    least = _raised(30, jnp.zeros(wanted.shape, jnp.int32), enough)  # weights are at most 1
    edge = jax.lax.bitcast_convert_type(least, jnp.float32)

    def smallest(carry, chunk, ids):
        inside = kept(chunk, ids) & (jnp.exp(chunk - largest) >= edge)
        return jnp.minimum(carry, jnp.where(inside, chunk, jnp.inf))

    lanes = scan(x, jnp.full_like(lanes, jnp.inf), smallest)
    return lanes.min(axis=1, keepdims=True)


def _largest(x, score):
    """[R, 1]: the lowest id at which score(x, ids) is largest."""
    start = (
        jnp.full((x.shape[0], tpu.LANES), -jnp.inf),
        jnp.zeros((x.shape[0], tpu.LANES), jnp.int32),
    )

    def better(carry, chunk, ids):
        ours = score(chunk, ids)
        is_better = ours > carry[0]
        return jnp.where(is_better, ours, carry[0]), jnp.where(is_better, ids, carry[1])

    return first_of_the_largest(*scan(x, start, better))[0]
