"""Beam search: the most probable continuation, as far as K hypotheses at a time can find it.

A hypothesis of n new tokens is ranked by its log-probability / n ** length_penalty (0 ranks by
the log-probability itself; more favours longer ones). As in transformers, of the 2 K best
extensions those that end among the first K join the finished ones, and the best K that do not
end go on.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from gen_jax.models.autoregressive.losses import read_prompts
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import PreparedParams, TokenNetwork
from kernels import KVCache


@flax.struct.dataclass
class BeamState:
    """What beam search carries from step to step.

    Attributes:
      tokens: int32 [B, K, P + N], hypotheses that go on.
      scores: float32 [B, K], their log-probabilities.
      ended: int32 [B, K, P + N], the best hypotheses that ended.
      ended_scores: float32 [B, K], log-probability / length ** length_penalty; -inf for none.
      caches: per block, of B x K rows.
      first: int32 [B x K], column of the first input, or None.
      read: what the network has read of the condition, B x K rows.
    """

    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    ended_scores: jax.Array
    caches: tuple[KVCache, ...]
    first: jax.Array | None
    read: dict


@dataclasses.dataclass(frozen=True)
class BeamSearchSampler:
    """Beam search on the common loop; deterministic, the keys are not used.

    The condition is `autoregressive.pad_prompts`.

    Attributes:
      network: a causal one.
      prompt_length: P, columns of the prompts.
      tokens: N, new tokens at most.
      beams: K, hypotheses kept.
      length_penalty: exponent of the length in the rank of a hypothesis.
      stop: the token that ends a hypothesis (which is then filled with it), or None.
    """

    network: TokenNetwork | EncoderDecoder
    prompt_length: int
    tokens: int
    beams: int
    length_penalty: float = 1.0
    stop: int | None = None

    def __post_init__(self):
        config = self.network.config
        if not config.causal:
            raise ValueError("beam search needs a causal network")
        if min(self.prompt_length, self.tokens, self.beams) < 1:
            raise ValueError("prompt_length, tokens and beams must be at least 1")
        if self.prompt_length + self.tokens - 1 > config.context:
            raise ValueError(
                f"{self.prompt_length} + {self.tokens} tokens do not fit into the context of "
                f"{config.context}"
            )

    @property
    def steps(self) -> int:
        """One for each new token."""
        return self.tokens

    @property
    def nfe(self) -> int:
        """A pass over the prompt, where it has more than one token, and one per new token."""
        return self.tokens + (self.prompt_length > 1)

    def prepare(self, params) -> PreparedParams:
        """See `TokenNetwork.prepare`."""
        return self.network.prepare(params)

    def init(self, params: PreparedParams, keys, cond) -> BeamState:
        """Reads the prompts once, and copies what was read for every hypothesis."""
        prompt, first = cond["tokens"].astype(jnp.int32), cond.get("first")
        batch = len(prompt)
        columns = self.prompt_length + self.tokens - 1
        read = self.network.encode(params, cond)
        caches = read_prompts(self.network, params, cond, self.prompt_length, columns, read)
        copies = lambda leaf: jnp.repeat(leaf, self.beams, axis=0)  # noqa: E731
        tokens = jnp.pad(copies(prompt), ((0, 0), (0, self.tokens)))
        tokens = tokens.reshape(batch, self.beams, -1)
        none = jnp.full((batch, self.beams), -jnp.inf)
        return BeamState(
            tokens=tokens,
            scores=none.at[:, 0].set(0.0),  # the hypotheses are one as yet
            ended=tokens,
            ended_scores=none,
            caches=jax.tree.map(copies, caches),
            first=None if first is None else copies(first),
            read=jax.tree.map(copies, read),
        )

    def step(self, params: PreparedParams, state: BeamState, i) -> BeamState:
        """Extends every hypothesis by every token, and keeps the best."""
        place = self.prompt_length - 1 + i
        batch, beams, _ = state.tokens.shape
        last = jax.lax.dynamic_slice_in_dim(state.tokens, place, 1, axis=2)
        hidden, caches = self.network.extend(
            params, last.reshape(-1, 1), state.caches, place, state.first, **state.read
        )
        log_prob = jax.nn.log_softmax(self.network.logits(params, hidden[:, 0])).reshape(
            batch, beams, -1
        )
        vocabulary = log_prob.shape[-1]
        extended = (state.scores[..., None] + log_prob).reshape(batch, -1)
        scores, chosen = jax.lax.top_k(extended, min(2 * beams, extended.shape[-1]))
        parent, token = chosen // vocabulary, chosen % vocabulary
        tokens = jnp.take_along_axis(state.tokens, parent[..., None], axis=1)
        tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (0, 0, place + 1))
        if self.stop is not None:
            ends = token == self.stop
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

    def finish(self, params: PreparedParams, state: BeamState) -> jax.Array:
        """The new tokens of the best hypothesis, int32 [B, N]."""
        everything = jnp.ones_like(state.scores, bool)
        state = self._end(state, state.tokens, state.scores, everything, self.tokens)
        return state.ended[:, 0, self.prompt_length :]

    def _end(self, state, tokens, scores, ends, length):
        """Puts hypotheses that end, among the first K, in order with those that ended before."""
        first = jnp.arange(scores.shape[1]) < self.beams
        ranks = scores / jnp.float32(length) ** self.length_penalty
        ranks = jnp.where(ends & first, ranks, -jnp.inf)
        if self.stop is not None:
            rest = jnp.arange(tokens.shape[2]) > self.prompt_length + length - 1
            tokens = jnp.where(rest, self.stop, tokens)
        ranks = jnp.concatenate([state.ended_scores, ranks], axis=1)
        ranks, kept = jax.lax.top_k(ranks, self.beams)
        tokens = jnp.concatenate([state.ended, tokens], axis=1)
        ended = jnp.take_along_axis(tokens, kept[..., None], axis=1)
        return state.replace(ended=ended, ended_scores=ranks)
