"""Connectionist temporal classification, equation (3): its loss, and its most probable alignment.

B batch, L length of the target, M source length, U = factor x M columns, V vocabulary, of which the
last token is the blank.
"""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models import contract
from gen_jax.models.masked.conditions import check_source
from gen_jax.models.masked.losses import MaskedModel
from gen_jax.models.parallel.losses import source_lengths
from gen_jax.models.sequences import valid_mask
from gen_jax.nn.encoder_decoder import EncoderDecoder

__all__ = ["CTCModel", "CTCSampler", "CTCState", "collapse"]


@frozen
class CTCModel:
    """A parallel decoder of columns, of which each is a token or the blank.

    A batch has "tokens" int [B, L], without blanks; "length" int [B] where targets differ in it;
    and "source" int [B, M], with "source_length" int [B] where sources differ in it.

    Attributes:
      network: one that is not causal, with an extra input for the mask, which all columns read.
      factor: columns for each token of the source, at least 1.
    """

    network: EncoderDecoder
    factor: int

    def __post_init__(self):
        _ = self.denoiser  # refuses networks that cannot be one
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    @property
    def denoiser(self) -> MaskedModel:
        """The network, which fills masks."""
        return MaskedModel(self.network)

    @property
    def blank(self) -> int:
        """V - 1, the token of no token."""
        return self.network.config.vocabulary - 1

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh float32 parameters."""
        return self.network.init(key)

    def loss(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Minus the log-probability of the target over all its alignments, in nats per token.

        A target that needs more columns than there are does not count.

        Args:
          params: of `init`.
          batch: see the class.
          keys: one per sequence, for dropout.

        Returns:
          The mean over tokens, and "unaligned", the share of targets that do not count.
        """
        dropout = keys if self.network.config.dropout else None
        values, fits, inside = self._nats(params, batch, dropout)
        number = jnp.maximum(jnp.where(fits[:, None], inside, False).sum(), 1)
        return jnp.where(fits, values, 0).sum() / number, {"unaligned": (~fits).mean()}

    def log_prob(self, params: Any, batch: dict[str, Any]) -> Float[Array, " B"]:
        """The exact log-probability of each target, float32 in nats; -inf without an alignment."""
        values, fits, _ = self._nats(params, batch, None)
        return jnp.where(fits, -values, -jnp.inf)

    def _nats(self, params, batch, dropout):
        """Minus log-probabilities [B], which targets have an alignment, and positions [B, L]."""
        tokens = batch["tokens"]
        masks, valid = self.columns(batch)
        context = self.denoiser.condition(params, batch, dropout)
        logits = self.denoiser.logits(params, masks, valid, context, dropout)
        inside = valid_mask(tokens, batch.get("length"))
        # Of the logits, so that the scan of optax begins with what varies over devices as they do.
        low = jax.lax.stop_gradient(logits[0, 0, 0]) * 0 - 1e5
        values = optax.ctc_loss(
            logits, 1.0 - valid, tokens, 1.0 - inside, blank_id=self.blank, log_epsilon=low
        )
        repeats = ((tokens[:, 1:] == tokens[:, :-1]) & inside[:, 1:]).sum(-1)
        return values, inside.sum(-1) + repeats <= valid.sum(-1), inside

    def columns(self, batch: dict[str, Any]) -> tuple[Int[Array, "B U"], Bool[Array, "B U"]]:
        """The inputs of the decoder, masks alone, and which columns are valid."""
        source = batch["source"]
        length = source_lengths(batch, len(source)) * self.factor
        shape = (len(source), source.shape[1] * self.factor)
        masks = jnp.full(shape, self.denoiser.mask, jnp.int32)
        return masks, valid_mask(masks, length)


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class CTCState:
    """What the sampler of one step carries.

    Attributes:
      tokens: int32 [B, U], masks before the step and an alignment after it.
      valid: bool [B, U].
      context: what the denoiser has encoded.
    """

    tokens: Int[Array, "B U"]
    valid: Bool[Array, "B U"]
    context: Any


@frozen
class CTCSampler:
    """The most probable alignment, without repetitions and blanks; the keys are not used.

    Attributes:
      model: says how many columns there are.
      eos: fills what is behind the sequence, at least 0.
    """

    model: CTCModel
    eos: int

    def __post_init__(self):
        if self.eos < 0:
            raise ValueError(f"eos must not be negative, got {self.eos}")

    @property
    def steps(self) -> int:
        """One."""
        return 1

    @property
    def nfe(self) -> int:
        """One evaluation of all columns."""
        return 1

    @property
    def conditions(self) -> tuple[str, ...]:
        """The source, and the label of a network with classes."""
        return tuple(name for name in self.model.denoiser.conditions if name != "length")

    def check(self, params: Any, cond: Condition) -> None:
        """Refuses parameters and values of the condition that do not fit.

        Raises:
          ValueError: the parameters are not the model's, or there is no source that can be read.
        """
        contract.check_params(self.model, params)
        contract.check_label(cond, self.model.denoiser.classes)
        check_source(cond, self.model.denoiser.vocabulary)

    def prepare(self, params: Any) -> Any:
        """See `EncoderDecoder.prepare`."""
        return self.model.denoiser.prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> CTCState:
        """Encodes the source."""
        masks, valid = self.model.columns(cond.fields())
        return CTCState(masks, valid, self.model.denoiser.encode(params, cond.fields()))

    def step(self, params: Any, state: CTCState, i: Int[Array, ""] | int) -> CTCState:
        """Predicts all columns."""
        logits = self.model.denoiser(params, state.tokens, state.valid, state.context)
        return state.replace(tokens=logits.argmax(-1).astype(jnp.int32))

    def finish(self, params: Any, state: CTCState) -> Int[Array, "B U"]:
        """The tokens, int32, with `eos` behind them."""
        return collapse(state.tokens, state.valid, self.model.blank, self.eos)


def collapse(
    tokens: Int[Array | np.ndarray, "B U"],
    valid: Bool[Array | np.ndarray, "B U"],
    blank: int,
    fill: int,
) -> Int[Array, "B U"]:
    """What an alignment says: runs of equal tokens are one, and blanks are none.

    Args:
      tokens: the alignment.
      valid: its columns.
      blank: the token of no token.
      fill: for the columns that are left over.

    Returns:
      int32, aligned to the left.
    """
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    kept = (tokens != before) & (tokens != blank) & valid
    place = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, tokens.shape[1])
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.full_like(tokens, fill).at[rows, place].set(tokens, mode="drop")
