"""The autoregressive model: its loss and its exact likelihood."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from gen_jax.config import frozen
from gen_jax.models.sequences import cross_entropy, mean_of_first, valid_mask
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork

__all__ = ["AutoregressiveModel"]

Batch = dict[str, Array | np.ndarray]


@frozen
class AutoregressiveModel:
    """A network that predicts each token of a sequence from those before it.

    Its batches have "tokens" int [B, L] and may have:
      "label" int [B]: in 0 to extra_inputs - 1, for a network with extra inputs; 0 where missing;
      "length" int [B]: only so many of the predicted tokens count;
      "source" int [B, M] and "source_length" int [B]: for an `EncoderDecoder`.

    Attributes:
      network: a causal one.
      smoothing: the share of the target's probability that the loss spreads over all tokens (label
        smoothing: Szegedy et al. 2016), in [0, 1). The likelihood does not have it.

    Raises:
      ValueError: at construction, where the network is not causal or smoothing is out of range.
    """

    network: TokenNetwork | EncoderDecoder
    smoothing: float = 0.0

    def __post_init__(self):
        if not self.network.config.causal or self.network.config.groups:
            raise ValueError("an autoregressive model needs a causal network without groups")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")

    @property
    def vocabulary(self) -> int:
        """Tokens V that are predicted."""
        return self.network.config.vocabulary

    @property
    def has_start(self) -> bool:
        """Whether every sequence begins with a start token, V + label, which is not predicted."""
        return self.network.config.extra_inputs > 0

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh float32 parameters."""
        return self.network.init(key)

    def loss(
        self, params: Any, batch: Batch, keys: Key[Array, " B"] | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean cross-entropy per predicted token, in nats, and no further metrics.

        Args:
          params: of `init`.
          batch: see the class.
          keys: one per example, for dropout; they are not read where the network has none.
        """
        keys = keys if self.network.config.dropout else None
        inputs, targets = self.inputs_and_targets(batch["tokens"], batch.get("label"))
        options = self.network.condition(params, batch, keys)
        logits = self.network(params, inputs, keys=keys, **options)
        values = cross_entropy(logits, targets, self.smoothing)
        return mean_of_first(values, batch.get("length")), {}

    def log_prob(self, params: Any, batch: Batch) -> Float[Array, " B"]:
        """The exact log-probability of each sequence, in nats.

        It is the sum of the first "length" values of `token_log_prob`, or of all.
        """
        values = self.token_log_prob(params, batch)
        return jnp.where(valid_mask(values, batch.get("length")), values, 0).sum(axis=1)

    def token_log_prob(self, params: Any, batch: Batch) -> Float[Array, "B N"]:
        """The exact log-probability of each predicted token given all before it, in nats.

        Returns:
          float32 [B, L] with a start token, else [B, L - 1]; "length" does not count here.
        """
        inputs, targets = self.inputs_and_targets(batch["tokens"], batch.get("label"))
        logits = self.network(params, inputs, **self.network.condition(params, batch))
        return -cross_entropy(logits, targets)

    def inputs_and_targets(
        self,
        tokens: Int[Array | np.ndarray, "B L"],
        label: Int[Array | np.ndarray, " B"] | None = None,
    ) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
        """What the network reads, and what it should predict at each place.

        Returns:
          Inputs and targets, int32 [B, L] each with a start token, else [B, L - 1].
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if not self.has_start:
            return tokens[:, :-1], tokens[:, 1:]
        start = self.start_tokens(len(tokens), label)
        return jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1), tokens

    def start_tokens(
        self, batch: int, label: Int[Array | np.ndarray, " B"] | None = None
    ) -> Int[Array, " B"]:
        """The start token of each sequence, V + label, int32; label 0 where there is no label."""
        if label is None:
            return jnp.full(batch, self.vocabulary, jnp.int32)
        return self.vocabulary + jnp.asarray(label, jnp.int32)
