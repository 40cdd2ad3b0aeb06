"""The parallel decoder: one-shot or masked, with a predicted length or an EOS, perhaps a latent.

B batch, L length, V vocabulary, D width, M source length, K codes, Z parameters of the distribution
of the latent.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from gen_jax.config import frozen
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.losses import MaskedModel
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.models.parallel.latent import gaussian_kl, init_latent, sample_gaussian
from gen_jax.models.sequences import cross_entropy, valid_mask
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from kernels.threefry import split_each

__all__ = ["Ending", "ParallelModel", "source_lengths"]

Ending = Literal["length", "eos", "eos_masked"]


@frozen
class ParallelModel:
    """A network that is not causal, with what predicts lengths and draws latents.

    Parameters are a tree "network", and where they are needed "length" and "latent". A batch has
    "tokens" int [B, L]; "length" int [B], which includes EOS where sequences have one, and is
    missing where all positions are tokens; and what the network conditions on, as for
    `MaskedModel`.

    Attributes:
      network: one with an extra input for the mask.
      max_length: the longest sequence, at most the context of the network.
      ending: "length" predicts the length, which is 1 to `max_length`; "eos" and "eos_masked" fill
        all positions and drop what follows EOS, and learn from all positions or up to EOS.
      latent: what all positions share.
      mask: how the model is trained to fill masks in rounds; None for a one-shot decoder.
      smoothing: share of the target's probability that the loss spreads over all tokens (label
        smoothing), in [0, 1).
    """

    network: TokenNetwork | EncoderDecoder
    max_length: int
    ending: Ending = "length"
    latent: LatentConfig = LatentConfig()
    mask: MaskConfig | None = None
    smoothing: float = 0.0

    def __post_init__(self):
        context = self.network.config.context
        if not 1 <= self.max_length <= context:
            raise ValueError(
                f"max_length must be in 1 .. {context}, the context, got {self.max_length}"
            )
        _ = self.denoiser  # refuses networks that cannot be one
        if self.mask is not None and self.latent.kind != "none":
            raise ValueError("a masked model has no latent: set latent.kind to none")
        if self.mask is not None and self.mask.halton:
            raise ValueError("sequences differ in length and have no grid: set mask.halton to 0")
        if self.mask is not None and self.ending == "eos_masked":
            raise ValueError("a masked model reads what is behind EOS: set ending to length or eos")

    @property
    def denoiser(self) -> MaskedModel:
        """The network, which fills masks."""
        counts = "uniform" if self.mask is None else self.mask.counts
        return MaskedModel(self.network, counts, self.smoothing)

    @property
    def _posterior(self):
        return TokenNetwork(
            dataclasses.replace(
                self.network.config, layers=self.latent.layers, causal=False, tied=True
            )
        )

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh float32 parameters."""
        config, keys = self.network.config, jax.random.split(key, 5)
        params = {"network": self.network.init(keys[0])}
        if self.ending == "length":
            params["length"] = {
                "kernel": jnp.zeros((config.width, self.max_length)),
                "table": jnp.zeros((config.context + 1, self.max_length)),
            }
        if self.latent.kind != "none":
            posterior = {"posterior": self._posterior.init(keys[1])}
            rest = init_latent(self.latent, keys[2:], config.width, self.max_length)
            params["latent"] = posterior | rest
        return params

    def loss(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Minus the log-likelihood (1), the bound (2), or that of masked models, per token.

        Args:
          params: of `init`.
          batch: see the class.
          keys: one per sequence, for dropout, latents and masks.

        Returns:
          The mean over tokens in nats; and the means "kl" of the latent and "length_loss" in nats
          per sequence, where there are such.
        """
        dropout_keys, keys = split_each(keys, 2)
        dropout = dropout_keys if self.network.config.dropout else None
        context = self.denoiser.condition(params["network"], batch, dropout)
        if self.mask is not None:
            return self._masked_loss(params, batch, keys, context)
        return self._one_shot_loss(params, batch, dropout, keys, context)

    def _one_shot_loss(self, params, batch, dropout, keys, context):
        tokens = batch["tokens"]
        valid, counted = self._positions(batch)

        def sums(context, tokens, counted, valid, dropout):  # -> [B]
            blank = jnp.full_like(tokens, self.denoiser.mask)
            logits = self.denoiser.logits(params["network"], blank, valid, context, dropout)
            return jnp.where(counted, cross_entropy(logits, tokens, self.smoothing), 0).sum(-1)

        metrics = {}
        if self.latent.kind == "none":
            values = sums(context, tokens, counted, valid, dropout)
        else:
            prior = self.prior(params, self.summarise(params["network"], context, len(tokens)))
            posterior = self.posterior(params, tokens, counted, context, dropout)
            each = context, tokens, counted, valid, dropout
            expect = self._of_gaussian if self.latent.kind == "gaussian" else self._of_codes
            values, kl = expect(sums, params, posterior, prior, keys, each)
            metrics["kl"] = kl.mean()
            values = values + jnp.maximum(kl, self.latent.free_nats)
        if self.ending == "length":
            length_loss = self._length_loss(params, batch, context)
            values = values + length_loss
            metrics["length_loss"] = length_loss.mean()
        return values.sum() / jnp.maximum(counted.sum(), 1), metrics

    def _of_gaussian(self, sums, params, posterior, prior, keys, each):
        """Sums [B] at one draw of the posterior, and its KL [B] from the prior."""
        context, tokens = each[:2]
        table = params["latent"]["table"][:, : tokens.shape[1]]  # each position has its own matrix
        added = jnp.einsum("bz,zld->bld", sample_gaussian(posterior, keys), table)
        return sums(context | {"added": added}, *each[1:]), gaussian_kl(posterior, prior)

    def _of_codes(self, sums, params, posterior, prior, keys, each):
        """The expectation of sums [B] over all codes, and the KL [B]."""
        codes, tokens = self.latent.size, each[1]
        table = params["latent"]["table"][:, : tokens.shape[1]]

        def copies(leaf):
            return jnp.repeat(leaf, codes, axis=0)

        every = jax.tree.map(copies, each)
        added = jnp.tile(table, (len(tokens), 1, 1))
        values = sums(every[0] | {"added": added}, *every[1:]).reshape(-1, codes)
        log_q, log_p = jax.nn.log_softmax(posterior), jax.nn.log_softmax(prior)
        values = (jnp.exp(log_q) * values).sum(-1)
        return values, (jnp.exp(log_q) * (log_q - log_p)).sum(-1)

    def _masked_loss(self, params, batch, keys, context):
        inside = valid_mask(batch["tokens"], batch.get("length"))
        seen = batch
        if self.ending == "eos":  # what is behind EOS is read, hidden and learned like the rest
            seen = {name: leaf for name, leaf in batch.items() if name != "length"}
        value, metrics = self.denoiser.loss(params["network"], seen, keys, context)
        if self.ending != "length":
            return value, metrics
        length_loss = self._length_loss(params, batch, context).mean()
        value = value + length_loss / inside.sum(-1).mean()
        return value, metrics | {"length_loss": length_loss}

    def log_prob(self, params: Any, batch: dict[str, Any]) -> Float[Array, " B"]:
        """The exact log-probability of the sequences under (1), or under (2) summed over all codes.

        Where the length is predicted its log-probability is included. Where sequences have an EOS,
        those positions count that the loss counts: all, or those up to EOS.

        Args:
          params: of `init`.
          batch: see the class.

        Returns:
          float32, in nats.

        Raises:
          ValueError: the latent is Gaussian, or the model is masked; both only have a bound.
        """
        if self.latent.kind == "gaussian":
            raise ValueError(
                "the likelihood of a Gaussian latent has no closed form; use the bound"
            )
        if self.mask is not None:
            raise ValueError("the likelihood of a masked model has no closed form; use bound_terms")
        tokens, denoiser = batch["tokens"], self.denoiser
        valid, counted = self._positions(batch)
        prepared, blank = denoiser.prepare(params["network"]), jnp.full_like(tokens, denoiser.mask)
        encoded = denoiser.encode(prepared, batch)

        def given(added):
            logits = denoiser(prepared, blank, valid, encoded | added)
            return -jnp.where(counted, cross_entropy(logits, tokens), 0).sum(-1)

        def given_code(code):  # [L, D] -> [B]
            return given({"added": jnp.broadcast_to(code[None], (len(tokens), *code.shape))})

        if self.latent.kind == "none":
            values = given({})
        else:
            context = denoiser.condition(params["network"], batch)
            summary = self.summarise(params["network"], context, len(tokens))
            prior = jax.nn.log_softmax(self.prior(params, summary))
            table = params["latent"]["table"][:, : tokens.shape[1]]  # [K, L, D]
            values = jax.nn.logsumexp(jax.lax.map(given_code, table) + prior.T, axis=0)
        return values - self.length_nats(params, batch) if self.ending == "length" else values

    def length_nats(self, params: Any, batch: dict[str, Any]) -> Float[Array, " B"]:
        """Minus the log-probability of the lengths of a batch given its conditions, in nats."""
        context = self.denoiser.condition(params["network"], batch)
        return self._length_loss(params, batch, context)

    def length_logits(
        self, params: Any, summary: Float[Array, "B D"], source_length: Int[Array, " B"]
    ) -> Float[Array, "B {self.max_length}"]:
        """Of the lengths 1 to `max_length`, from `summarise` and the length of the source."""
        head = params["length"]
        return summary @ head["kernel"] + head["table"][source_length]

    def prior(self, params: Any, summary: Float[Array, "B D"]) -> Float[Array, "B Z"]:
        """Parameters of p(z | c): means and log-variances, or logits of the codes."""
        return summary @ params["latent"]["prior_kernel"] + params["latent"]["prior_bias"][None]

    def posterior(
        self,
        params: Any,
        tokens: Int[Array | np.ndarray, "B L"],
        valid: Bool[Array | np.ndarray, "B L"],
        context: dict,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B Z"]:
        """Parameters of q(z | x, c), as `prior` gives them; for arguments see `MaskedModel`."""
        names = ("memory", "memory_mask")
        options = {name: context[name] for name in names if name in context}
        hidden = self._posterior.hidden(
            params["latent"]["posterior"], tokens, mask=valid, keys=keys, **options
        )
        # A plain mean would be the same for sequences that differ in order alone.
        hidden = hidden * params["latent"]["pool"][None, : tokens.shape[1]]
        prior = self.prior(params, self.summarise(params["network"], context, len(tokens)))
        return prior + _mean(hidden, valid) @ params["latent"]["posterior_kernel"]

    def summarise(self, params: Any, context: dict, batch: int) -> Float[Array, "{batch} D"]:
        """The mean of the encoded source, or the class; 0 without either.

        Args:
          params: of the network, prepared or not.
          context: of `MaskedModel.condition`, or what `EncoderDecoder.encode_source` gives.
          batch: B.
        """
        if "memory" in context:
            return _mean(context["memory"], context["memory_mask"])
        if "label" in context:
            return params["token"][self.denoiser.mask + 1 + context["label"]]
        return jnp.zeros((batch, self.network.config.width))

    def _positions(self, batch):
        """Positions bool [B, L] that are read, and those that count in the loss."""
        inside = valid_mask(batch["tokens"], batch.get("length"))
        valid = inside if self.ending == "length" else jnp.ones_like(inside)
        return valid, valid if self.ending == "eos" else inside

    def _length_loss(self, params, batch, context):  # -> [B]
        tokens = batch["tokens"]
        length = valid_mask(tokens, batch.get("length")).sum(-1)
        summary = self.summarise(params["network"], context, len(tokens))
        logits = self.length_logits(params, summary, source_lengths(batch, len(tokens)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, length - 1)


def _mean(hidden, valid):  # [B, L, D], bool [B, L] or None -> [B, D]
    if valid is None:
        return hidden.mean(axis=1)
    total = jnp.where(valid[..., None], hidden, 0).sum(axis=1)
    return total / jnp.maximum(valid.sum(axis=1), 1)[:, None]


def source_lengths(batch: dict[str, Any], number: int) -> Int[Array | np.ndarray, " B"]:
    """How long the source of each of `number` rows is, int32; 0 where there is none."""
    if "source" not in batch:
        return jnp.zeros(number, jnp.int32)
    whole = jnp.full(number, batch["source"].shape[1], jnp.int32)
    return batch.get("source_length", whole)
