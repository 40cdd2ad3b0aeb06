"""What all samplers in rounds share: their state, and what starts and ends a loop.

B batch, L length, T rounds, V vocabulary.
"""

import dataclasses
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import kernels
from gen_jax import keys as key_streams
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.masked.conditions import check_given, check_lengths
from gen_jax.models.masked.config import IterativeOptions
from gen_jax.models.masked.denoisers import Denoiser
from gen_jax.models.masked.schedules import SCHEDULES
from gen_jax.models.sequences import uniform_by_position, valid_mask

__all__ = ["IterativeSampler", "MaskedState"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class MaskedState:
    """What a sampler in rounds carries.

    Attributes:
      keys: [T + 1, 2, B], for the tokens and for the choices of each round, and of the start.
      tokens: int32 [B, L], the mask where nothing is revealed yet, 0 where nothing is valid.
      log_prob: float32 [B, L], of each token when it was chosen; 0 where it was given.
      editable: bool [B, L], the positions to fill.
      valid: bool [B, L], the positions that the sequence has.
      order: float32 [B, L], larger is earlier, where the sampler draws an order; else None.
      context: what the denoiser has encoded.
    """

    keys: Key[Array, "uses 2 B"]
    tokens: Int[Array, "B L"]
    log_prob: Float[Array, "B L"]
    editable: Bool[Array, "B L"]
    valid: Bool[Array, "B L"]
    order: Float[Array, "B L"] | None
    context: Any


@frozen
class IterativeSampler:
    """A sampler in rounds, from masks to tokens; the subclasses say what a round does.

    A round is one evaluation of the denoiser at all positions. Given tokens never change. With one
    round all of them are the one-shot decoder. The samples are int32 [B, L], 0 beyond the length of
    a sequence.

    Attributes:
      model: fills masked positions.
      length: L, the positions of the sampler.
      rounds: T.
    """

    model: Denoiser
    length: int
    rounds: int

    def __post_init__(self):
        if not isinstance(self.model, Denoiser):
            raise ValueError(
                f"model must be a Denoiser, such as MaskedModel, not {type(self.model).__name__}"
            )
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    @classmethod
    def from_options(
        cls, options: IterativeOptions, model: Denoiser, length: int
    ) -> "IterativeSampler":
        """The sampler that the command line chose.

        Args:
          options: those of the sampler. Where its sampler reveals at least one position
            a round, there are at most `length` rounds.
          model: fills masked positions.
          length: L.
        """
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        if "schedule" in values:
            values["schedule"] = SCHEDULES[values["schedule"]]
            values["rounds"] = min(values["rounds"], length)
        return cls(model, length, **values)

    @property
    def steps(self) -> int:
        """One trip of the loop per round."""
        return self.rounds

    @property
    def nfe(self) -> int:
        """One evaluation at all positions per round."""
        return self.rounds

    @property
    def conditions(self) -> tuple[str, ...]:
        """Given tokens, and what the model reads."""
        return ("given", "is_given", *self.model.conditions)

    def check(self, params: Any, cond: Condition) -> None:
        """Refuses parameters and values of the condition that do not fit.

        Raises:
          ValueError: the parameters are not the model's, a length is not in 1 .. L, given tokens
            are not [B, L], not in the vocabulary, or beyond the length, or the model refuses.
        """
        self.model.check(params, cond, self.length)
        check_lengths(cond, self.length)
        check_given(cond, self.length, self.model.vocabulary)

    def prepare(self, params: Any) -> Any:
        """See `Denoiser.prepare`."""
        return self.model.prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> MaskedState:
        """All positions that are not given are masked."""
        fields = cond.fields()
        read = {name: fields[name] for name in self.model.conditions if name in fields}
        context = self.model.encode(params, read)
        return self.start(params, keys, cond.given, cond.is_given, cond.length, context)

    def start(
        self,
        params: Any,
        keys: Key[Array, " B"],
        given: Int[Array | np.ndarray, "B L"] | None,
        is_given: Bool[Array | np.ndarray, "B L"] | None,
        length: Int[Array | np.ndarray, " B"] | None,
        context: dict,
    ) -> MaskedState:
        """The state before the first round, for samplers that are made of this one.

        Args:
          params: of `prepare`.
          keys: one per sequence.
          given: tokens; not read where `is_given` is not set. None where there are none.
          is_given: which of them are given.
          length: of each sequence; None for L.
          context: of `Denoiser.encode`.
        """
        tokens = jnp.full((len(keys), self.length), self.model.mask, jnp.int32)
        valid = valid_mask(tokens, length)
        editable = valid
        if given is not None:
            tokens = jnp.where(is_given, jnp.asarray(given, jnp.int32), tokens)
            editable = valid & ~is_given
        return MaskedState(
            keys=key_streams.grid(keys, self.steps + 1, 2),
            tokens=jnp.where(valid, tokens, 0),
            log_prob=jnp.zeros(tokens.shape, jnp.float32),
            editable=editable,
            valid=valid,
            order=None,
            context=context,
        )

    def finish(self, params: Any, state: MaskedState) -> Int[Array, "B L"]:
        """The tokens, int32, 0 beyond the length of a sequence."""
        return state.tokens

    def _uniform(self, state, i):
        """Uniform draws [B, L] for the choices of round i."""
        # The row is taken of the words: JAX's check of key reuse would take a row with a traced
        # index for all rows.
        words = jax.random.key_data(state.keys)[i, 1]
        keys = jax.random.wrap_key_data(words, impl=jax.random.key_impl(state.keys))
        return uniform_by_position(keys, self.length)

    def _masked(self, state):
        return state.editable & (state.tokens == self.model.mask)

    def _fill(self, params, state, i, temperature, noise=0.0):
        """Tokens, log-probabilities and confidences [B, L] of all masked positions."""
        return kernels.mask_scores(
            self.model(params, state.tokens, state.valid, state.context),
            state.tokens,
            self._masked(state),
            state.keys[i, 0],
            temperature=temperature,
            noise=noise,
        )

    def _reveal(self, state, tokens, log_prob, chosen):
        """Keeps what was filled in at the chosen positions."""
        chosen = chosen & self._masked(state)
        return state.replace(
            tokens=jnp.where(chosen, tokens, state.tokens),
            log_prob=jnp.where(chosen, log_prob, state.log_prob),
        )
