"""Speculative decoding: a small model drafts, the large one checks several tokens in one pass.

Leviathan et al. 2023 (2211.17192), Chen et al. 2023 (2302.01318). With p the distribution of the
large model and q that of the draft, both after the same filters, a drafted token x is kept with
probability min(1, p(x) / q(x)); the first one refused is replaced by a draw from the positive
part of p - q, normalised. Every token then has distribution p, whatever the draft is.
"""

import dataclasses
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

import kernels
from gen_jax import keys as key_streams
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive import prompts
from gen_jax.models.autoregressive.config import SamplingOptions, SpeculativeOptions
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.contract import check_params
from gen_jax.nn.transformer import TokenNetwork, check_finite
from kernels import KVCache
from kernels.threefry import uniform_each

__all__ = ["SpeculativeSampler", "SpeculativeState", "plain"]


def plain(options: SpeculativeOptions) -> SamplingOptions:
    """How each token is drawn, without the draft."""
    fields = (field.name for field in dataclasses.fields(SamplingOptions))
    return SamplingOptions(**{name: getattr(options, name) for name in fields})


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class SpeculativeState:
    """What speculative decoding carries from round to round.

    Attributes:
      keys: for the G drafted tokens of each round and the one that ends it.
      uniforms: float32, against which drafted tokens are kept.
      tokens: int32, first inputs and new tokens, of which the first `known` of each sample are
        final, with room for one round more.
      known: int32, between the number of first inputs and that with all new tokens.
      done: whether N tokens, or the token that ends a sample, are there.
      caches: of the large model.
      draft_caches: of the draft.
      first: int32, the column of the first input of each sample; None where all rows are full.
      rounds: int32, rounds that each sample took.
      kept: int32, drafted tokens kept in them, also those that the last round has no room for.
    """

    keys: Key[Array, "N G+1 B"]
    uniforms: Float[Array, "N B G"]
    tokens: Int[Array, "B T"]
    known: Int[Array, " B"]
    done: Bool[Array, " B"]
    caches: tuple[KVCache, ...]
    draft_caches: tuple[KVCache, ...]
    first: Int[Array, " B"] | None
    rounds: Int[Array, " B"]
    kept: Int[Array, " B"]


