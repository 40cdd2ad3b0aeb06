"""The model of maps of tokens from coarse to fine: its loss and its exact likelihood."""

import functools
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from gen_jax.config import frozen
from gen_jax.models.sequences import cross_entropy
from gen_jax.nn.transformer import TokenNetwork

__all__ = ["NextScaleModel", "network_sizes"]

Batch = dict[str, Array | np.ndarray]


def network_sizes(vocabulary: int, scales: tuple[int, ...], classes: int = 0) -> dict[str, Any]:
    """The fields of a `TransformerConfig` that follow from the tokens.

    Args:
      vocabulary: V, the same at every scale.
      scales: the sides of the square maps, coarse to fine.
      classes: 0 for none.
    """
    groups = tuple(side**2 for side in scales)
    return {
        "vocabulary": vocabulary,
        "context": sum(groups),
        "groups": groups,
        "causal": True,
        "extra_inputs": max(len(scales) - 2, 0) * vocabulary + max(classes, 1),
    }


@frozen
class NextScaleModel:
    """A network that predicts the map of each scale from those before it.

    Its batches have "tokens" int [B, L], the maps of all scales in turn, each row by row, and may
    have "label" int [B] in [0, classes); 0 where missing. Inputs of the network are: token v of
    scale k at v + k V, for all scales but the last, and then a start token for each class.

    Attributes:
      network: with the sizes of `network_sizes`.
      scales: the sides of the square maps, coarse to fine; each divides the next, and may be the
        same.

    Raises:
      ValueError: at construction, where the network and the scales do not fit.
    """

    network: TokenNetwork
    scales: tuple[int, ...]

    def __post_init__(self):
        if not self.scales or min(self.scales) < 1 or tuple(sorted(self.scales)) != self.scales:
            raise ValueError(f"scales must be sides from coarse to fine, got {self.scales}")
        if any(fine % coarse for coarse, fine in pairwise(self.scales)):
            raise ValueError(f"each scale must divide the next, got {self.scales}")
        groups = tuple(side**2 for side in self.scales)
        if self.network.config.groups != groups:
            raise ValueError(
                f"the network must have the groups {groups} of the scales, not "
                f"{self.network.config.groups}"
            )
        if self.classes < 1:
            raise ValueError(
                f"the network needs extra_inputs of at least {1 - self.classes} more: see "
                "network_sizes"
            )

    @property
    def vocabulary(self) -> int:
        """Tokens V."""
        return self.network.config.vocabulary

    @property
    def classes(self) -> int:
        """Number of start tokens, one for each class; 1 where there are no classes."""
        before = max(len(self.scales) - 2, 0) * self.vocabulary
        return self.network.config.extra_inputs - before

    @property
    def length(self) -> int:
        """Tokens L of all scales together."""
        return self.network.config.context

    @functools.cached_property
    def first(self) -> tuple[int, ...]:
        """The place of the first token of each scale, and L."""
        return tuple(int(place) for place in np.cumsum((0, *self.network.config.groups)))

    def parents(self, scale: int) -> Int32[np.ndarray, " positions"]:
        """For each position of a scale after the first, the place of the token that covers it."""
        coarse, fine = self.scales[scale - 1 : scale + 1]
        row, column = np.divmod(np.arange(fine**2), fine)
        step = fine // coarse
        covered = self.first[scale - 1] + row // step * coarse + column // step
        return covered.astype(np.int32)

    def inputs(
        self,
        scale: int,
        tokens: Int[Array | np.ndarray, "B L"],
        label: Int[Array | np.ndarray, " B"] | None = None,
    ) -> Int[Array, "B positions"]:
        """What the network reads at the positions of a scale; of the tokens, the scale before."""
        if scale:
            return jnp.asarray(tokens)[:, self.parents(scale)] + (scale - 1) * self.vocabulary
        start = jnp.full(len(tokens), max(len(self.scales) - 1, 1) * self.vocabulary, jnp.int32)
        start = start if label is None else start + jnp.asarray(label, jnp.int32)
        return jnp.repeat(start[:, None], self.scales[0] ** 2, axis=1)

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh float32 parameters."""
        return self.network.init(key)

    def loss(
        self, params: Any, batch: Batch, keys: Key[Array, " B"] | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean cross-entropy per token in nats, and that of each scale as "loss_0" and so on.

        Args:
          params: of `init`.
          batch: see the class.
          keys: one per example, for dropout; they are not read where the network has none.
        """
        keys = keys if self.network.config.dropout else None
        values = self._nats(params, batch, keys)
        parts = jnp.split(values, self.first[1:-1], axis=1)
        return values.mean(), {f"loss_{i}": part.mean() for i, part in enumerate(parts)}

    def log_prob(self, params: Any, batch: Batch) -> Float[Array, " B"]:
        """The exact log-probability of the maps of all scales together, in nats."""
        return -self._nats(params, batch, None).sum(axis=1)

    def _nats(self, params, batch, keys):
        """-log p [B, L] of each token given the scales before its own."""
        tokens, label = batch["tokens"], batch.get("label")
        parts = [self.inputs(i, tokens, label) for i in range(len(self.scales))]
        logits = self.network(params, jnp.concatenate(parts, axis=1), keys=keys)
        return cross_entropy(logits, jnp.asarray(tokens, jnp.int32))
