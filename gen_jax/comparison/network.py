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
from gen_jax.models.parallel import ParallelSampler
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.sampling import Sampler

__all__ = ["evaluations_alone"]


def evaluations_alone(sampler: Sampler) -> Callable[[Any, Any], Any] | None:
    """(prepared, state) -> numbers: all evaluations of a loop one after the other, nothing else.

    Each depends on the one before, so that none is left out. None for a kind of sampler whose
    evaluations differ from step to step.

    Args:
      sampler: whose network; the state is that of its `init`.
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
    kept = isinstance(sampler, AutoregressiveSampler)
    if kept and not isinstance(sampler, UncachedSampler | SpeculativeSampler):
        return _tokens(sampler)
    return None


def _rounds(sampler):
    def run(prepared, state):
        def body(i, carry):
            tokens, _ = carry
            logits = sampler.model(prepared, tokens, state.valid, state.context)
            zero = 0 * logits.sum()
            return tokens + zero.astype(jnp.int32), zero

        return jax.lax.fori_loop(0, sampler.rounds, body, (state.tokens, jnp.float32(0)))[1]

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
            return tokens + (0 * logits.sum()).astype(jnp.int32), caches

        first = state.tokens[:, :1]
        tokens, _ = jax.lax.fori_loop(0, sampler.tokens, body, (first, state.caches))
        return tokens.sum().astype(jnp.float32)

    return run
