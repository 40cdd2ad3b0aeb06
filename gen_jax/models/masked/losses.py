"""A network that fills masks: its loss, and the bound (1) of any denoiser.

B batch, L length, V vocabulary, M source length, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import kernels
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.keys import fold_in_each
from gen_jax.models import contract
from gen_jax.models.masked.conditions import check_source, infill
from gen_jax.models.masked.denoisers import Denoiser, ExactDenoiser
from gen_jax.models.masked.orders import halton_order
from gen_jax.models.sequences import cross_entropy, uniform_by_position, valid_mask
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from kernels.threefry import split_each, uniform_each

__all__ = [
    "Denoiser",
    "ExactDenoiser",
    "MaskedModel",
    "bound_terms",
    "entropy_profile",
    "estimate_bound",
    "hide",
    "infill",
    "log_prob_in_order",
]


@frozen
class MaskedModel:
    """A network that is trained to fill masks: a `Model`, and a `Denoiser` for samplers in rounds.

    It conditions on "label" int [B] in [0, extra_inputs - 1), which is read as a token of its own
    before the sequence, and on what the network itself reads ("source", "source_length").

    A network whose only positions are rotary sees distances, not places: to a sequence of masks
    alone it gives the same logits everywhere, and samplers in rounds then go from left to right.

    Attributes:
      network: one that is not causal, with an extra input for the mask (and one for each class).
      counts: how many tokens the loss hides; see `MaskConfig`.
      smoothing: share of the target's probability that the loss spreads over all tokens (label
        smoothing), in [0, 1).
      grid: rows and columns, and what else the positions count along; empty for a line.
      halton: share of the sequences of which the loss hides the last positions in the order
        `orders.halton_order` of the grid, in [0, 1).
    """

    network: TokenNetwork | EncoderDecoder
    counts: Literal["uniform", "cosine", "all"] = "uniform"
    smoothing: float = 0.0
    grid: tuple[int, ...] = ()
    halton: float = 0.0

    def __post_init__(self):
        if self.network.config.causal or not self.network.config.extra_inputs:
            raise ValueError(
                "a denoiser sees all positions and reads a mask: set causal to false and "
                "extra_inputs to at least 1"
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if not 0 <= self.halton < 1:
            raise ValueError(f"halton must be in [0, 1), got {self.halton}")
        if self.halton and self.counts == "all":
            raise ValueError("with all tokens hidden there is no order: set halton to 0")

    @property
    def vocabulary(self) -> int:
        """Tokens V."""
        return self.network.config.vocabulary

    @property
    def mask(self) -> int:
        """V, the first extra input."""
        return self.network.config.vocabulary

    @property
    def classes(self) -> int:
        """Number of classes, whose tokens follow the mask."""
        return self.network.config.extra_inputs - 1

    @property
    def conditions(self) -> tuple[str, ...]:
        """See `Denoiser`."""
        label = ("label",) if self.classes else ()
        source = ("source", "source_length") if self.network.config.memory else ()
        return ("length", *label, *source)

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh float32 parameters."""
        return self.network.init(key)

    def loss(
        self,
        params: Any,
        batch: dict[str, Any],
        keys: Key[Array, " B"],
        context: dict | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean cross-entropy of the hidden tokens of each sequence, averaged over sequences.

        Where `counts` is uniform this is the bound (1) per position.

        Args:
          params: of `init`.
          batch: "tokens" int [B, L], "length" int [B] where sequences differ in it, and what the
            model conditions on.
          keys: one per sequence, for the hidden positions and dropout.
          context: of `condition`, where it is known already.

        Returns:
          Nats per token, and no further metrics.
        """
        count_keys, order_keys, dropout_keys = split_each(keys, 3)
        dropout = dropout_keys if self.network.config.dropout else None
        valid = valid_mask(batch["tokens"], batch.get("length"))
        if self.counts == "all":
            count, hidden = valid.sum(-1), valid
            tokens = jnp.where(hidden, self.mask, batch["tokens"])
        else:
            uniform = uniform_each(count_keys)
            count = _count(self.counts, uniform, valid.sum(-1))
            order = self._order(order_keys, batch["tokens"].shape[1])
            tokens, hidden = _hide(order, batch["tokens"], valid, count, self.mask)
        if context is None:
            context = self.condition(params, batch, dropout)
        logits = self.logits(params, tokens, valid, context, dropout)
        values = cross_entropy(logits, batch["tokens"], self.smoothing)
        return (jnp.where(hidden, values, 0).sum(-1) / jnp.maximum(count, 1)).mean(), {}

    def _order(self, keys, length):
        """[B, L]: the larger is hidden first."""
        order = uniform_by_position(keys, length)
        if not self.halton:
            return order
        fixed = np.argsort(halton_order(self.grid or (length,))).astype(np.float32)[None]
        coins = uniform_each(fold_in_each(keys, length), (1,))
        return jnp.where(coins < self.halton, fixed, order)

    def bound_terms(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"]
    ) -> Float[Array, "B L"]:
        """The terms of (1) for the sequences of a batch; see the function `bound_terms`."""
        return bound_terms(self, params, batch, keys)

    def condition(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"] | None = None
    ) -> dict:
        """As `encode`, of parameters that are not prepared, with dropout where there are keys."""
        return _label_of(batch) | self.network.condition(params, batch, keys)

    def logits(
        self,
        params: Any,
        tokens: Int[Array | np.ndarray, "B L"],
        valid: Bool[Array | np.ndarray, "B L"],
        context: dict,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L V"]:
        """As `__call__`, of parameters that are not prepared, with dropout where there are keys."""
        return _evaluate(self.network, self.mask, params, tokens, valid, keys=keys, **context)

    def check(self, params: Any, cond: Condition, length: int) -> None:
        """See `Denoiser.check`.

        Raises:
          ValueError: the parameters are not the network's, or a label or a source cannot be read.
        """
        contract.check_params(self, params)
        contract.check_label(cond, self.classes)
        if self.network.config.memory:
            check_source(cond, self.vocabulary)

    def prepare(self, params: Any) -> Any:
        """See `TokenNetwork.prepare`."""
        return self.network.prepare(params)

    def encode(self, params: Any, cond: dict[str, Any]) -> dict:
        """See `Denoiser.encode`."""
        return _label_of(cond) | self.network.encode(params, cond)

    def __call__(
        self,
        params: Any,
        tokens: Int[Array | np.ndarray, "B L"],
        valid: Bool[Array | np.ndarray, "B L"],
        context: dict,
    ) -> Float[Array, "B L V"]:
        """See `Denoiser.__call__`.

        Beside what `encode` gives, the context may have "added", float [B, D] or [B, L, D], which
        is added to the inputs: the latent of a parallel decoder.
        """
        return _evaluate(self.network.evaluate, self.mask, params, tokens, valid, **context)


def _label_of(cond):
    return {"label": cond["label"]} if "label" in cond else {}


def _evaluate(call, mask, params, tokens, valid, label=None, added=None, copied=None, **context):
    """Logits of a sequence, its masks with the source, after the token of its class."""
    if added is not None and added.ndim == 2:
        added = added[:, None]
    if copied is not None:  # to masks alone: it would drown the tokens that are known
        source = _stretched(copied, context["memory_mask"], valid)
        source = jnp.where((tokens == mask)[..., None], source, 0)
        added = source if added is None else added + source
    if label is None:
        return call(params, tokens, mask=valid, added=added, **context)
    token = (mask + 1 + label).astype(tokens.dtype)[:, None]
    valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    if added is not None and added.shape[1] > 1:  # nothing is added to the class
        added = jnp.pad(added, ((0, 0), (1, 0), (0, 0)))
    tokens = jnp.concatenate([token, tokens], axis=1)
    return call(params, tokens, mask=valid, added=added, **context)[:, 1:]


def _stretched(copied, mask, valid):
    """A source [B, M, D], valid where bool [B, M] says so, stretched to the valid positions."""
    batch, columns = copied.shape[:2]
    source = jnp.full(batch, columns) if mask is None else mask.sum(-1)
    middle = (jnp.arange(valid.shape[1]) + 0.5)[None] / jnp.maximum(valid.sum(-1), 1)[:, None]
    place = (middle * source[:, None]).astype(jnp.int32)
    place = jnp.clip(place, 0, source[:, None] - 1)
    return jnp.take_along_axis(copied, place[..., None], axis=1)


def _count(counts, uniform, length):
    """How many of `length` int [B] tokens are hidden, int32 [B], from uniform draws [B]."""
    if counts == "cosine":
        share = jnp.cos(jnp.pi / 2 * uniform)
        count = jnp.ceil(share * length)
    else:
        count = 1 + jnp.floor(uniform * length)
    return jnp.clip(count.astype(jnp.int32), 1, length)


def hide(
    keys: Key[Array, " B"],
    tokens: Int[Array | np.ndarray, "B L"],
    valid: Bool[Array | np.ndarray, "B L"],
    count: Int[Array | np.ndarray, " B"] | Int[Array, ""],
    mask: int,
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Replaces `count` random positions of each row by the mask.

    Args:
      keys: one per row.
      tokens: the rows.
      valid: the positions to choose from.
      count: of each row, or of all.
      mask: the token.

    Returns:
      The rows with their masks, and which positions are hidden.
    """
    return _hide(uniform_by_position(keys, tokens.shape[1]), tokens, valid, count, mask)


def _hide(order, tokens, valid, count, mask):
    hidden = kernels.keep_most_confident(jnp.where(valid, order, -jnp.inf), count) & valid
    return jnp.where(hidden, mask, tokens), hidden


def bound_terms(
    model: Denoiser, params: Any, batch: dict[str, Any], keys: Key[Array, " B"]
) -> Float[Array, "B L"]:
    """The terms of (1), each with one random set of hidden positions per sequence.

    Args:
      model: of sequences of L tokens.
      params: its parameters, not prepared.
      batch: "tokens" int [B, L], "length" int [B] where sequences differ in it, and what the model
        conditions on.
      keys: one per sequence, for the sets.

    Returns:
      float32 in nats: entry n - 1 is the mean cross-entropy of n hidden tokens, 0 where n is more
      than the length. The sum over n is an unbiased estimate of the bound.
    """
    tokens, prepared = batch["tokens"], model.prepare(params)
    context = model.encode(prepared, batch)
    valid = valid_mask(tokens, batch.get("length"))

    def term(n):
        ours = fold_in_each(keys, n)
        seen, hidden = hide(ours, tokens, valid, n, model.mask)
        values = cross_entropy(model(prepared, seen, valid, context), tokens)
        return jnp.where(hidden & (n <= valid.sum(-1))[:, None], values, 0).sum(-1) / n

    return jax.lax.map(term, jnp.arange(1, tokens.shape[1] + 1)).T


def estimate_bound(
    model: Denoiser, params: Any, batch: dict[str, Any], keys: Key[Array, " B"], draws: int
) -> Float[Array, " B"]:
    """An unbiased estimate of the bound (1) from few of its terms.

    The numbers of hidden positions are stratified: one is drawn from each of `draws` equal parts of
    1 .. L. The variance is then far below that of independent draws.

    Args:
      model: of sequences of L tokens.
      params: its parameters, not prepared.
      batch: "tokens" int [B, L], "length" int [B] where sequences differ in it, and what the model
        conditions on.
      keys: one per sequence, for the numbers and the sets.
      draws: evaluations of the model per sequence, at least 1.

    Returns:
      float32 in nats, of each sequence.

    Raises:
      ValueError: `draws` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    tokens, prepared = batch["tokens"], model.prepare(params)
    context = model.encode(prepared, batch)
    valid = valid_mask(tokens, batch.get("length"))
    length = valid.sum(-1)

    def add(i, total):
        share_keys, order_keys = split_each(fold_in_each(keys, i), 2)
        share = (i + uniform_each(share_keys)) / draws
        count = _count("uniform", share, length)
        seen, hidden = hide(order_keys, tokens, valid, count, model.mask)
        values = cross_entropy(model(prepared, seen, valid, context), tokens)
        mean = jnp.where(hidden, values, 0).sum(-1) / jnp.maximum(count, 1)
        return total + length * mean / draws

    return jax.lax.fori_loop(0, draws, add, jnp.zeros(len(tokens), jnp.float32))


def entropy_profile(terms: Float[Array | np.ndarray, "B L"]) -> tuple[float, ...]:
    """f(0) to f(L), the mean entropy of m random positions in nats, from the terms of (1).

    f(m + 1) - f(m) is the mean cross-entropy of one more position when m are known, that is the
    term with L - m hidden. It is what `schedules.Optimal` takes.
    """
    steps = np.asarray(terms, np.float64).mean(axis=0)[::-1]
    return (0.0, *np.cumsum(steps).tolist())


def log_prob_in_order(
    model: Denoiser,
    params: Any,
    tokens: Int[Array | np.ndarray, "B L"],
    order: Int[Array | np.ndarray, "*rows L"],
    sizes: Sequence[int],
    cond: dict[str, Any] | None = None,
) -> Float[Array, " B"]:
    """Log-probability of sequences whose positions are drawn in groups, in a given order.

    It is exactly that of `samplers.OrderedGroups`, given the order.

    Args:
      model: of sequences of L tokens.
      params: its parameters, not prepared.
      tokens: the sequences.
      order: int [L] or [B, L], all positions, first to last.
      sizes: positions of each group.
      cond: "length" int [B] where sequences differ in it, and what the model conditions on.

    Returns:
      float32, in nats.
    """
    prepared, cond = model.prepare(params), cond or {}
    context, valid = model.encode(prepared, cond), valid_mask(tokens, cond.get("length"))
    rank = jnp.broadcast_to(jnp.argsort(order, axis=-1), tokens.shape)
    ends = np.cumsum(sizes)

    def group(bounds):
        seen = jnp.where(rank >= bounds[0], model.mask, tokens)
        values = cross_entropy(model(prepared, seen, valid, context), tokens)
        drawn = valid & (rank >= bounds[0]) & (rank < bounds[1])
        return jnp.where(drawn, -values, 0).sum(-1)

    return jax.lax.map(group, jnp.stack([ends - np.array(sizes), ends], axis=1)).sum(0)
