"""A transformer that reads a source and predicts a target (Vaswani et al. 2017, 1706.03762).

B batch, M source positions, S target positions, D width, V the joint vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import PreparedParams, TokenNetwork, Transformer, cast


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """Encoder and decoder as pure functions of a tree {"encoder", "decoder"}.

    It stands where a `TokenNetwork` does; a batch or a condition then has a "source" int32 [B, M]
    and, where sources differ in length, "source_length" int32 [B]. Both sides read one table of
    tokens (Press & Wolf 2017), the decoder's.

    Attributes:
      config: of the decoder, which has a memory; the encoder has its sizes.
      encoder_layers: blocks of the encoder.
      copies: whether what was read also has "copied", the source by a matrix of its own, which a
        parallel decoder adds to its masks: they say nothing else (Gu et al. 2018, 1711.02281,
        section 3.1, with the outputs of the encoder for its inputs).
    """

    config: TransformerConfig
    encoder_layers: int
    copies: bool = False

    def __post_init__(self):
        if not self.config.memory:
            raise ValueError("the decoder reads the encoder: set memory")
        if self.copies and self.config.causal:
            raise ValueError("only a decoder that is not causal copies the source")

    @property
    def encoder(self) -> TransformerConfig:
        """Sizes of the encoder."""
        return dataclasses.replace(
            self.config, layers=self.encoder_layers, causal=False, window=0, memory=False, tied=True
        )

    @property
    def decoder(self) -> TokenNetwork:
        """The decoder alone."""
        return TokenNetwork(self.config)

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters."""
        first, second, third = jax.random.split(key, 3)
        encoder = TokenNetwork(self.encoder).init(first)
        del encoder["token"]
        params = {"encoder": encoder, "decoder": self.decoder.init(second)}
        if self.copies:
            params["copy"] = 0.01 * jax.random.normal(third, (self.config.width,) * 2)
        return params

    def prepare(self, params) -> PreparedParams:
        """What depends on the parameters alone, computed once before many evaluations."""
        decoder = self.decoder.prepare(params["decoder"])
        encoder = cast(params["encoder"], self.encoder)
        both = {"encoder": encoder, "decoder": decoder.params}
        return PreparedParams(params | both, decoder.head)

    def encode_source(self, params: dict, batch: dict, keys=None) -> dict:
        """The source, read.

        Args:
          params: of both sides, prepared or not.
          batch: "source" int [B, M] and perhaps "source_length" int [B].
          keys: [B] keys for dropout; None for none.

        Returns:
          "memory" float32 [B, M, D], and "memory_mask" bool [B, M] or None.
        """
        source, length, mask = batch["source"], batch.get("source_length"), None
        if length is not None:
            mask = jnp.arange(source.shape[1]) < length[:, None]
        encoder = params["encoder"] | {"token": params["decoder"]["token"]}
        if keys is not None:  # or the masks of both sides would be the same
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        memory = Transformer(self.encoder).apply(
            {"params": encoder}, source, mask=mask, keys=keys, method="hidden"
        )
        return {"memory": memory, "memory_mask": mask}

    def __call__(self, params, tokens, **options) -> jax.Array:
        """Logits [B, S, V] of the decoder; see `TokenNetwork.__call__`."""
        return self.decoder(params["decoder"], tokens, **options)

    def condition(self, params, batch: dict, keys=None) -> dict:
        """Options of `__call__`: the source of the batch, read."""
        return self._with_copies(params, self.encode_source(params, batch, keys))

    def encode(self, prepared: PreparedParams, cond: dict) -> dict:
        """Options of `extend` and `evaluate`: keys and values of the source for every block."""
        return self.encode_memory(prepared, self.encode_source(prepared.params, cond))

    def encode_memory(self, prepared: PreparedParams, read: dict) -> dict:
        """As `encode`, of what `encode` gave."""
        read = self._with_copies(prepared.params, read)
        memory = read.pop("memory")
        decoder = {"params": prepared.params["decoder"]}
        apply = Transformer(dataclasses.replace(self.config, tied=True)).apply
        return read | {"memory_kv": apply(decoder, memory, method="project_memory")}

    def _with_copies(self, params, read):
        return read | ({"copied": read["memory"] @ params["copy"]} if self.copies else {})

    def evaluate(self, prepared: PreparedParams, tokens, **options) -> jax.Array:
        """As `__call__`, of prepared parameters, inside a loop of evaluations."""
        return self.decoder.evaluate(self._decoder(prepared), tokens, **options)

    def make_caches(self, batch: int, length: int):
        """As `TokenNetwork.make_caches`."""
        return self.decoder.make_caches(batch, length)

    def extend(self, prepared: PreparedParams, tokens, caches, column, first=None, **options):
        """As `TokenNetwork.extend`, with the options of `read`."""
        return self.decoder.extend(
            self._decoder(prepared), tokens, caches, column, first, **options
        )

    def logits(self, prepared: PreparedParams, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32."""
        return self.decoder.logits(prepared, hidden)

    def _decoder(self, prepared):
        return prepared.replace(params=prepared.params["decoder"])
