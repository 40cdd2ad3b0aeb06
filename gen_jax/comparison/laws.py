"""What is known of a strategy by theory: its perfect network, and what it loses in nats."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

from gen_jax import evaluation
from gen_jax.data.exact import Enumerated
from gen_jax.loading import Loaded
from gen_jax.metrics import gaps
from gen_jax.models.autoregressive import AutoregressiveSampler, SpeculativeSampler
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler, ExactNetwork
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.masked import (
    ExactDenoiser,
    MaskedModel,
    MaskGIT,
    OrderedGroups,
    log_prob_in_order,
)
from gen_jax.models.masked.iterative import IterativeSampler
from gen_jax.models.next_scale import NextScaleSampler
from gen_jax.models.parallel import ParallelSampler
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.sampling import Sampler
from gen_jax.tasks.two_stage.codes import encoded

__all__ = ["exact_draws", "measure", "perfect"]

_ORDERS, _BATCH = 4, 64  # random orders, of which the gap is a mean


def perfect(
    judge: Any, loaded: Loaded, sampler: Sampler, params: Any
) -> tuple[Sampler, Any] | None:
    """The same sampler with the best possible network, and the parameters of that.

    Tokens are drawn from exact conditionals by enumeration; images are denoised by the exact mean
    (see `ExactDenoiser`, `ExactNetwork`); a fixed order is kept. None where the truth is not known,
    or the kind of sampler is another; for one token at a time see `exact_draws`.

    Args:
      judge: of the data, a `judges.Judge`.
      loaded: the run.
      sampler, params: of the strategy.
    """
    if isinstance(sampler, TwoStageSampler):
        return _perfect_prior(judge, loaded, sampler, params)
    if isinstance(sampler, DiffusionSampler):
        support = judge.support()
        return None if support is None else _perfect_denoiser(sampler, to_signal(support))
    dist = judge.known(loaded, sampler, params)
    return None if dist is None else _perfect_tokens(sampler, dist)


def exact_draws(
    judge: Any, loaded: Loaded, sampler: Sampler, params: Any, number: int, seed: int
) -> np.ndarray | None:
    """What one token at a time draws with a perfect network: samples of the truth itself.

    Codes are decoded by the trained decoder. None for another kind of sampler, or where the truth
    is not known. Arguments are those of `perfect`.
    """
    two_stages = isinstance(sampler, TwoStageSampler)
    prior = sampler.prior if two_stages else sampler
    if not isinstance(prior, AutoregressiveSampler | SpeculativeSampler):
        return None
    dist = judge.known(loaded, sampler, params)
    if dist is None:
        return None
    rows = np.random.default_rng(seed).choice(len(dist.support), number, p=dist.prob)
    tokens = dist.support[rows]
    return np.asarray(_decode(sampler, params, tokens)) if two_stages else tokens


@functools.partial(jax.jit, static_argnums=0)
def _decode(sampler, params, codes):
    return sampler.decode(params, codes)


def _perfect_prior(judge, loaded, sampler, params):
    support = judge.support()
    if support is None:
        return None
    if sampler.latents:
        latents = encoded(sampler.autoencoder, params["autoencoder"], support, True)
        made = _perfect_denoiser(sampler.prior, latents)
    else:
        made = _perfect_tokens(sampler.prior, judge.known(loaded, sampler, params))
    if made is None:
        return None
    prior, exact = made
    return dataclasses.replace(sampler, prior=prior), params | {"prior": exact}


def _perfect_denoiser(sampler, images):
    model = sampler.model
    network = ExactNetwork(model.process, len(images), images.shape[-1])
    exact = DiffusionModel(network, model.process, model.shape)
    return dataclasses.replace(sampler, model=exact), {"images": np.asarray(images, np.float32)}


def _perfect_tokens(sampler, dist):
    exact = {"support": dist.support, "prob": dist.prob.astype(np.float32)}
    denoiser = ExactDenoiser(dist.vocabulary)
    if isinstance(sampler, IterativeSampler):
        return dataclasses.replace(sampler, model=denoiser), exact
    groups = _groups(sampler, dist.length)
    return None if groups is None else (OrderedGroups.of_groups(denoiser, groups), exact)


def _groups(sampler, length):
    """The groups of positions that a sampler with a fixed order draws; None for another."""
    if isinstance(sampler, AutoregressiveSampler):
        return tuple((i,) for i in range(length))
    if isinstance(sampler, NextScaleSampler):
        first = sampler.model.first
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(first))
    if isinstance(sampler, ParallelSampler) and sampler.model.latent.kind == "none":
        return (tuple(range(length)),)
    if isinstance(sampler, MaskGIT) and sampler.rounds == 1:
        return (tuple(range(length)),)
    return None


def measure(dist: Enumerated | None, sampler: Sampler, params: Any) -> dict[str, float]:
    """What a strategy loses of the truth in nats, where its law is known.

    Args:
      dist: of the tokens or codes that the sampler draws; None where that is not known.
      sampler, params: of the strategy.

    Returns:
      "kl", KL(p || q) of the tokens or codes, q that of the trained network; "kl_perfect", that of
      a perfect one; "entropy" of p. Both are means over the same random orders where the order is
      random. Empty where the law or the truth is not known.
    """
    if dist is None:
        return {}
    if isinstance(sampler, TwoStageSampler):
        sampler, params = sampler.prior, params["prior"]
    rows = {"tokens": dist.support}
    groups = _groups(sampler, dist.length)
    if isinstance(sampler, OrderedGroups) and isinstance(sampler.model, MaskedModel):
        return _of_orders(sampler, params, dist)
    if groups is None:
        return {}
    if isinstance(sampler, AutoregressiveSampler | NextScaleSampler | ParallelSampler):
        log_prob = evaluation.log_prob(sampler.model, params, rows, _BATCH)
    else:
        log_prob = _in_order(sampler.model, params, dist, groups)
    return _figures(dist, log_prob, gaps.kl_of_groups(dist, groups))


def _of_orders(sampler, params, dist):
    sizes = np.cumsum((0, *sampler.schedule.sizes(dist.length, sampler.rounds)))
    rng, figures = np.random.default_rng(0), []
    for _ in range(_ORDERS if sampler.order is None else 1):
        order = rng.permutation(dist.length) if sampler.order is None else np.array(sampler.order)
        groups = tuple(tuple(order[a:b].tolist()) for a, b in itertools.pairwise(sizes))
        log_prob = _in_order(sampler.model, params, dist, groups)
        figures.append(_figures(dist, log_prob, gaps.kl_of_groups(dist, groups)))
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}


def _in_order(model, params, dist, groups):
    order = np.concatenate([np.array(group) for group in groups])
    sizes = tuple(len(group) for group in groups)
    rows = {"tokens": dist.support, "order": np.broadcast_to(order, dist.support.shape).copy()}
    f = functools.partial(_log_prob_in_order, model, sizes)
    return evaluation.map_rows(f, params, rows, _BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_prob_in_order(model, sizes, params, rows):
    return log_prob_in_order(model, params, rows["tokens"], rows["order"], sizes)


def _figures(dist: Enumerated, log_prob: np.ndarray, lost: float) -> dict[str, float]:
    nats = -float(dist.prob @ log_prob.astype(np.float64))
    return {"kl": nats - dist.entropy, "kl_perfect": lost, "entropy": dist.entropy}
