"""How much of a sampling loop is its network: the evaluations alone, in a loop of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gen_jax.models.autoregressive import (
    AutoregressiveSampler,
    SpeculativeSampler,
    UncachedSampler,
)
from gen_jax.models.diffusion import DiffusionSampler
from gen_jax.models.masked.iterative import IterativeSampler
from gen_jax.models.next_scale import NextScaleSampler
from gen_jax.models.parallel import ParallelSampler
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.sampling import Sampler

__all__ = ["evaluations_alone"]


def evaluations_alone(sampler: Sampler) -> Callable[[Any, Any], Any] | None:
    """(prepared, state) -> numbers: all evaluations of a loop one after the other, nothing else.

    Each depends on the one before, so that none is left out. Those of a draft are among them. None
    for a kind of sampler that is not known here.

    Args:
      sampler: whose network; the state is that of its `init`, or of one that stops early that at
        its end, which says how many evaluations there were.
    """
    if isinstance(sampler, TwoStageSampler):
        prior = evaluations_alone(sampler.prior)
        if prior is None:
            return None

        def both(prepared, state):
            drawn = sampler.prior.finish(prepared["prior"], state)
            last = prior(prepared["prior"], state)
            drawn = drawn + (0 * last).astype(drawn.dtype)  # floats: not folded away
            return sampler.decode(prepared, drawn)

        return both
    if isinstance(sampler, ParallelSampler):
        inner = evaluations_alone(sampler.inner)
        return None if inner is None else lambda prepared, s: inner(prepared["network"], s)
    if isinstance(sampler, IterativeSampler):
        return _rounds(sampler)
    if isinstance(sampler, DiffusionSampler):
        return _denoisings(sampler)
    if isinstance(sampler, SpeculativeSampler):
        return _drafts_and_checks(sampler)
    if isinstance(sampler, NextScaleSampler):
        return _scales(sampler)
    if isinstance(sampler, UncachedSampler):
        return _rereadings(sampler)
    return _tokens(sampler) if isinstance(sampler, AutoregressiveSampler) else None


def _rounds(sampler):
    def run(prepared, state):
        def body(_, tokens):
            logits = sampler.model(prepared, tokens, state.valid, state.context)
            return _after(tokens, logits)

        return jax.lax.fori_loop(0, sampler.rounds, body, state.tokens).sum().astype(jnp.float32)

    return run


def _denoisings(sampler):
    def run(prepared, state):
        times = jnp.asarray(sampler.timesteps, jnp.int32)

        def body(i, x):
            t = jnp.full(len(x), times[i])
            return sampler.model.predict(prepared, x, t, state.label)[0]

        return jax.lax.fori_loop(0, sampler.steps, body, state.x).sum()

    return run


def _tokens(sampler):
    network = sampler.model.network

    def run(prepared, state):
        def body(i, carry):
            tokens, caches = carry
            hidden, caches = network.extend(prepared, tokens, caches, i, state.first)
            logits = network.logits(prepared, hidden[:, 0])
            return _after(tokens, logits), caches

        first = state.tokens[:, :1]
        tokens, _ = jax.lax.fori_loop(0, sampler.tokens, body, (first, state.caches))
        return tokens.sum().astype(jnp.float32)

    return run


def _rereadings(sampler):
    network = sampler.model.network

    def run(prepared, state):
        def body(_, tokens):
            caches = network.make_caches(*tokens.shape)
            hidden, _ = network.extend(prepared, tokens, caches, 0, state.first, **state.encoded)
            return _after(tokens, network.logits(prepared, hidden[:, -1]))

        inputs = state.tokens[:, : sampler.cache_length]
        return jax.lax.fori_loop(0, sampler.tokens, body, inputs).sum().astype(jnp.float32)

    return run


def _scales(sampler):
    model = sampler.model

    def run(prepared, state):
        tokens, caches = state.tokens, state.caches
        for scale in range(sampler.steps):
            inputs = model.inputs(scale, tokens, state.label)
            hidden, caches = model.network.extend(prepared, inputs, caches, model.first[scale])
            tokens = _after(tokens, model.network.logits(prepared, hidden))
        return tokens.sum().astype(jnp.float32)

    return run


def _drafts_and_checks(sampler):
    """As many rounds as the state has behind it, all from the middle of the way."""
    network, draft = sampler.model.network, sampler.draft.network

    def run(prepared, state):
        target, small, middle = prepared["target"], prepared["draft"], state.known // 2
        block = state.tokens[:, : sampler.drafted + 1]

        def body(_, carry):
            block, caches, draft_caches = carry
            for j in range(sampler.drafted):
                read = block[:, : 1 if j else 2]
                hidden, draft_caches = draft.extend(small, read, draft_caches, middle, state.first)
                block = _after(block, draft.logits(small, hidden[:, -1]))
            hidden, caches = network.extend(target, block, caches, middle, state.first)
            return _after(block, network.logits(target, hidden)), caches, draft_caches

        start = block, state.caches, state.draft_caches
        return jax.lax.fori_loop(0, state.rounds.max(), body, start)[0].sum().astype(jnp.float32)

    return run


def _after(tokens, logits):
    """The same tokens, which now depend on the logits."""
    return tokens + (0 * logits.sum()).astype(tokens.dtype)
