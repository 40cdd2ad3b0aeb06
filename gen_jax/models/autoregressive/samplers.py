"""Ancestral sampling from an autoregressive model, one token per step."""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

import kernels
from gen_jax import keys as key_streams
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive import prompts
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.contract import check_params
from gen_jax.models.sequences import fill_after_eos
from gen_jax.nn.transformer import check_finite
from kernels import KVCache

__all__ = ["AutoregressiveSampler", "DecodingState"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class DecodingState:
    """What autoregressive decoding carries from step to step.

    Attributes:
      keys: one for each new token of each sample.
      tokens: int32, the inputs of `prompts.first_inputs` and the N new tokens after them.
      caches: per block, of `cache_length` columns.
      first: int32, the column of the first input of each sample; None where all rows are full.
      encoded: what the network has read of the condition, beside the prompts.
      offset: int32, the place in `tokens` of column 0 of the caches.
      done: whether the token that ends a sample has come.
    """

    keys: Key[Array, "N B"]
    tokens: Int[Array, "B T"]
    caches: tuple[KVCache, ...]
    first: Int[Array, " B"] | None
    encoded: dict[str, Any]
    offset: Int[Array, ""]
    done: Bool[Array, " B"]


@frozen
class AutoregressiveSampler:
    """Ancestral sampling, one token per step, with cached keys and values.

    A model with a start token begins every sample with it, V + label, before the prompt. All but
    the last of these first inputs are read in one pass before the loop; step i reads the token
    before new token i and draws that. A source is read once. Where first inputs and new tokens are
    longer than the context, the network goes on from the last half of a context each time that the
    caches are full; one pass reads that half again.

    Attributes:
      model: of which the samples are.
      prompt_length: P, given tokens; at least 1 for a model without a start token, which does not
        count.
      tokens: N, how many to draw, at least 1.
      options: how each is drawn.
      eos: the token that ends a sample; the rest of it is filled with the same, and the loop ends
        when all samples have ended. None where nothing ends them.

    Raises:
      ValueError: at construction, where a number is out of range, the prompt does not fit into the
        context, or weights in int8 are asked of a network that reads a source.
    """

    model: AutoregressiveModel
    prompt_length: int
    tokens: int
    options: SamplingOptions = SamplingOptions()
    eos: int | None = None

    def __post_init__(self):
        prompts.check_prompt_length(self.model, self.prompt_length)
        if self.tokens < 1:
            raise ValueError(f"the number of new tokens must be at least 1, got {self.tokens}")
        if self._width > self._context:
            raise ValueError(
                f"a prompt of {self.prompt_length} tokens does not fit into the context of "
                f"{self._context}{' with its start token' if self.model.has_start else ''}"
            )
        prompts.check_eos(self.model, self.eos)
        if self._has_int8 and self.model.network.config.memory:
            raise ValueError("weights in int8 are for models without a source: leave them as own")

    @classmethod
    def from_options(
        cls,
        options: SamplingOptions,
        model: AutoregressiveModel,
        prompt_length: int,
        tokens: int,
        eos: int | None = None,
    ) -> "AutoregressiveSampler":
        """The sampler that options of the command line ask for."""
        return cls(model, prompt_length, tokens, options, eos)

    @property
    def conditions(self) -> tuple[str, ...]:
        """See `Sampler`."""
        return prompts.conditions_of(self.model)

    @property
    def steps(self) -> int:
        """One for each new token."""
        return self.tokens

    @property
    def nfe(self) -> int:
        """A pass over the first inputs, where there is more than one, and one per new token.

        A pass for each time that the caches are full joins them. The token that ends a sample may
        end the loop earlier.
        """
        slides = -(-(self._inputs - self.cache_length) // (self.cache_length - self._kept))
        slides = slides if self._kept else 0  # a context of one token has nothing to read again
        return self.tokens + (self._width > 1) + slides

    @property
    def cache_length(self) -> int:
        """Columns of the caches."""
        return min(self._inputs, self._context)

    @property
    def _has_int8(self):
        return self.options.weights == "int8"

    @property
    def _context(self):
        return self.model.network.config.context

    @property
    def _width(self):
        return self.prompt_length + self.model.has_start

    @property
    def _inputs(self):  # the last token drawn is not read
        return self._width + self.tokens - 1

    @property
    def _kept(self):
        return self.cache_length // 2

    def check(self, params: Any, cond: Condition) -> None:
        """See `Sampler`; `prompts.check_condition` says what is refused."""
        check_params(self.model, params)
        if self._has_int8:
            check_finite(params)
        prompts.check_condition(self.model, self.prompt_length, cond)

    def prepare(self, params: Any) -> Any:
        """See `TokenNetwork.prepare` and, with weights in int8, `TokenNetwork.prepare_int8`."""
        network = self.model.network
        return network.prepare_int8(params) if self._has_int8 else network.prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> DecodingState:
        """Reads the first inputs, up to their last."""
        state = self._before(params, keys, cond)
        inputs, network = state.tokens[:, : self._width], self.model.network
        caches = prompts.prefill(
            network, params, inputs, self.cache_length, state.first, state.encoded
        )
        return state.replace(caches=caches)

    def _before(self, params, keys, cond):
        """The state in which nothing was read but the source."""
        inputs, first = prompts.first_inputs(self.model, cond, len(keys))
        return DecodingState(
            keys=key_streams.grid(keys, self.tokens),
            tokens=jnp.pad(inputs, ((0, 0), (0, self.tokens))),
            caches=(),
            first=first,
            encoded=self.model.network.encode(params, prompts.source_of(cond)),
            offset=jnp.int32(0),
            done=jnp.zeros(len(keys), bool),
        )

    def step(self, params: Any, state: DecodingState, i: Int[Array, ""] | int) -> DecodingState:
        """Reads the last token and draws the next."""
        place = self._width - 1 + i
        if self._inputs > self.cache_length:
            full = place - state.offset == self.cache_length
            state = jax.lax.cond(full, self._slide, lambda _, state: state, params, state)
        last = jax.lax.dynamic_slice_in_dim(state.tokens, place, 1, axis=1)
        hidden, caches = self.model.network.extend(
            params, last, state.caches, place - state.offset, state.first, **state.encoded
        )
        return self._join(params, state.replace(caches=caches), hidden[:, 0], i)

    def _join(self, params, state, hidden, i):
        """The state with new token i, drawn from the hidden values [B, D] of the one before it."""
        if self._has_int8:
            logits = self.model.network.logits(params, hidden)
            token = kernels.sample_logits(logits, state.keys[i], **self.options.choice)
        else:
            token = kernels.sample_token(hidden, params.head, state.keys[i], **self.options.choice)
        done = state.done
        if self.eos is not None:
            token = jnp.where(done, self.eos, token)
            done |= token == self.eos
        place = (0, self._width + i)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], place)
        return state.replace(tokens=tokens, done=done)

    def stopped(self, state: DecodingState) -> Bool[Array, ""] | None:
        """Whether all samples have ended; None where nothing ends them."""
        return None if self.eos is None else state.done.all()

    def new_tokens(self, state: DecodingState) -> Int[Array, "B N"]:
        """The new tokens so far; 0 where they are still to come."""
        return state.tokens[:, self._width :]

    def finish(self, params: Any, state: DecodingState) -> Int[Array, "B N"]:
        """The new tokens, int32."""
        tokens = self.new_tokens(state)
        # The loop may have ended before all places were filled.
        return tokens if self.eos is None else fill_after_eos(tokens, self.eos)

    def _slide(self, params, state):
        """Begins again with the last `_kept` tokens, when the caches are full."""
        kept = self._kept
        shift = self.cache_length - kept
        offset = state.offset + shift
        if not kept:
            return state.replace(offset=offset)
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens, offset, kept, axis=1)
        first = None if state.first is None else jnp.maximum(state.first - shift, 0)
        _, caches = self.model.network.extend(
            params, tokens, state.caches, 0, first, **state.encoded
        )
        return state.replace(caches=caches, first=first, offset=offset)
