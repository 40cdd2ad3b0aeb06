"""Speculative decoding: a small model drafts, the large one checks several tokens in one pass.

Leviathan et al. 2023 (2211.17192), Chen et al. 2023 (2302.01318). With p the distribution of the
large model and q that of the draft, both after the same filters, a drafted token x is kept with
probability min(1, p(x) / q(x)); the first one refused is replaced by a draw from the positive
part of p - q, normalised. Every token then has distribution p, whatever the draft is.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

import kernels
from gen_jax import keys as key_streams
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.models.autoregressive.losses import read_prompts
from gen_jax.nn.transformer import PreparedParams, TokenNetwork
from kernels import KVCache


@flax.struct.dataclass
class SpeculativeState:
    """What speculative decoding carries from round to round.

    Attributes:
      keys: [N, G + 1, B], for the drafted tokens and the one that ends a round.
      uniforms: float32 [N, B, G], against which drafted tokens are kept.
      tokens: int32 [B, P + N + G + 1], of which the first `known` of each sample are final.
      known: int32 [B].
      done: bool [B], whether N tokens, or the stop token, are there.
      caches: of the large model; `draft_caches`: of the draft.
      first: int32 [B], column of the first input of each sample, or None.
      rounds: int32 [B], rounds that each sample took.
    """

    keys: jax.Array
    uniforms: jax.Array
    tokens: jax.Array
    known: jax.Array
    done: jax.Array
    caches: tuple[KVCache, ...]
    draft_caches: tuple[KVCache, ...]
    first: jax.Array | None
    rounds: jax.Array


@dataclasses.dataclass(frozen=True)
class SpeculativeSampler:
    """Ancestral sampling of the large model, in fewer passes of it.

    Takes params {"target": ..., "draft": ...}; the condition is `autoregressive.pad_prompts`. A
    step is a round: `drafted` passes of the draft, one of the large model over one token more.
    The loop ends when all samples are complete.

    Attributes:
      network: the large model, causal.
      draft: a causal network over the same tokens.
      prompt_length: P, columns of the prompts.
      tokens: N, how many to draw.
      drafted: G, tokens drafted in one round.
      choice: how each token is drawn, by both models.
      stop: the token that ends a sample; the rest of it is filled with the same. None for none.
    """

    network: TokenNetwork
    draft: TokenNetwork
    prompt_length: int
    tokens: int
    drafted: int = 4
    choice: TokenChoice = TokenChoice()
    stop: int | None = None

    def __post_init__(self):
        large, small = self.network.config, self.draft.config
        if not (large.causal and small.causal):
            raise ValueError("speculative decoding needs two causal networks")
        if (large.vocabulary, large.extra_inputs) != (small.vocabulary, small.extra_inputs):
            raise ValueError(
                f"the draft reads {small.vocabulary} + {small.extra_inputs} tokens, the large "
                f"model {large.vocabulary} + {large.extra_inputs}: they must be the same"
            )
        if min(self.prompt_length, self.tokens, self.drafted) < 1:
            raise ValueError("prompt_length, tokens and drafted must be at least 1")
        if self._columns > min(large.context, small.context):
            raise ValueError(
                f"{self.prompt_length} + {self.tokens} tokens and {self.drafted} drafted ones do "
                f"not fit into the context of {min(large.context, small.context)}"
            )

    @property
    def steps(self) -> int:
        """Rounds at most: one for each token, when nothing drafted is kept."""
        return self.tokens

    @property
    def nfe(self) -> int:
        """Passes of the large model at most."""
        return self.tokens + (self.prompt_length > 1)

    @property
    def _columns(self):
        return self.prompt_length + self.tokens + self.drafted

    def prepare(self, params) -> dict[str, PreparedParams]:
        """See `TokenNetwork.prepare`."""
        return {
            "target": self.network.prepare(params["target"]),
            "draft": self.draft.prepare(params["draft"]),
        }

    def init(self, params, keys, cond) -> SpeculativeState:
        """Both models read the prompts, up to their last token."""
        prompt = cond["tokens"].astype(jnp.int32)
        batch, sizes = len(prompt), (self.prompt_length, self._columns)
        keys = key_streams.grid(keys, self.tokens, self.drafted + 2)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, self.drafted)))
        return SpeculativeState(
            keys=keys[:, 1:],
            uniforms=uniform(keys[:, 0]),
            tokens=jnp.pad(prompt, ((0, 0), (0, self.tokens + self.drafted + 1))),
            known=jnp.full(batch, self.prompt_length, jnp.int32),
            done=jnp.zeros(batch, bool),
            caches=read_prompts(self.network, params["target"], cond, *sizes),
            draft_caches=read_prompts(self.draft, params["draft"], cond, *sizes),
            first=cond.get("first"),
            rounds=jnp.zeros(batch, jnp.int32),
        )

    def step(self, params, state: SpeculativeState, i) -> SpeculativeState:
        """One round: draft, check, keep what agrees and draw one token more."""
        drafted, proposal, draft_caches = self._draft(params["draft"], state, state.keys[i])
        last = _at(state.tokens, state.known - 1)
        hidden, caches = self.network.extend(
            params["target"],
            jnp.concatenate([last, drafted], axis=1),
            state.caches,
            state.known - 1,
            state.first,
        )
        wanted = jax.nn.softmax(
            self._filtered(self.network.logits(params["target"], hidden)), axis=-1
        )
        kept, end = self._check(
            drafted, proposal, wanted, state.uniforms[i], state.keys[i, self.drafted]
        )
        places = jnp.arange(self.drafted + 1)
        block = jnp.where(places == kept[:, None], end[:, None], jnp.pad(drafted, ((0, 0), (0, 1))))
        tokens = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
            state.tokens, block, state.known
        )
        new, stopped = kept + 1, False
        if self.stop is not None:
            is_stop = (block == self.stop) & (places <= kept[:, None])
            stopped = is_stop.any(axis=1)
            new = jnp.where(stopped, jnp.argmax(is_stop, axis=1) + 1, new)
        whole = self.prompt_length + self.tokens
        known = jnp.where(state.done, state.known, jnp.minimum(state.known + new, whole))
        return state.replace(
            tokens=tokens,
            known=known,
            done=state.done | stopped | (known == whole),
            caches=caches,
            draft_caches=draft_caches,
            rounds=state.rounds + ~state.done,
        )

    def stopped(self, state: SpeculativeState) -> jax.Array:
        """Whether all samples are complete."""
        return state.done.all()

    def finish(self, params, state: SpeculativeState) -> jax.Array:
        """The new tokens, int32 [B, N]."""
        places = jnp.arange(self.prompt_length, self.prompt_length + self.tokens)
        tokens = state.tokens[:, self.prompt_length : self.prompt_length + self.tokens]
        if self.stop is None:
            return tokens
        return jnp.where(places < state.known[:, None], tokens, self.stop)

    def _draft(self, params, state, keys):
        """G drafted tokens [B, G], the logits that they were drawn from [B, G, V], and caches."""
        # The draft has not read the token before last where the round before kept all: it reads
        # two at once, which costs a small batch no more than one.
        column = jnp.maximum(state.known - 2, 0)
        pair = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (2,)))(
            state.tokens, column
        )
        hidden, caches = self.draft.extend(params, pair, state.draft_caches, column, state.first)
        hidden = jnp.where((state.known == 1)[:, None, None], hidden[:, :1], hidden[:, 1:])
        tokens, proposals = [], []
        for j in range(self.drafted):
            if j:
                hidden, caches = self.draft.extend(
                    params, tokens[-1][:, None], caches, state.known - 1 + j, state.first
                )
            logits = self._filtered(self.draft.logits(params, hidden[:, 0]))
            tokens.append(kernels.sample_logits(logits, keys[j]))
            proposals.append(logits)
        return jnp.stack(tokens, axis=1), jnp.stack(proposals, axis=1), caches

    def _check(self, drafted, proposal, wanted, uniforms, keys):
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
        if self.choice.temperature == 0:
            best = logits.argmax(axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        rows = logits.reshape(-1, logits.shape[-1])
        filtered = kernels.filter_logits(rows, **dataclasses.asdict(self.choice))
        return filtered.reshape(logits.shape)


def _at(tokens, place):  # [B, L], [B] -> [B, 1]
    return jnp.take_along_axis(tokens, place[:, None], axis=1)
