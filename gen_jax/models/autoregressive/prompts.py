"""Prompts: what the samplers of this family read of a condition, and check of it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gen_jax.condition import Condition, is_concrete
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.contract import check_label
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from kernels import KVCache

__all__ = [
    "check_condition",
    "check_eos",
    "check_prompt_length",
    "conditions_of",
    "first_inputs",
    "make_prompts",
    "prefill",
    "source_of",
]


def make_prompts(
    model: AutoregressiveModel,
    prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
    length: int | None = None,
) -> Condition:
    """Prompts of different lengths as a condition, aligned at their ends.

    Args:
      model: decides which tokens there are.
      prompts: sequences of tokens in 0 to V - 1. One may be empty where the model has a start
        token, which the sampler puts before each prompt and is not part of it.
      length: P, to which all are padded on the left; None for the length of the longest.

    Returns:
      "prompt" int32 [B, P] and, where prompts are shorter than P, "prompt_length" int32 [B].

    Raises:
      ValueError: there is no prompt, or one is empty, too long, or has an unknown token.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths):
        raise ValueError("there is no prompt: give one for each sample")
    if not model.has_start and not lengths.all():
        raise ValueError(
            "the prompt is empty: a model without a start token needs at least one token to go on"
        )
    longest, context = int(lengths.max()), model.network.config.context
    if longest + model.has_start > context:
        raise ValueError(
            f"the prompt has {longest} tokens, the context of the model is {context}"
            f"{' with the start token' if model.has_start else ''}: shorten the prompt"
        )
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"the prompt has {longest} tokens, more than the length of {length}")
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        _check_tokens("the prompt", np.asarray(prompt), model.vocabulary)
        row[length - len(prompt) :] = prompt
    ragged = {"prompt_length": lengths} if (lengths < length).any() else {}
    return Condition(prompt=tokens, **ragged)


def conditions_of(model: AutoregressiveModel) -> tuple[str, ...]:
    """The fields of `Condition` that samplers of a model read."""
    names = ("prompt", "prompt_length")
    if model.has_start:
        names += ("label",)
    if isinstance(model.network, EncoderDecoder):
        names += ("source", "source_length")
    return names


def check_prompt_length(model: AutoregressiveModel, prompt_length: int) -> None:
    """Refuses a sampler that would have nothing to read first.

    Raises:
      ValueError: `prompt_length` is negative, or 0 for a model without a start token.
    """
    least = 0 if model.has_start else 1
    if prompt_length < least:
        why = "" if model.has_start else " for a model without a start token (extra_inputs)"
        raise ValueError(f"prompt_length must be at least {least}{why}, got {prompt_length}")


def check_eos(model: AutoregressiveModel, eos: int | None) -> None:
    """Refuses a token to end samples with that the model never predicts.

    Raises:
      ValueError: `eos` is not in 0 to V - 1.
    """
    if eos is not None and not 0 <= eos < model.vocabulary:
        raise ValueError(f"eos must be in 0 to {model.vocabulary - 1}, or None, got {eos}")


def check_condition(model: AutoregressiveModel, prompt_length: int, cond: Condition) -> None:
    """Refuses a condition that does not fit; values only where they are known.

    Args:
      model: it decides which tokens, labels and conditions there are.
      prompt_length: P of the sampler.
      cond: the fields that it has are among `conditions_of`.

    Raises:
      ValueError: prompts are missing, or are not [B, P]; a source is missing; labels, tokens or
        lengths are out of range.
    """
    config = model.network.config
    check_label(cond, config.extra_inputs)
    if cond.prompt is None:
        if prompt_length:
            raise ValueError(
                f"the sampler goes on from prompts of {prompt_length} tokens: give the condition "
                "'prompt'"
            )
    elif cond.prompt.shape[1:] != (prompt_length,):
        raise ValueError(
            f"the sampler takes prompts [B, {prompt_length}] (its prompt_length), not "
            f"{list(cond.prompt.shape)}"
        )
    least = 0 if model.has_start else 1
    _check_padded(cond, "prompt", least, model.vocabulary, ends_aligned=True)
    if isinstance(model.network, EncoderDecoder):
        if cond.source is None:
            raise ValueError("the network reads a source: give the condition 'source'")
        _check_padded(cond, "source", 0, config.vocabulary + config.extra_inputs)


def _check_padded(cond, name, least, vocabulary, ends_aligned=False):
    """Tokens [B, L] of which so many of each row count: their lengths, and what they are."""
    tokens, lengths = (getattr(cond, field) for field in (name, f"{name}_length"))
    if tokens is None:
        return
    width = tokens.shape[1]
    if is_concrete(lengths):
        lengths = np.asarray(lengths)
        if lengths.min() < least or lengths.max() > width:
            raise ValueError(
                f"{name}_length must be in {least} to {width}, got {lengths.min()} to "
                f"{lengths.max()}"
            )
    if not is_concrete(tokens) or not (lengths is None or is_concrete(lengths)):
        return
    counted = np.full(len(tokens), width) if lengths is None else lengths
    places = np.arange(width)[::-1] if ends_aligned else np.arange(width)
    counted_tokens = np.asarray(tokens)[places[None] < counted[:, None]]
    _check_tokens(f"the {name}", counted_tokens, vocabulary)


def _check_tokens(what, tokens, vocabulary):
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(unknown):
        raise ValueError(
            f"{what} has the token {unknown[0]}; the model knows 0 to {vocabulary - 1}"
        )


def first_inputs(
    model: AutoregressiveModel, cond: Condition, batch: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"] | None]:
    """What the network reads before it predicts: start tokens, where there are, and prompts.

    Args:
      model: it decides whether there are start tokens.
      cond: its prompts, [B, P], and labels.
      batch: B.

    Returns:
      Inputs int32 [B, T], aligned at their ends, with T = P or P + 1; a start token stands
      directly before its prompt. The column of the first input of each row, int32 [B], or None
      where all rows are full.
    """
    if cond.prompt is None:
        prompt = jnp.zeros((batch, 0), jnp.int32)
    else:
        prompt = jnp.asarray(cond.prompt, jnp.int32)
    first, length = None, cond.prompt_length
    if length is not None:
        first = prompt.shape[1] - jnp.asarray(length, jnp.int32)
    if not model.has_start:
        return prompt, first
    start = model.start_tokens(batch, cond.label)[:, None]
    if first is None:
        return jnp.concatenate([start, prompt], axis=1), None
    shifted = jnp.pad(prompt, ((0, 0), (1, 0)))
    return jnp.where(jnp.arange(shifted.shape[1])[None] == first[:, None], start, shifted), first


def source_of(cond: Condition) -> dict[str, Any]:
    """The source as `network.encode` takes it; empty where there is none."""
    fields = cond.fields()
    return {name: fields[name] for name in ("source", "source_length") if name in fields}


def prefill(
    network: TokenNetwork | EncoderDecoder,
    params: Any,
    inputs: Int[Array, "B T"],
    cache_length: int,
    first: Int[Array, " B"] | None = None,
    encoded: dict[str, Any] | None = None,
) -> tuple[KVCache, ...]:
    """Caches that hold all but the last of the first inputs, which one pass reads.

    Args:
      network: a causal one.
      params: prepared.
      inputs: of `first_inputs`.
      cache_length: columns of the caches, at least T - 1.
      first: of `first_inputs`.
      encoded: what the network's method `encode` gave for the condition, or None for nothing.
    """
    caches = network.make_caches(len(inputs), cache_length)
    if inputs.shape[1] > 1:
        _, caches = network.extend(params, inputs[:, :-1], caches, 0, first, **(encoded or {}))
    return caches
