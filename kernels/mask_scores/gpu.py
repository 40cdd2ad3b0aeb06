"""mask_scores for GPUs (Hopper): the logits of masked positions alone are read.

A warpgroup has one position. Where that is masked, it goes through the logits twice, the second
time in the cache: for the largest, and then for the sum of all against it, the token and its logit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.dispatch import register
from kernels.mask_scores.reference import merged
from kernels.operands import alike, result
from kernels.threefry import gumbel_of

__all__ = ["mask_scores"]

_LINE = 128  # logits that are loaded at once, one for each thread
_LINES = 4  # at once where the vocabulary is a multiple of so many: loads of 16 bytes
_LARGEST = 1 << 24  # a token goes through float32
_INFINITY = float("inf")


def _refusal(logits, tokens, masked, keys, *, temperature, noise):
    if logits.shape[2] > _LARGEST:
        return f"takes at most {_LARGEST:,} tokens, not {logits.shape[2]:,}"
    return gpu.unfit()


@register("mask_scores", "gpu", only_on=("cuda",), refusal=_refusal)
def mask_scores(logits, tokens, masked, keys, *, temperature, noise):
    """See `kernels.mask_scores`."""
    batch, _, vocabulary = logits.shape
    words = jnp.zeros((batch, 2), jnp.uint32) if keys is None else jax.random.key_data(keys)
    missing = max(_LINE - vocabulary, 0)
    drawn, log_prob = _run(
        jnp.pad(
            logits.astype(jnp.float32), ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf
        ),
        masked.astype(jnp.int32),
        words,
        vocabulary=vocabulary,
        temperature=float(temperature),
    )
    return merged(drawn, log_prob, tokens, masked, keys, noise)


@functools.partial(jax.jit, static_argnames=("vocabulary", "temperature"))
def _run(logits, masked, words, *, vocabulary, temperature):
    logits, masked, words = alike(logits, masked, words)
    return gpu.kernel(
        functools.partial(_kernel, vocabulary=vocabulary, temperature=temperature),
        name="mask_scores",
        out_type=(
            result(masked.shape, jnp.int32, masked),
            result(masked.shape, jnp.float32, masked),
        ),
        grid=masked.shape,
        grid_names=("row", "position"),
    )(logits, masked, words)


def _kernel(logits, masked, words, token, log_prob, *, vocabulary, temperature):
    """One position; where it is not masked, nothing is written."""
    b, position = jax.lax.axis_index("row"), jax.lax.axis_index("position")

    @pl.when(masked[b, position] != 0)
    def _():
        key = words[b, 0], words[b, 1]
        counter = position.astype(jnp.uint32) * jnp.uint32(vocabulary)
        own = logits.at[b, position]
        token[b, position], log_prob[b, position] = _draw(own, key, counter, temperature)


def _draw(logits, key, counter, temperature):
    """The token, and its log-probability, from float32 [V]."""
    count = logits.shape[0]
    size = _LINE * _LINES if count % (_LINE * _LINES) == 0 else _LINE

    def full(value):
        return jnp.full((size,), value, jnp.float32)

    def scan(start, step):
        def trip(i, carry):
            # A line that would end beyond the last logit is the last one that does not.
            first = jnp.minimum(i * size, count - size)
            ids = first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
            x = jnp.where(ids >= i * size, logits[pl.ds(first, size)], -_INFINITY)
            return step(carry, x, ids)

        return jax.lax.fori_loop(0, -(-count // size), trip, start)

    largest = jnp.max(scan(full(-_INFINITY), lambda most, x, ids: jnp.maximum(most, x)))

    def better(carry, x, ids):
        best, places, logit, mass = carry
        score = x
        if temperature > 0:
            score = x / temperature + gumbel_of(key, counter + ids.astype(jnp.uint32))
        is_better = score > best
        return (
            jnp.where(is_better, score, best),
            jnp.where(is_better, ids.astype(jnp.float32), places),
            jnp.where(is_better, x, logit),
            mass + jnp.exp(x - largest),
        )

    start = full(-_INFINITY), full(0), full(-_INFINITY), full(0)
    best, places, logit, mass = scan(start, better)
    top = jnp.max(best)
    lowest = -jnp.max(jnp.where(best == top, -places, -_INFINITY))
    chosen = jnp.max(jnp.where((best == top) & (places == lowest), logit, -_INFINITY))
    return lowest.astype(jnp.int32), chosen - largest - jnp.log(jnp.sum(mass))
