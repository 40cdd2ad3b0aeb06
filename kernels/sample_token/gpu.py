"""Choice of the next token for GPUs (Hopper): a row of logits stays on the chip, unsorted.

A block of threads has one row in shared memory, of which each of its four warpgroups goes through
a quarter. The k-th largest logit is found bit by bit, in counting passes that end as soon as k
logits are left, and so is the edge of the nucleus. Noise is drawn where something is kept alone.
The product with the head is the one of XLA.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.dispatch import register
from kernels.gpu import mosaic as plgpu
from kernels.operands import alike, result, up_to
from kernels.sample_token.reference import vocabulary_product
from kernels.threefry import gumbel_of

__all__ = ["sample_logits", "sample_token"]

_GROUPS = 4
_SPARE = 2 << 10  # bytes on the chip for what the groups tell each other
_LINE = 128  # logits that are loaded at once: one for each thread of a group
_CHUNK = 512  # logits of one trip, where there are many
_TINY = jnp.iinfo(jnp.int32).min
_INFINITY = float("inf")


def _refusal(logits, keys, **choice):
    most = (gpu.ON_CHIP - _SPARE) // 4 // (_GROUPS * _CHUNK) * _GROUPS * _CHUNK
    if logits.shape[-1] > most:
        return f"has room for {most:,} tokens, not {logits.shape[-1]:,}"
    return gpu.unfit()


def _refusal_with_head(hidden, head, keys, **choice):
    return _refusal(head, keys, **choice)  # both are [.., V]


@register("sample_logits", "gpu", only_on=("cuda",), refusal=_refusal)
def sample_logits(logits, keys, *, temperature, top_k, top_p, min_p):
    """See `kernels.sample_logits`."""
    vocabulary = logits.shape[1]
    logits = logits.astype(jnp.float32)
    missing = max(_LINE - vocabulary, 0)
    return _choose(
        jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf),
        jax.random.key_data(keys),
        temperature=float(temperature),
        top_k=int(top_k) if top_k < vocabulary else 0,
        top_p=float(top_p),
        min_p=float(min_p),
    )


@register("sample_token", "gpu", only_on=("cuda",), refusal=_refusal_with_head)
def sample_token(hidden, head, keys, **choice):
    """See `kernels.sample_token`."""
    return sample_logits(vocabulary_product(hidden, head), keys, **choice)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "min_p"))
def _choose(logits, keys, **choice):
    logits, keys = alike(logits, keys)
    batch, vocabulary = logits.shape
    size = _CHUNK if vocabulary > _GROUPS * _CHUNK else _LINE
    return gpu.kernel(
        functools.partial(_kernel, size=size, **choice),
        name="sample_logits",
        out_type=result((batch,), jnp.int32, logits),
        grid=(batch,),
        grid_names=("row",),
        num_threads=_GROUPS,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((up_to(vocabulary, _GROUPS * size),), jnp.float32),
            plgpu.SMEM((_GROUPS,), jnp.float32),
            plgpu.Barrier(num_arrivals=_GROUPS),
        ],
    )(logits, keys)


class _Row:
    """A row of logits on the chip, of which this group has a part.

    Args:
      logits: float32 [V], on the chip.
      told: float32 [_GROUPS], what the groups tell each other.
      barrier: at which all groups meet.
      size: logits of one trip.
    """

    def __init__(self, logits, told, barrier, size):
        self.group = jax.lax.axis_index("group")
        self.logits, self.told, self.barrier, self.size = logits, told, barrier, size
        self.part = logits.shape[0] // _GROUPS

    def meet(self):
        """Waits until all groups are here."""
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)

    def load(self, source, temperature):
        """Copies logits over the temperature, and -inf beyond the last one."""
        count, lines = source.shape[0], self.part // _LINE

        @pl.loop(0, lines)
        def _(i):
            place = pl.ds(self.group * self.part + i * _LINE, _LINE)
            self.logits[place] = jnp.full((_LINE,), -jnp.inf, jnp.float32)

        self.meet()

        def copy(first):
            line = source[pl.ds(first, _LINE)]
            self.logits[pl.ds(first, _LINE)] = line / temperature if temperature else line

        @pl.loop(0, lines)
        def _(i):
            first = self.group * self.part + i * _LINE
            pl.when(first + _LINE <= count)(lambda: copy(first))

        if count % _LINE:  # the last line overlaps the one before, which may be of another group
            self.meet()
            pl.when(self.group == 0)(lambda: copy(count - _LINE))
        self.meet()

    def scan(self, start, step):
        """Carries a tree of arrays [size] through step(carry, logits, ids), over this part."""

        def trip(i, carry):
            first = self.group * self.part + i * self.size
            ids = first + jax.lax.broadcasted_iota(jnp.int32, (self.size,), 0)
            return step(carry, self.logits[pl.ds(first, self.size)], ids)

        return jax.lax.fori_loop(0, self.part // self.size, trip, start)

    def of_all(self, own, join):
        """What `join` makes of the number of each group."""
        self.told[self.group] = own
        self.meet()
        value = self.told[0]
        for group in range(1, _GROUPS):
            value = join(value, self.told[group])
        self.meet()
        return value

    def full(self, value):
        """An array of one trip."""
        return jnp.full((self.size,), value, jnp.float32)

    def total(self, weight):
        """The sum of weight(logits, ids) over the row."""
        sums = self.scan(self.full(0), lambda total, x, ids: total + weight(x, ids))
        return self.of_all(jnp.sum(sums), operator.add)

    def count(self, holds):
        """How often holds(logits, ids) is true; a float, which is exact below 2^24."""
        return self.total(lambda x, ids: holds(x, ids).astype(jnp.float32))

    def largest(self):
        """The largest logit."""
        most = self.scan(self.full(-_INFINITY), lambda most, x, ids: jnp.maximum(most, x))
        return self.of_all(jnp.max(most), jnp.maximum)

    def choice(self, score, kept):
        """The lowest id at which score(logits, ids) is largest, among those kept(logits, ids)."""

        def better(carry, x, ids):
            inside = kept(x, ids)

            def compared(carry):
                ours = jnp.where(inside, score(x, ids), -_INFINITY)
                is_better = ours > carry[0]
                return (
                    jnp.where(is_better, ours, carry[0]),
                    jnp.where(is_better, ids.astype(jnp.float32), carry[1]),
                )

            any_inside = jnp.sum(inside.astype(jnp.float32)) > 0
            return jax.lax.cond(any_inside, compared, lambda carry: carry, carry)

        best, places = self.scan((self.full(-_INFINITY), self.full(0)), better)
        top = self.of_all(jnp.max(best), jnp.maximum)
        lowest = -jnp.max(jnp.where(best == top, -places, -_INFINITY))
        return self.of_all(lowest, jnp.minimum).astype(jnp.int32)


def _kernel(logits, keys, token, *scratch, size, temperature, top_k, top_p, min_p):
    """One row."""
    b, row = jax.lax.axis_index("row"), _Row(*scratch, size)
    row.load(logits.at[b], temperature)
    kept = _kept(row, top_k, top_p, min_p) if temperature else _is_possible
    key = keys[b, 0], keys[b, 1]

    def score(x, ids):
        return x + gumbel_of(key, ids) if temperature else x

    chosen = row.choice(score, kept)

    @pl.when(row.group == 0)
    def _():
        token[b] = chosen


def _kept(row, top_k, top_p, min_p):
    """The filters, as one function of logits and ids."""
    kept = _is_possible
    if top_k:
        kept = _both(kept, _among_the_largest(row, top_k))
    if top_p == 1 and min_p == 0:
        return kept
    largest = row.largest()
    if top_p < 1:
        least = _edge_of_mass(row, kept, largest, top_p)
        kept = _both(kept, lambda x, ids: jnp.exp(x - largest) >= least)
    if min_p > 0:
        edge = largest + math.log(min_p)
        kept = _both(kept, lambda x, ids: x >= edge)
    return kept


def _is_possible(x, ids):
    return x > -_INFINITY


def _both(one, other):
    return lambda x, ids: one(x, ids) & other(x, ids)


def _floats(number, size):
    """[size] times the float whose place among all floats is this int32."""
    number = jnp.full((size,), number)  # scalars are not converted
    return jax.lax.bitcast_convert_type(
        jnp.where(number < 0, number ^ 0x7FFFFFFF, number), jnp.float32
    )


def _raised(bits, start, enough, done):
    """The largest number that is enough, of those that differ in these bits from the start.

    `enough` returns whether it is, and a measure; where done(measure) is true nothing is sought
    any longer.
    """

    def go_on(state):
        i, _, measure = state
        return jnp.logical_and(i < bits, jnp.logical_not(done(measure)))

    def raise_bit(state):
        i, value, measure = state
        higher = value + (jnp.int32(1) << (bits - 1 - i))
        is_enough, its = enough(higher)
        return i + 1, jnp.where(is_enough, higher, value), jnp.where(is_enough, its, measure)

    state = jnp.int32(0), jnp.int32(start), jnp.float32(-1)
    return jax.lax.while_loop(go_on, raise_bit, state)[1:]


def _among_the_largest(row, k):
    """Whether a logit is one of the k largest; of those equal to the last one the first are."""

    def reached(number):
        edge = _floats(number, row.size)
        count = row.count(lambda x, ids: x >= edge)
        return count >= k, count

    number, count = _raised(32, _TINY, reached, lambda count: count == k)
    edge = _floats(number, row.size)
    room = k - row.count(lambda x, ids: x > edge)

    def fits(end):
        count = row.count(lambda x, ids: (x == edge) & (ids < end))
        return count <= room, count

    # Where the count is k there are no equals that would have to go, and no pass is made.
    bits = row.logits.shape[0].bit_length()
    end, _ = _raised(bits, 0, fits, lambda _: count == k)
    end = jnp.where(count == k, row.logits.shape[0], end)
    return lambda x, ids: (x > edge) | ((x == edge) & (ids < end))


def _edge_of_mass(row, kept, largest, mass):
    """The largest weight, of a logit against the largest, from which on all have this share."""

    def weight(x, ids):
        return jnp.where(kept(x, ids), jnp.exp(x - largest), 0)

    wanted = mass * row.total(weight)

    def reached(bits):
        edge = _floats(bits, row.size)

        def heavy(x, ids):
            own = weight(x, ids)
            return jnp.where(own >= edge, own, 0)

        total = row.total(heavy)
        return total >= wanted, total

    bits, _ = _raised(30, 0, reached, lambda _: False)  # weights are at most 1
    return _floats(bits, row.size)
