"""A transformer that encodes a source and predicts a target (Vaswani et al. 2017, 1706.03762).

B batch, M source length, L target length, N new inputs, D width, V the joint vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from gen_jax.config import frozen
from gen_jax.keys import fold_in_each
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import PreparedParams, TokenNetwork, cast
from kernels import KVCache

__all__ = ["EncoderDecoder"]


@frozen
class EncoderDecoder:
    """Encoder and decoder as pure functions of a tree {"encoder", "decoder"}.

    It takes the place of a `TokenNetwork`; a batch or a condition then has a "source" int [B, M]
    and, where sources differ in length, "source_length" int [B]. Both sides share the decoder's
    table of tokens (Press & Wolf 2017, 1608.05859).

    Attributes:
      config: of the decoder, which has a memory; the encoder has the same sizes.
      encoder_layers: the number of blocks of the encoder.
      copies: whether the encoded source also has "copied", a linear map of the memory, which a
        parallel decoder adds to the embeddings of its masks: those carry no other information
        (Gu et al. 2018, 1711.02281, section 3.1, with the outputs of the encoder in place of its
        inputs).

    Raises:
      ValueError: at construction, when the decoder has no memory or no vocabulary, the encoder has
        no blocks, or a causal decoder should copy the source.
    """

    config: TransformerConfig
    encoder_layers: int
    copies: bool = False

    def __post_init__(self):
        if not self.config.memory:
            raise ValueError("the decoder reads the encoder: set memory")
        if self.config.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {self.config.vocabulary}")
        if self.encoder_layers < 1:
            raise ValueError(f"encoder_layers must be at least 1, got {self.encoder_layers}")
        if self.copies and self.config.causal:
            raise ValueError("only a decoder that is not causal copies the source")

    @property
    def encoder(self) -> TransformerConfig:
        """The sizes of the encoder."""
        return dataclasses.replace(
            self.config, layers=self.encoder_layers, causal=False, window=0, memory=False, tied=True
        )

    @property
    def decoder(self) -> TokenNetwork:
        """The decoder alone."""
        return TokenNetwork(self.config)

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh float32 parameters."""
        first, second, third = jax.random.split(key, 3)
        encoder = TokenNetwork(self.encoder).init(first)
        del encoder["token"]
        params = {"encoder": encoder, "decoder": self.decoder.init(second)}
        if self.copies:
            params["copy"] = 0.01 * jax.random.normal(third, (self.config.width,) * 2)
        return params

    def __call__(
        self, params: Any, tokens: Int[Array | np.ndarray, "B L"], **options: Any
    ) -> Float32[Array, "B L V"]:
        """Logits of the decoder; options are those of `TokenNetwork.__call__`."""
        return self.decoder(params["decoder"], tokens, **options)

    def condition(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"] | None = None
    ) -> dict[str, Any]:
        """Options of a call that follow from the source of the batch, and "copied"."""
        return self._with_copies(params, self.encode_source(params, batch, keys))

    def prepare(self, params: Any) -> PreparedParams:
        """What depends only on the parameters, computed once before many evaluations."""
        decoder = self.decoder.prepare(params["decoder"])
        encoder = cast(params["encoder"], self.encoder)
        both = {"encoder": encoder, "decoder": decoder.params}
        return PreparedParams(params | both, decoder.head)

    def encode(self, prepared: PreparedParams, cond: dict[str, Any]) -> dict[str, Any]:
        """Options of `extend` and `evaluate`: keys and values of the source for every block."""
        return self.encode_memory(prepared, self.encode_source(prepared.params, cond))

    def encode_source(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"] | None = None
    ) -> dict[str, Any]:
        """The outputs of the encoder.

        Args:
          params: of both sides, prepared or not.
          batch: "source" int [B, M] and perhaps "source_length" int [B].
          keys: for dropout; None for none.

        Returns:
          "memory" float32 [B, M, D], and "memory_mask" bool [B, M] or None.
        """
        source, length, mask = batch["source"], batch.get("source_length"), None
        if length is not None:
            mask = jnp.arange(source.shape[1])[None] < length[:, None]
        encoder = params["encoder"] | {"token": params["decoder"]["token"]}
        if keys is not None:  # or the masks of both sides would be the same
            keys = fold_in_each(keys, 1)
        memory = TokenNetwork(self.encoder).hidden(encoder, source, mask=mask, keys=keys)
        return {"memory": memory, "memory_mask": mask}

    def encode_memory(self, prepared: PreparedParams, encoded: dict[str, Any]) -> dict[str, Any]:
        """As `encode`, of what `encode_source` gave: "memory_kv", "memory_mask" and "copied"."""
        options = self._with_copies(prepared.params, encoded)
        decoder = TokenNetwork(dataclasses.replace(self.config, tied=True))
        memory_kv = decoder.project_memory(prepared.params["decoder"], options.pop("memory"))
        return options | {"memory_kv": memory_kv}

    def _with_copies(self, params, encoded):
        return encoded | ({"copied": encoded["memory"] @ params["copy"]} if self.copies else {})

    def evaluate(
        self, prepared: PreparedParams, tokens: Int[Array | np.ndarray, "B L"], **options: Any
    ) -> Float32[Array, "B L V"]:
        """As a call, with prepared parameters: for use inside a loop of evaluations."""
        return self.decoder.evaluate(self._decoder(prepared), tokens, **options)

    def make_caches(self, batch: int, cache_length: int) -> tuple[KVCache, ...]:
        """Empty caches of the decoder, as `TokenNetwork.make_caches`."""
        return self.decoder.make_caches(batch, cache_length)

    def extend(
        self,
        prepared: PreparedParams,
        tokens: Int[Array | np.ndarray, "B N"],
        caches: tuple[KVCache, ...],
        column: int | Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " B"],
        first: Int[Array | np.ndarray, " B"] | None = None,
        **options: Any,
    ) -> tuple[Float32[Array, "B N D"], tuple[KVCache, ...]]:
        """Hidden values of new inputs, as `TokenNetwork.extend`, with the options of `encode`."""
        return self.decoder.extend(
            self._decoder(prepared), tokens, caches, column, first, **options
        )

    def logits(
        self, prepared: PreparedParams, hidden: Float[Array, "*batch D"]
    ) -> Float32[Array, "*batch V"]:
        """Logits of hidden values."""
        return self.decoder.logits(prepared, hidden)

    def _decoder(self, prepared):
        return prepared.replace(params=prepared.params["decoder"])
