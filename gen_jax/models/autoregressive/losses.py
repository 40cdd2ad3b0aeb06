"""Autoregressive models: GPT-2 (Radford et al. 2019), Image GPT (Chen et al. 2020).

    log p(x) = sum_i log p(x_i | x_<i)

Training maximises this sum; the likelihood is exact. Sampling draws one token after the other
from the same conditionals: as many evaluations as tokens, each of one new token, since keys and
values of the earlier ones are kept.

A network with extra inputs begins every sequence with one of them, the input V + label (label 0
where there is no label), and so gives the probability of the first token too. One without them
conditions on the first token of the sequence.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import kernels
from gen_jax import keys as key_streams
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.models.sequences import cross_entropy, ended, mean_of_first
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import PreparedParams, TokenNetwork
from kernels import KVCache


def inputs_and_targets(network: TokenNetwork, tokens, label=None):
    """What the network reads and what it should predict at each place.

    Args:
      network: its extra inputs decide.
      tokens: int [B, L].
      label: int [B] in [0, extra_inputs), or None for 0.

    Returns:
      Inputs and targets, int [B, L] each with extra inputs, else [B, L - 1].
    """
    config = network.config
    if not config.extra_inputs:
        return tokens[:, :-1], tokens[:, 1:]
    label = jnp.zeros(tokens.shape[0], tokens.dtype) if label is None else label
    start = (config.vocabulary + label).astype(tokens.dtype)
    return jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1), tokens


def loss(network, params, batch: dict, keys: jax.Array, *, smoothing: float = 0.0):
    """Cross-entropy per predicted token, in nats, and no further metrics.

    Args:
      network: a causal one, `TokenNetwork` or `EncoderDecoder`.
      params: its parameters.
      batch: "tokens" int [B, L], and perhaps "label" int [B], "length" int [B] (only so many of
        the predicted tokens count), and what the network conditions on.
      keys: [B], for dropout.
      smoothing: share of the target's probability that is spread over all tokens (label
        smoothing: Szegedy et al. 2016), in [0, 1).
    """
    keys = keys if network.config.dropout else None
    inputs, targets = inputs_and_targets(network, batch["tokens"], batch.get("label"))
    logits = network(params, inputs, keys=keys, **network.condition(params, batch, keys))
    values = cross_entropy(logits, targets, smoothing)
    return mean_of_first(values, batch.get("length")), {}


def log_prob(network, params, tokens, label=None, cond: dict | None = None) -> jax.Array:
    """Exact log-probability of each predicted token given all before it, in nats.

    Args:
      network: a causal one, `TokenNetwork` or `EncoderDecoder`.
      params: its parameters.
      tokens: int [B, L].
      label: int [B], see `inputs_and_targets`.
      cond: what the network conditions on.

    Returns:
      float32 [B, L] with extra inputs, else [B, L - 1]: sum over the last axis for sequences.
    """
    inputs, targets = inputs_and_targets(network, tokens, label)
    logits = network(params, inputs, **network.condition(params, cond or {}))
    return -cross_entropy(logits, targets)


def pad_prompts(network: TokenNetwork, prompts, length: int | None = None) -> dict:
    """Prompts of different lengths as the condition of a sampler, aligned at their ends.

    Args:
      network: decides which ids there are.
      prompts: sequences of token ids, none empty.
      length: columns to pad to; None for the longest prompt.

    Returns:
      "tokens" int32 [B, P] and, where lengths differ, "first" int32 [B], the first column of each.

    Raises:
      ValueError: a prompt is empty, too long, or has an unknown id.
    """
    inputs = network.config.vocabulary + network.config.extra_inputs
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.all():
        raise ValueError("the prompt is empty: a model of text needs at least one token to go on")
    if lengths.max() > network.config.context:
        raise ValueError(
            f"the prompt has {lengths.max()} tokens, the context of the model is "
            f"{network.config.context}: shorten the prompt"
        )
    length = int(lengths.max()) if length is None else length
    if lengths.max() > length:
        raise ValueError(f"the prompt has {lengths.max()} tokens, more than {length} columns")
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        for token in prompt:
            if not 0 <= token < inputs:
                raise ValueError(
                    f"the prompt has the token {token}; the model knows 0 to {inputs - 1}"
                )
        row[length - len(prompt) :] = prompt
    ragged = {"first": length - lengths} if (lengths < length).any() else {}
    return {"tokens": tokens, **ragged}


def read_prompts(
    network, params: PreparedParams, cond: dict, length: int, columns: int, read: dict | None = None
):
    """Caches of `columns` columns that hold all but the last token of the prompts.

    Args:
      network: a causal one.
      params: prepared.
      cond: of `pad_prompts`.
      length: columns of the prompts.
      columns: of the caches.
      read: of the network's method of this name.

    Raises:
      ValueError: the prompts of the condition (see `pad_prompts`) do not have `length` columns.
    """
    prompt, first = cond["tokens"], cond.get("first")
    if prompt.shape[1] != length:
        raise ValueError(f"prompts of {prompt.shape[1]} columns for a sampler of {length}")
    caches = network.make_caches(len(prompt), columns)
    if length > 1:
        _, caches = network.extend(params, prompt[:, :-1], caches, 0, first, **(read or {}))
    return caches


@flax.struct.dataclass
class DecodingState:
    """What autoregressive decoding carries from step to step.

    Attributes:
      keys: [N, B], one for each new token of each sample.
      tokens: int32 [B, P + N], the prompt and what follows.
      caches: per block, of T columns.
      first: int32 [B], column of the first input of each sample; None where all are full.
      read: what the network has read of the condition, beside the prompts.
      offset: int32 [], place in `tokens` of column 0 of the caches.
      done: bool [B], whether the stop token has come.
    """

    keys: jax.Array
    tokens: jax.Array
    caches: tuple[KVCache, ...]
    first: jax.Array | None
    read: dict
    offset: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class AutoregressiveSampler:
    """Ancestral sampling, one token per step, with cached keys and values.

    The condition is `pad_prompts`, with a source for an `EncoderDecoder`, which is read once. All
    but the last token of the prompts are read in one pass before the loop; step i reads token i - 1
    and draws token i. Where prompt and new tokens are longer than the context, the network goes
    on from the last half of a context each time that it is full (which one pass reads again).

    Attributes:
      network: a causal one, `TokenNetwork` or `EncoderDecoder`.
      prompt_length: P, columns of the prompts.
      tokens: N, how many to draw.
      choice: how each is drawn.
      stop: the token that ends a sample; the rest of it is filled with the same, and the loop
        ends when all samples have. None for none.
    """

    network: TokenNetwork | EncoderDecoder
    prompt_length: int
    tokens: int
    choice: TokenChoice = TokenChoice()
    stop: int | None = None

    def __post_init__(self):
        if not self.network.config.causal:
            raise ValueError("autoregressive sampling needs a causal network")
        if self.tokens < 1:
            raise ValueError(f"the number of new tokens must be at least 1, got {self.tokens}")
        if not 1 <= self.prompt_length <= self.network.config.context:
            raise ValueError(
                f"a prompt of {self.prompt_length} tokens does not fit into the context of "
                f"{self.network.config.context}"
            )

    @property
    def steps(self) -> int:
        """One for each new token."""
        return self.tokens

    @property
    def nfe(self) -> int:
        """A pass over the prompt, where it has more than one token, and one per new token.

        At most: a stop token ends the loop earlier.
        """
        slides = -(-(self._inputs - self.columns) // (self.columns - self._kept))
        slides = slides if self._kept else 0  # a context of one token has nothing to read again
        return self.tokens + (self.prompt_length > 1) + slides

    @property
    def columns(self) -> int:
        """Columns T of the caches."""
        return min(self._inputs, self.network.config.context)

    @property
    def _inputs(self):  # the last token drawn is not read
        return self.prompt_length + self.tokens - 1

    @property
    def _kept(self):
        return self.columns // 2

    def prepare(self, params) -> PreparedParams:
        """See `TokenNetwork.prepare`."""
        return self.network.prepare(params)

    def init(self, params: PreparedParams, keys, cond) -> DecodingState:
        """Reads the prompts, up to their last token."""
        prompt, read = cond["tokens"].astype(jnp.int32), self.network.encode(params, cond)
        sizes = self.prompt_length, self.columns
        return DecodingState(
            keys=key_streams.grid(keys, self.tokens),
            tokens=jnp.pad(prompt, ((0, 0), (0, self.tokens))),
            caches=read_prompts(self.network, params, cond, *sizes, read),
            first=cond.get("first"),
            read=read,
            offset=jnp.int32(0),
            done=jnp.zeros(len(prompt), bool),
        )

    def step(self, params: PreparedParams, state: DecodingState, i) -> DecodingState:
        """Reads the last token and draws the next."""
        place = self.prompt_length - 1 + i
        if self._inputs > self.columns:
            full = place - state.offset == self.columns
            state = jax.lax.cond(full, self._slide, lambda _, state: state, params, state)
        last = jax.lax.dynamic_slice_in_dim(state.tokens, place, 1, axis=1)
        hidden, caches = self.network.extend(
            params, last, state.caches, place - state.offset, state.first, **state.read
        )
        token = kernels.sample_token(
            hidden[:, 0], params.head, state.keys[i], **dataclasses.asdict(self.choice)
        )
        done = state.done
        if self.stop is not None:
            token = jnp.where(done, self.stop, token)
            done |= token == self.stop
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, place + 1))
        return state.replace(tokens=tokens, caches=caches, done=done)

    def stopped(self, state: DecodingState) -> jax.Array | None:
        """Whether all samples have ended; None where nothing ends them."""
        return None if self.stop is None else state.done.all()

    def finish(self, params: PreparedParams, state: DecodingState) -> jax.Array:
        """The new tokens, int32 [B, N]."""
        tokens = state.tokens[:, self.prompt_length :]
        # The loop may have ended before it filled all columns.
        return tokens if self.stop is None else ended(tokens, self.stop)

    def _slide(self, params, state):
        """Begins again with the last `_kept` tokens, when the caches are full."""
        kept = self._kept
        shift = self.columns - kept
        offset = state.offset + shift
        if not kept:
            return state.replace(offset=offset)
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens, offset, kept, axis=1)
        first = None if state.first is None else jnp.maximum(state.first - shift, 0)
        _, caches = self.network.extend(params, tokens, state.caches, 0, first, **state.read)
        return state.replace(caches=caches, first=first, offset=offset)
