"""Connectionist temporal classification: Graves et al. 2006; for translation Libovicky & Helcl
2018 (1811.04719).

A parallel decoder predicts U columns, more than the target has tokens, each a token or the blank:

    p(x | c) = sum_{a : collapse(a) = x} prod_u p(a_u | c)

where `collapse` makes one token of a run of equal ones and takes the blanks out. The sum over
alignments leaves order and length to the network, and no length is predicted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from gen_jax.models.masked.losses import NetworkDenoiser
from gen_jax.models.parallel.losses import source_lengths
from gen_jax.models.sequences import existing
from gen_jax.nn.encoder_decoder import EncoderDecoder


def ctc_loss(network, params, batch: dict, keys: jax.Array, *, factor: int):
    """Minus the log-probability of the target over all its alignments, in nats per token.

    The last token of the vocabulary is the blank. A target that needs more columns than there are
    does not count.

    Args:
      network: an `EncoderDecoder` that is not causal.
      params: its parameters.
      batch: "tokens" int32 [B, N], "length" int32 [B], and the source.
      keys: [B], for dropout.
      factor: columns for each token of the source.

    Returns:
      The mean, and "unaligned", the share of targets that do not count.
    """
    dropout = keys if network.config.dropout else None
    denoiser, tokens = NetworkDenoiser(network), batch["tokens"]
    blank, exists = _columns(network, batch, factor)
    context = denoiser.condition(params, batch, dropout)
    logits = denoiser.train(params, blank, exists, context, dropout)
    inside = existing(tokens, batch.get("length"))
    # Of the logits, so that the scan of optax begins with what varies over devices as they do.
    low = jax.lax.stop_gradient(logits[0, 0, 0]) * 0 - 1e5
    values = optax.ctc_loss(
        logits,
        1.0 - exists,
        tokens,
        1.0 - inside,
        blank_id=network.config.vocabulary - 1,
        log_epsilon=low,
    )
    repeats = ((tokens[:, 1:] == tokens[:, :-1]) & inside[:, 1:]).sum(-1)
    fits = inside.sum(-1) + repeats <= exists.sum(-1)
    number = jnp.maximum(jnp.where(fits[:, None], inside, False).sum(), 1)
    return jnp.where(fits, values, 0).sum() / number, {"unaligned": (~fits).mean()}


def _columns(network, batch, factor):
    """Masks int32 [B, U], U = factor M, and which of them exist."""
    source = batch["source"]
    length = source_lengths(batch, len(source)) * factor
    blank = jnp.full((len(source), source.shape[1] * factor), network.config.vocabulary, jnp.int32)
    return blank, existing(blank, length)


@dataclasses.dataclass(frozen=True)
class CTCSampler:
    """The most probable alignment, without repetitions and blanks; the keys are not used.

    Attributes:
      network: an `EncoderDecoder` trained with `ctc_loss`.
      factor: columns for each token of the source.
      end: fills what is behind the sequence.
    """

    network: EncoderDecoder
    factor: int
    end: int = 0
    steps = nfe = 1

    def prepare(self, params):
        """See `EncoderDecoder.prepare`."""
        return self.network.prepare(params)

    def init(self, params, keys, cond):
        """Reads the source."""
        blank, exists = _columns(self.network, cond, self.factor)
        context = NetworkDenoiser(self.network).encode(params, cond)
        return {"tokens": blank, "exists": exists, "context": context}

    def step(self, params, state, i):
        """Predicts all columns."""
        denoiser = NetworkDenoiser(self.network)
        logits = denoiser(params, state["tokens"], state["exists"], state["context"])
        return state | {"tokens": logits.argmax(-1).astype(jnp.int32)}

    def finish(self, params, state) -> jax.Array:
        """The tokens, int32 [B, U], with `end` behind them."""
        return collapse(
            state["tokens"], state["exists"], self.network.config.vocabulary - 1, self.end
        )


def collapse(tokens, exists, blank: int, fill: int) -> jax.Array:
    """What an alignment says: runs of equal tokens are one, and blanks are none.

    Args:
      tokens: int32 [B, U].
      exists: bool [B, U].
      blank: the token of no token.
      fill: for the columns that are left over.

    Returns:
      int32 [B, U], aligned to the left.
    """
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    kept = (tokens != before) & (tokens != blank) & exists
    place = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, tokens.shape[1])
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.full_like(tokens, fill).at[rows, place].set(tokens, mode="drop")
