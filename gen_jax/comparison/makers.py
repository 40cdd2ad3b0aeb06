"""Samplers that no option of a run names, made of loaded runs; see `Strategy.make`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gen_jax.loading import Loaded
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    SpeculativeSampler,
    UncachedSampler,
)
from gen_jax.nn.transformer import TokenNetwork

__all__ = ["speculative", "uncached"]

_DRAFTED = 3


def uncached(loaded: Mapping[str, Loaded]) -> tuple[UncachedSampler, Any]:
    """One token at a time of the first run, reading everything again for each."""
    run = next(iter(loaded.values()))
    ours = run.sampler
    sampler = UncachedSampler(ours.model, ours.prompt_length, ours.tokens, ours.options, ours.eos)
    return sampler, run.params


def speculative(loaded: Mapping[str, Loaded]) -> tuple[SpeculativeSampler, Any]:
    """The first run, for which the second one drafts three tokens a round."""
    target, draft = loaded.values()
    ours, (model, params) = target.sampler, _longer(target)
    small, small_params = _longer(draft)
    sampler = SpeculativeSampler(model, small, ours.prompt_length, ours.tokens, _DRAFTED)
    return sampler, {"target": params, "draft": small_params}


def _longer(run):
    """A model that also reads what is drafted beyond its context, which is never kept."""
    network = run.model.network
    config = dataclasses.replace(network.config, context=network.config.context + _DRAFTED + 1)
    params = dict(run.params)
    if "position" in params:
        more = ((0, config.context - len(params["position"])), (0, 0))
        params["position"] = jnp.pad(params["position"], more)
    return AutoregressiveModel(TokenNetwork(config)), params