@frozen
class SpeculativeSampler:
    """Ancestral sampling of the large model, in fewer passes of it.

    Its parameters are {"target": those of the model, "draft": those of the draft}. A step is a
    round: `drafted` passes of the draft, and one of the large model over one token more. The loop
    ends when all samples are complete.

    Attributes:
      model: the large one, which the samples are of; its network is a `TokenNetwork`.
      draft: a model of the same tokens.
      prompt_length: P, given tokens; at least 1 for models without a start token, which does not
        count.
      tokens: N, how many to draw, at least 1.
      drafted: G, tokens drafted in one round, at least 1.
      options: how each token is drawn, by both models; the weights are those of the large one.
      eos: the token that ends a sample; the rest of it is filled with the same. None where nothing
        ends them.

    Raises:
      ValueError: at construction, where the models do not go together, a number is out of range or
        the tokens do not fit into both contexts.
    """

    model: AutoregressiveModel
    draft: AutoregressiveModel
    prompt_length: int
    tokens: int
    drafted: int = 4
    options: SamplingOptions = SamplingOptions()
    eos: int | None = None

    def __post_init__(self):
        networks = self.model.network, self.draft.network
        if not all(isinstance(network, TokenNetwork) for network in networks):
            raise ValueError("speculative decoding is for models without a source")
        large, small = (network.config for network in networks)
        if (large.vocabulary, large.extra_inputs) != (small.vocabulary, small.extra_inputs):
            raise ValueError(
                f"the draft reads {small.vocabulary} + {small.extra_inputs} tokens, the large "
                f"model {large.vocabulary} + {large.extra_inputs}: they must be the same"
            )
        prompts.check_prompt_length(self.model, self.prompt_length)
        if min(self.tokens, self.drafted) < 1:
            raise ValueError(
                f"tokens and drafted must be at least 1, got {self.tokens} and {self.drafted}"
            )
        if self.cache_length > min(large.context, small.context):
            most = min(large.context, small.context) - self._width - self.drafted
            raise ValueError(
                f"{self._width} + {self.tokens} tokens and {self.drafted} drafted ones do not fit "
                f"into the context of {min(large.context, small.context)}: draw at most {most}"
            )
        prompts.check_eos(self.model, self.eos)

    @classmethod
    def from_options(
        cls,
        options: SpeculativeOptions,
        model: AutoregressiveModel,
        draft: AutoregressiveModel,
        prompt_length: int,
        tokens: int,
        eos: int | None = None,
    ) -> "SpeculativeSampler":
        """The sampler that the command line chose; `draft` is the model of `options.draft`."""
        return cls(model, draft, prompt_length, tokens, options.drafted, plain(options), eos)

    @property
    def conditions(self) -> tuple[str, ...]:
        """See `Sampler`."""
        return prompts.conditions_of(self.model)

    @property
    def steps(self) -> int:
        """Rounds at most: one for each token, when nothing drafted is kept."""
        return self.tokens

    @property
    def nfe(self) -> int:
        """Passes of the large model at most."""
        return self.tokens + (self._width > 1)

    @property
    def cache_length(self) -> int:
        """Columns of the caches."""
        return self._width + self.tokens + self.drafted

    @property
    def _width(self):
        return self.prompt_length + self.model.has_start

    def check(self, params: Any, cond: Condition) -> None:
        """See `Sampler`; `prompts.check_condition` says what is refused."""
        if not isinstance(params, dict) or params.keys() != {"target", "draft"}:
            raise ValueError(
                'speculative decoding takes the parameters of two models: {"target": ..., '
                '"draft": ...}'
            )
        check_params(self.model, params["target"])
        check_params(self.draft, params["draft"])
        if self.options.weights == "int8":
            check_finite(params["target"])
        prompts.check_condition(self.model, self.prompt_length, cond)

    def prepare(self, params: dict[str, Any]) -> dict[str, Any]:
        """See `TokenNetwork.prepare`."""
        large = self.model.network
        prepare = large.prepare_int8 if self.options.weights == "int8" else large.prepare
        return {
            "target": prepare(params["target"]),
            "draft": self.draft.network.prepare(params["draft"]),
        }

    def init(
        self, params: dict[str, Any], keys: Key[Array, " B"], cond: Condition
    ) -> SpeculativeState:
        """Both models read the first inputs, up to their last."""
        batch, cache_length = len(keys), self.cache_length
        inputs, first = prompts.first_inputs(self.model, cond, batch)
        target, draft = params["target"], params["draft"]
        keys = key_streams.grid(keys, self.tokens, self.drafted + 2)
        return SpeculativeState(
            keys=keys[:, 1:],
            uniforms=uniform_each(keys[:, 0], (self.drafted,)),
            tokens=jnp.pad(inputs, ((0, 0), (0, self.tokens + self.drafted + 1))),
            known=jnp.full(batch, self._width, jnp.int32),
            done=jnp.zeros(batch, bool),
            caches=prompts.prefill(self.model.network, target, inputs, cache_length, first),
            draft_caches=prompts.prefill(self.draft.network, draft, inputs, cache_length, first),
            first=first,
            rounds=jnp.zeros(batch, jnp.int32),
            kept=jnp.zeros(batch, jnp.int32),
        )

    def step(
        self, params: dict[str, Any], state: SpeculativeState, i: Int[Array, ""] | int
    ) -> SpeculativeState:
        """One round: draft, check, keep what agrees and draw one token more."""
        drafted, proposal, draft_caches = self._draft(params["draft"], state, state.keys[i])
        wanted, caches = self._wanted(params["target"], state, drafted)
        kept, end = self._accept(
            drafted, proposal, wanted, state.uniforms[i], state.keys[i, self.drafted]
        )
        places = jnp.arange(self.drafted + 1)[None]
        block = jnp.where(places == kept[:, None], end[:, None], jnp.pad(drafted, ((0, 0), (0, 1))))
        tokens = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
            state.tokens, block, state.known
        )
        new, ended = kept + 1, False
        if self.eos is not None:
            is_eos = (block == self.eos) & (places <= kept[:, None])
            ended = is_eos.any(axis=1)
            new = jnp.where(ended, jnp.argmax(is_eos, axis=1) + 1, new)
        whole = self._width + self.tokens
        known = jnp.where(state.done, state.known, jnp.minimum(state.known + new, whole))
        return state.replace(
            tokens=tokens,
            known=known,
            done=state.done | ended | (known == whole),
            caches=caches,
            draft_caches=draft_caches,
            rounds=state.rounds + ~state.done,
            kept=state.kept + jnp.where(state.done, 0, kept),
        )

    def stopped(self, state: SpeculativeState) -> Bool[Array, ""]:
        """Whether all samples are complete."""
        return state.done.all()

    def new_tokens(self, state: SpeculativeState) -> Int[Array, "B N"]:
        """The new tokens so far; those after the first `known` of a sample may still change."""
        return state.tokens[:, self._width : self._width + self.tokens]

    def accepted(self, state: SpeculativeState) -> Float[Array, ""]:
        """The share of drafted tokens that were kept, of all samples."""
        return state.kept.sum() / (state.rounds.sum() * self.drafted)

    def finish(self, params: Any, state: SpeculativeState) -> Int[Array, "B N"]:
        """The new tokens, int32."""
        tokens = self.new_tokens(state)
        if self.eos is None:
            return tokens
        places = jnp.arange(self._width, self._width + self.tokens)[None]
        return jnp.where(places < state.known[:, None], tokens, self.eos)

    def _draft(self, params, state, keys):
        """G drafted tokens [B, G], the logits that they were drawn from [B, G, V], and caches."""
        # The draft has not read the token before last where the round before kept all: it reads
        # two at once, which costs a small batch no more than one.
        network, column = self.draft.network, jnp.maximum(state.known - 2, 0)
        pair = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (2,)))(
            state.tokens, column
        )
        hidden, caches = network.extend(params, pair, state.draft_caches, column, state.first)
        hidden = jnp.where((state.known == 1)[:, None, None], hidden[:, :1], hidden[:, 1:])
        tokens, proposals = [], []
        for j in range(self.drafted):
            if j:
                hidden, caches = network.extend(
                    params, tokens[-1][:, None], caches, state.known - 1 + j, state.first
                )
            logits = self._filtered(network.logits(params, hidden[:, 0]))
            tokens.append(kernels.sample_logits(logits, keys[j]))
            proposals.append(logits)
        return jnp.stack(tokens, axis=1), jnp.stack(proposals, axis=1), caches

    def _wanted(self, params, state, drafted):
        """The large model's distributions of G + 1 tokens [B, G + 1, V], and its caches."""
        network, before = self.model.network, state.known - 1
        last = jnp.take_along_axis(state.tokens, before[:, None], axis=1)
        inputs = jnp.concatenate([last, drafted], axis=1)
        hidden, caches = network.extend(params, inputs, state.caches, before, state.first)
        return jax.nn.softmax(self._filtered(network.logits(params, hidden)), axis=-1), caches

    def _accept(self, drafted, proposal, wanted, uniforms, keys):
        """How many drafted tokens are kept, int32 [B], and the token after them [B]."""
        proposal = jnp.pad(jax.nn.softmax(proposal, axis=-1), ((0, 0), (0, 1), (0, 0)))
        ids = drafted[..., None]
        p = jnp.take_along_axis(wanted[:, :-1], ids, axis=-1)[..., 0]
        q = jnp.take_along_axis(proposal[:, :-1], ids, axis=-1)[..., 0]
        kept = jnp.cumprod(uniforms * q < p, axis=1).sum(axis=1)
        p = jnp.take_along_axis(wanted, kept[:, None, None], axis=1)[:, 0]
        q = jnp.take_along_axis(proposal, kept[:, None, None], axis=1)[:, 0]
        rest = jnp.maximum(p - q, 0)
        rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)  # p = q up to rounding
        return kept, kernels.sample_logits(jnp.log(rest), keys)

    def _filtered(self, logits):  # [..., V], -inf where excluded
        rows = logits.reshape(-1, logits.shape[-1])
        if self.options.temperature == 0:
            best = rows.argmax(axis=-1, keepdims=True)
            filtered = jnp.where(jnp.arange(rows.shape[-1])[None] == best, 0.0, -jnp.inf)
        else:
            filtered = kernels.filter_logits(rows, **self.options.choice)
        return filtered.reshape(logits.shape)
