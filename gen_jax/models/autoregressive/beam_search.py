"""Beam search: the most probable continuation, as far as K hypotheses at a time can find it.

A hypothesis of n new tokens is ranked by its log-probability / n ** length_penalty (0 ranks by
the log-probability itself; more favours longer ones). As in transformers, of the 2 K best
extensions those that end among the first K join the finished ones, and the best K that do not
end go on.
"""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive import prompts
from gen_jax.models.autoregressive.config import BeamSearchOptions
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.contract import check_params
from kernels import KVCache

__all__ = ["BeamSearchSampler", "BeamSearchState"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class BeamSearchState:
    """What beam search carries from step to step.

    Attributes:
      tokens: int32, first inputs and new tokens of the K hypotheses that go on.
      scores: float32, their log-probabilities in nats.
      ended: int32, the best hypotheses that ended.
      ended_scores: float32, log-probability / length ** length_penalty; -inf for none.
      caches: per block, of B x K rows.
      first: int32, the column of the first input of B x K rows, or None where all are full.
      encoded: what the network has read of the condition, B x K rows.
    """

    tokens: Int[Array, "B beams T"]
    scores: Float[Array, "B beams"]
    ended: Int[Array, "B beams T"]
    ended_scores: Float[Array, "B beams"]
    caches: tuple[KVCache, ...]
    first: Int[Array, " rows"] | None
    encoded: dict[str, Any]


@frozen
class BeamSearchSampler:
    """Beam search on the common loop; it is deterministic, and does not use the keys.

    Attributes:
      model: of which the continuation is to be probable.
      prompt_length: P, given tokens; at least 1 for a model without a start token, which does not
        count.
      tokens: N, new tokens at most, at least 1.
      beams: K, hypotheses kept, at least 1.
      length_penalty: exponent of the length in the rank of a hypothesis.
      eos: the token that ends a hypothesis (which is then filled with it), or None.

    Raises:
      ValueError: at construction, where a number is out of range or the tokens do not fit into
        the context.
    """

    model: AutoregressiveModel
    prompt_length: int
    tokens: int
    beams: int
    length_penalty: float = 1.0
    eos: int | None = None

    def __post_init__(self):
        prompts.check_prompt_length(self.model, self.prompt_length)
        if min(self.tokens, self.beams) < 1:
            raise ValueError(
                f"tokens and beams must be at least 1, got {self.tokens} and {self.beams}"
            )
        context = self.model.network.config.context
        if self.cache_length > context:
            raise ValueError(
                f"{self._width} + {self.tokens} tokens do not fit into the context of {context}"
            )
        prompts.check_eos(self.model, self.eos)

    @classmethod
    def from_options(
        cls,
        options: BeamSearchOptions,
        model: AutoregressiveModel,
        prompt_length: int,
        tokens: int,
        eos: int | None = None,
    ) -> "BeamSearchSampler":
        """The sampler that options of the command line ask for."""
        return cls(model, prompt_length, tokens, options.beams, options.length_penalty, eos)

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
        """A pass over the first inputs, where there is more than one, and one per new token."""
        return self.tokens + (self._width > 1)

    @property
    def cache_length(self) -> int:
        """Columns of the caches."""
        return self._width + self.tokens - 1

    @property
    def _width(self):
        return self.prompt_length + self.model.has_start

    def check(self, params: Any, cond: Condition) -> None:
        """See `Sampler`; `prompts.check_condition` says what is refused."""
        check_params(self.model, params)
        prompts.check_condition(self.model, self.prompt_length, cond)

    def prepare(self, params: Any) -> Any:
        """See `TokenNetwork.prepare`."""
        return self.model.network.prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> BeamSearchState:
        """Reads the first inputs once, and copies what was read for every hypothesis."""
        network, batch = self.model.network, len(keys)
        inputs, first = prompts.first_inputs(self.model, cond, batch)
        encoded = network.encode(params, prompts.source_of(cond))
        caches = prompts.prefill(network, params, inputs, self.cache_length, first, encoded)

        def copies(leaf):
            return jnp.repeat(leaf, self.beams, axis=0)

        tokens = jnp.pad(copies(inputs), ((0, 0), (0, self.tokens)))
        tokens = tokens.reshape(batch, self.beams, -1)
        none = jnp.full((batch, self.beams), -jnp.inf)
        return BeamSearchState(
            tokens=tokens,
            scores=none.at[:, 0].set(0.0),  # the hypotheses are one as yet
            ended=tokens,
            ended_scores=none,
            caches=jax.tree.map(copies, caches),
            first=None if first is None else copies(first),
            encoded=jax.tree.map(copies, encoded),
        )

    def step(self, params: Any, state: BeamSearchState, i: Int[Array, ""] | int) -> BeamSearchState:
        """Extends every hypothesis by every token, and keeps the best."""
        place = self._width - 1 + i
        batch, beams, _ = state.tokens.shape
        scores, chosen, caches = self._extend(params, state, place)
        parent, token = chosen // self.model.vocabulary, chosen % self.model.vocabulary
        tokens = jnp.take_along_axis(state.tokens, parent[..., None], axis=1)
        tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (0, 0, place + 1))
        if self.eos is not None:
            ends = token == self.eos
            state = self._end(state, tokens, scores, ends, i + 1)
            scores = jnp.where(ends, -jnp.inf, scores)
        scores, kept = jax.lax.top_k(scores, beams)
        parent = jnp.take_along_axis(parent, kept, axis=1)
        origin = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        return state.replace(
            tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
            scores=scores,
            caches=jax.tree.map(lambda leaf: leaf[origin], caches),
        )

    def _extend(self, params, state, place):
        """The best 2 K extensions: scores [B, 2 K], hypothesis x V + token [B, 2 K]; caches."""
        network = self.model.network
        batch, beams, _ = state.tokens.shape
        last = jax.lax.dynamic_slice_in_dim(state.tokens, place, 1, axis=2)
        hidden, caches = network.extend(
            params, last.reshape(-1, 1), state.caches, place, state.first, **state.encoded
        )
        log_prob = jax.nn.log_softmax(network.logits(params, hidden[:, 0]))
        log_prob = log_prob.reshape(batch, beams, -1)
        extended = (state.scores[..., None] + log_prob).reshape(batch, -1)
        return *jax.lax.top_k(extended, min(2 * beams, extended.shape[-1])), caches

    def finish(self, params: Any, state: BeamSearchState) -> Int[Array, "B N"]:
        """The new tokens of the best hypothesis, int32."""
        everything = jnp.ones_like(state.scores, bool)
        state = self._end(state, state.tokens, state.scores, everything, self.tokens)
        return state.ended[:, 0, self._width :]

    def _end(self, state, tokens, scores, ends, length):
        """Puts hypotheses that end, among the first K, in order with those that ended before."""
        first = jnp.arange(scores.shape[1])[None] < self.beams
        ranks = scores / jnp.float32(length) ** self.length_penalty
        ranks = jnp.where(ends & first, ranks, -jnp.inf)
        if self.eos is not None:
            rest = jnp.arange(tokens.shape[2]) > self._width + length - 1
            tokens = jnp.where(rest[None, None], self.eos, tokens)
        ranks = jnp.concatenate([state.ended_scores, ranks], axis=1)
        ranks, kept = jax.lax.top_k(ranks, self.beams)
        tokens = jnp.concatenate([state.ended, tokens], axis=1)
        ended = jnp.take_along_axis(tokens, kept[..., None], axis=1)
        return state.replace(ended=ended, ended_scores=ranks)
