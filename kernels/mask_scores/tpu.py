"""mask_scores for TPUs: the logits of a position are read once, and nothing of their size is made.

The largest logit, the sum of the others against it, the token and its logit come from two passes
over logits that are in VMEM. Noise is drawn there too, and for the same positions is the same.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tpu
from kernels.dispatch import register
from kernels.mask_scores.reference import merged
from kernels.operands import alike, result, up_to
from kernels.sample_token.passes import first_of_the_largest, scan
from kernels.threefry import gumbel_of

__all__ = ["mask_scores"]

_BLOCKS = (256, 128)  # positions that are read at once, where they divide the length
_GROUP = 32  # positions of one trip
_MEMORY = 16 << 20  # bytes of VMEM for logits, in two buffers


def _refusal(logits, tokens, masked, keys, *, temperature, noise):
    length, vocabulary = logits.shape[1:]
    if _block(length, vocabulary) is None:
        return f"has no room for the {vocabulary} logits of {length} positions at once"
    return None


def _block(length, vocabulary):
    """The positions of a block: a divisor that fills registers, or all; None where none fits."""
    sizes = (*(size for size in _BLOCKS if length % size == 0), length)
    able = [size for size in sizes if 8 * size * up_to(vocabulary, tpu.LANES) <= _MEMORY]
    return able[0] if able else None


def _wastes_little(logits, tokens, masked, keys, **options):
    """Whether few lanes are without a token: the time is that of the noise, drawn in all lanes."""
    return -logits.shape[2] % tpu.LANES <= logits.shape[2] / 16


@register(
    "mask_scores",
    "tpu",
    default_on=("tpu",),
    default_when=_wastes_little,
    only_on=("tpu",),
    refusal=_refusal,
)
def mask_scores(logits, tokens, masked, keys, *, temperature, noise):
    """See `kernels.mask_scores`."""
    batch = logits.shape[0]
    words = jnp.zeros((batch, 2), jnp.uint32) if keys is None else jax.random.key_data(keys)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    drawn, log_prob = _run(tpu.readable(logits), words, temperature=float(temperature))
    return merged(drawn, log_prob, tokens, masked, keys, noise)


@functools.partial(jax.jit, static_argnames="temperature")
def _run(logits, words, *, temperature):
    batch, length, vocabulary = logits.shape
    words, logits = alike(words, logits)
    size = _block(length, vocabulary)
    row = pl.BlockSpec((1, 1, size), lambda b, i, words: (b, 0, i))
    drawn, log_prob = pl.pallas_call(
        functools.partial(_kernel, vocabulary=vocabulary, temperature=temperature),
        out_shape=[
            result((batch, 1, length), jnp.int32, words),
            result((batch, 1, length), jnp.float32, words),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, length // size),
            in_specs=[
                pl.BlockSpec((1, size, up_to(vocabulary, tpu.LANES)), lambda b, i, words: (b, i, 0))
            ],
            out_specs=[row, row],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=2 * _MEMORY
        ),
        name="mask_scores",
    )(words, logits)
    return drawn[:, 0], log_prob[:, 0]


def _kernel(words, logits, drawn, log_prob, *, vocabulary, temperature):
    """A block of positions of one sample, a group of them at a time."""
    b, block = pl.program_id(0), logits.shape[1]
    key = tuple(
        jax.lax.bitcast_convert_type(jnp.full((1, 1), words[b, i], jnp.int32), jnp.uint32)
        for i in range(2)
    )
    for start in range(0, block, _GROUP):
        rows = slice(start, min(start + _GROUP, block))
        first = pl.program_id(1) * block + start
        id_, value = _group(logits.at[0, rows], key, first, vocabulary, temperature)
        drawn[0, 0, rows], log_prob[0, 0, rows] = id_[:, 0], value[:, 0]


def _group(logits, key, first, vocabulary, temperature):
    """Tokens [R, 1] and their log-probabilities [R, 1], from a reference [R, V]."""
    lanes = logits.shape[0], tpu.LANES
    least = jnp.full(lanes, -jnp.inf)

    def inside(x, ids):  # beyond the vocabulary there may be anything
        return jnp.where(ids < vocabulary, x.astype(jnp.float32), -jnp.inf)

    most = scan(logits, least, lambda most, x, ids: jnp.maximum(most, inside(x, ids)))
    largest = most.max(axis=1, keepdims=True)
    positions = first + jax.lax.broadcasted_iota(jnp.int32, lanes, 0)

    def step(carry, x, ids):
        best, places, logit, mass = carry
        x = inside(x, ids)
        score = x
        if temperature > 0:
            score = x / temperature + gumbel_of(key, positions * vocabulary + ids)
        better = score > best
        return (
            jnp.where(better, score, best),
            jnp.where(better, ids, places),
            jnp.where(better, x, logit),
            mass + jnp.exp(x - largest),
        )

    start = least, jnp.zeros(lanes, jnp.int32), least, jnp.zeros(lanes)
    best, places, logit, mass = scan(logits, start, step)
    id_, chosen = first_of_the_largest(best, places, logit)
    return id_, (chosen - largest) - jnp.log(mass.sum(axis=1, keepdims=True))
