"""Masked models: Mask-Predict (Ghazvininejad et al. 2019, 1904.09324), MaskGIT (Chang et al. 2022,
2202.04200), absorbing diffusion (D3PM: Austin et al. 2021, 2107.03006).

A network that sees all positions reads a sequence of L tokens, of which n are replaced by a mask,
and predicts those: p(x_i | x_known) for every masked i. Training hides n positions at random and
averages their cross-entropies. With n uniform over 1 .. L its mean is the bound per position:

    -log p(x) <= sum_{n = 1}^{L}  E_hidden [ 1/n sum_{i hidden} -log p(x_i | x_known) ]         (1)

over sets of n hidden positions. This is the ELBO of absorbing diffusion in continuous time, for any
masking schedule, and of autoregression in a random order (Hoogeboom et al. 2021, 2110.02037,
equation 5; Ou et al. 2024, 2406.03736); a denoiser that is exact attains the entropy.

The samplers are in `masked_samplers`. The mask is the first of the network's extra inputs, token V.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.sequences import cross_entropy, existing
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import PreparedParams, TokenNetwork


class Denoiser(Protocol):
    """What fills masked positions: a frozen, hashable object.

    Attributes:
      vocabulary: tokens V.
      mask: the token that stands for a hidden one, from V up.
    """

    vocabulary: int
    mask: int

    def prepare(self, params) -> Any:
        """What the other methods get as `params`, done once before a loop."""

    def encode(self, params, cond: dict) -> dict:
        """What stays the same from round to round: a tree of arrays [B, ...]."""

    def __call__(self, params, tokens, exists, context: dict) -> jax.Array:
        """Logits [B, L, V] of tokens int32 [B, L], where bool [B, L] says which positions exist."""


@dataclasses.dataclass(frozen=True)
class NetworkDenoiser:
    """A trained network as a `Denoiser`.

    The condition may have "label" int32 [B] in [0, extra_inputs - 1), which is read as a token of
    its own before the sequence, "added" [B, D] or [B, L, D], which joins the inputs, and what the
    network itself conditions on.

    Attributes:
      network: one that is not causal, with an extra input for the mask (and one for each class).
    """

    network: TokenNetwork | EncoderDecoder

    def __post_init__(self):
        if self.network.config.causal or not self.network.config.extra_inputs:
            raise ValueError(
                "a denoiser sees all positions and reads a mask: set causal to false and "
                "extra_inputs to at least 1"
            )

    @property
    def vocabulary(self) -> int:
        """Tokens V."""
        return self.network.config.vocabulary

    @property
    def mask(self) -> int:
        """V, the first extra input."""
        return self.network.config.vocabulary

    def prepare(self, params) -> PreparedParams:
        """See `TokenNetwork.prepare`."""
        return self.network.prepare(params)

    def encode(self, params: PreparedParams, cond: dict) -> dict:
        """See `Denoiser.encode`."""
        return _own(cond) | self.network.encode(params, cond)

    def __call__(self, params: PreparedParams, tokens, exists, context: dict) -> jax.Array:
        """See `Denoiser.__call__`."""
        return _labelled(self.network.evaluate, self.mask, params, tokens, exists, **context)

    def condition(self, params: dict, batch: dict, keys=None) -> dict:
        """As `encode`, of parameters that are not prepared, with dropout where there are keys."""
        return _own(batch) | self.network.condition(params, batch, keys)

    def train(self, params: dict, tokens, exists, context: dict, keys=None) -> jax.Array:
        """As `__call__`, of parameters that are not prepared, with dropout where there are keys."""
        return _labelled(self.network, self.mask, params, tokens, exists, keys=keys, **context)


def _own(cond):
    return {name: cond[name] for name in ("label", "added") if name in cond}


def _labelled(call, mask, params, tokens, exists, label=None, added=None, copied=None, **context):
    """Logits of the sequence, its masks with the source, and the token of its class before it."""
    if added is not None and added.ndim == 2:
        added = added[:, None]
    if copied is not None:  # to masks alone: it would drown the tokens that are known
        source = _stretched(copied, context["memory_mask"], exists)
        source = jnp.where((tokens == mask)[..., None], source, 0)
        added = source if added is None else added + source
    if label is None:
        return call(params, tokens, mask=exists, added=added, **context)
    token = (mask + 1 + label).astype(tokens.dtype)[:, None]
    exists = jnp.pad(exists, ((0, 0), (1, 0)), constant_values=True)
    if added is not None and added.shape[1] > 1:  # nothing to the class
        added = jnp.pad(added, ((0, 0), (1, 0), (0, 0)))
    tokens = jnp.concatenate([token, tokens], axis=1)
    return call(params, tokens, mask=exists, added=added, **context)[:, 1:]


def _stretched(copied, mask, exists):
    """A source [B, M, D] of which bool [B, M] exists, drawn out to the positions that exist."""
    batch, columns = copied.shape[:2]
    source = jnp.full(batch, columns) if mask is None else mask.sum(-1)
    middle = (jnp.arange(exists.shape[1]) + 0.5) / jnp.maximum(exists.sum(-1), 1)[:, None]
    place = (middle * source[:, None]).astype(jnp.int32)
    place = jnp.clip(place, 0, source[:, None] - 1)
    return jnp.take_along_axis(copied, place[..., None], axis=1)


@dataclasses.dataclass(frozen=True)
class ExactDenoiser:
    """The conditionals of a known distribution over few sequences, by enumeration.

    Its parameters are "support" int [N, L] and "prob" [N], as `data.exact.Enumerated` has them. A
    context that cannot occur gives the uniform distribution.

    Attributes:
      vocabulary: tokens V.
    """

    vocabulary: int

    @property
    def mask(self) -> int:
        """V."""
        return self.vocabulary

    def prepare(self, params) -> dict:
        """In float32."""
        prob = jnp.asarray(params["prob"], jnp.float32)
        return {"support": jnp.asarray(params["support"], jnp.int32), "prob": prob}

    def encode(self, params, cond: dict) -> dict:
        """Nothing."""
        return {}

    def __call__(self, params, tokens, exists, context: dict) -> jax.Array:
        """See `Denoiser.__call__`; all positions exist."""
        support = params["support"]
        fits = (tokens[:, None] == support) | (tokens[:, None] == self.mask)
        weights = jnp.where(fits.all(-1), params["prob"], 0)  # [B, N]
        of_token = jax.nn.one_hot(support, self.vocabulary)
        prob = jnp.einsum("bn,nlv->blv", weights, of_token, precision="highest")
        possible = weights.sum(-1)[:, None, None] > 0
        return jnp.where(possible, jnp.log(prob), 0.0)


def hide(keys: jax.Array, tokens, exists, count, mask: int):
    """Replaces `count` random positions of each row by the mask.

    Args:
      keys: [B].
      tokens: int32 [B, L].
      exists: bool [B, L], the positions to choose from.
      count: int32 [B].
      mask: the token.

    Returns:
      int32 [B, L], and bool [B, L], which positions are hidden.
    """
    order = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
    hidden = kernels.keep_most_confident(jnp.where(exists, order, -jnp.inf), count) & exists
    return jnp.where(hidden, mask, tokens), hidden


def loss(
    network,
    params,
    batch: dict,
    keys: jax.Array,
    *,
    config: MaskConfig,
    smoothing: float = 0.0,
    context: dict | None = None,
):
    """Mean cross-entropy of the hidden tokens of each sequence, in nats, and no further metrics.

    With `config.counts` uniform this is the bound (1) per position.

    Args:
      network: of a `NetworkDenoiser`.
      params: its parameters.
      batch: "tokens" int32 [B, L], perhaps "length" int32 [B], and what the network conditions on.
      keys: [B].
      config: how many tokens are hidden.
      smoothing: of labels, see `autoregressive.loss`.
      context: of `NetworkDenoiser.condition`, where it is known already.
    """
    denoiser = NetworkDenoiser(network)
    parts = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    dropout = parts[:, 2] if network.config.dropout else None
    exists = existing(batch["tokens"], batch.get("length"))
    uniform = jax.vmap(jax.random.uniform)(parts[:, 0])
    count = _count(config, uniform, exists.sum(-1))
    tokens, hidden = hide(parts[:, 1], batch["tokens"], exists, count, denoiser.mask)
    if context is None:
        context = denoiser.condition(params, batch, dropout)
    logits = denoiser.train(params, tokens, exists, context, dropout)
    values = cross_entropy(logits, batch["tokens"], smoothing)
    return (jnp.where(hidden, values, 0).sum(-1) / jnp.maximum(count, 1)).mean(), {}


def _count(config, uniform, length):
    if config.counts == "cosine":
        share = jnp.cos(jnp.pi / 2 * uniform)
        count = jnp.ceil(share * length)
    else:
        count = 1 + jnp.floor(uniform * length)
    return jnp.clip(count.astype(jnp.int32), 1, length)


def bound_terms(denoiser: Denoiser, params, tokens, keys: jax.Array, cond: dict | None = None):
    """The terms of (1), each with one random set of hidden positions per sequence.

    Args:
      denoiser: of sequences of L tokens.
      params: what it needs.
      tokens: int32 [B, L].
      keys: [B]; the sets.
      cond: what it conditions on, and perhaps "length" int32 [B].

    Returns:
      float32 [B, L] in nats: entry n - 1 is the mean cross-entropy of n hidden tokens, 0 where n is
      more than the length. The sum over n is an unbiased estimate of the bound.
    """
    cond = cond or {}
    prepared = denoiser.prepare(params)
    context = denoiser.encode(prepared, cond)
    exists = existing(tokens, cond.get("length"))

    def term(n):
        ours = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        seen, hidden = hide(ours, tokens, exists, n, denoiser.mask)
        values = cross_entropy(denoiser(prepared, seen, exists, context), tokens)
        return jnp.where(hidden & (n <= exists.sum(-1))[:, None], values, 0).sum(-1) / n

    return jax.lax.map(term, jnp.arange(1, tokens.shape[1] + 1)).T


def entropy_profile(terms) -> tuple[float, ...]:
    """f(0) to f(L), the mean entropy of m random positions in nats, from terms [B, L] of (1).

    f(m + 1) - f(m) is the mean cross-entropy of one more position when m are known, that is the
    term with L - m hidden. It is what `schedules.Optimal` takes.
    """
    steps = np.asarray(terms, np.float64).mean(axis=0)[::-1]
    return (0.0, *np.cumsum(steps).tolist())


def blanks(
    denoiser: Denoiser, columns: int, templates=None, lengths=None, number: int | None = None
) -> dict:
    """The condition of masked samplers: which tokens are given, and how long sequences are.

    In-painting gives tokens around holes; a prefix gives the first ones.

    Args:
      denoiser: decides which ids there are.
      columns: L, positions of the sampler.
      templates: one sequence per sample of ids, and None for each hole; the rest is holes too.
        None for holes alone.
      lengths: one per sample, 1 to L; None for L.
      number: of samples, where neither of the others tells.

    Returns:
      "tokens" int32 [B, L], and "length" int32 [B] where lengths are given.

    Raises:
      ValueError: a length is not in 1 .. L, a token is given beyond the length of its sequence or
        is not in the vocabulary, or numbers of samples differ.
    """
    counts = {len(some) for some in (templates, lengths) if some is not None} or {number}
    if len(counts) != 1 or None in counts:
        raise ValueError(f"templates and lengths must be of as many samples, not {counts}")
    tokens = np.full((counts.pop(), columns), denoiser.mask, np.int32)
    lengths = [columns] * len(tokens) if lengths is None else lengths
    for row, length in enumerate(lengths):
        if not 1 <= length <= columns:
            raise ValueError(f"a length of {length} is outside the table: it has 1 to {columns}")
        for place, token in enumerate([] if templates is None else templates[row]):
            if token is None:
                continue
            if place >= length:
                raise ValueError(
                    f"position {place} is given, but the length is {length}: give fewer tokens "
                    "or a larger length"
                )
            if not 0 <= token < denoiser.vocabulary:
                raise ValueError(
                    f"the token {token} is given; the model knows 0 to {denoiser.vocabulary - 1}"
                )
            tokens[row, place] = token
    given = {} if all(length == columns for length in lengths) else {"length": lengths}
    return {"tokens": tokens} | {name: np.array(v, np.int32) for name, v in given.items()}


def log_prob_in_order(denoiser: Denoiser, params, tokens, order, sizes, cond=None) -> jax.Array:
    """Log-probability of sequences whose positions are drawn in groups, in a given order.

    It is that of `masked_samplers.InOrder`, exactly, given the order.

    Args:
      denoiser: of sequences of L tokens.
      params: what it needs.
      tokens: int32 [B, L].
      order: int32 [L] or [B, L], all positions, first to last.
      sizes: positions of each group, S of them.
      cond: what the denoiser conditions on, or None.

    Returns:
      float32 [B], in nats.
    """
    prepared = denoiser.prepare(params)
    context, exists = denoiser.encode(prepared, cond or {}), existing(tokens)
    rank = jnp.broadcast_to(jnp.argsort(order, axis=-1), tokens.shape)
    ends = np.cumsum(sizes)

    def group(bounds):
        seen = jnp.where(rank >= bounds[0], denoiser.mask, tokens)
        values = cross_entropy(denoiser(prepared, seen, exists, context), tokens)
        return jnp.where((rank >= bounds[0]) & (rank < bounds[1]), -values, 0).sum(-1)

    return jax.lax.map(group, jnp.stack([ends - np.array(sizes), ends], axis=1)).sum(0)
