"""Cases of sample_logits and sample_token: every filter, ties, excluded tokens, half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.sample_token import sample_logits, sample_token
from kernels.testing import Case, Suite

__all__ = ["FILTERS", "SUITES", "rows"]

# Each with top_p compiles slowly: there are few of them, in one shape.
FILTERS = (
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 5, "min_p": 0.3},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.85},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.15},
)
_LIMITS = ({"top_k": 1}, {"temperature": 0}, {"temperature": 0, "top_k": 5}, {"top_k": 9})


def rows(vocabulary: int = 9, number: int = 64, seed: int | None = None) -> np.ndarray:
    """Logits of three kinds: random, with ties, and with excluded tokens.

    Returns:
      float32 [3 * number, vocabulary].
    """
    generator = np.random.default_rng(vocabulary if seed is None else seed)
    random, ties, excluded = 1.5 * generator.normal(size=(3, number, vocabulary))
    ties = np.round(ties) + 0.0  # no negative zeros
    excluded[generator.random(excluded.shape) < 0.3] = -np.inf
    excluded[:, 0] = 0.1
    return np.concatenate([random, ties, excluded]).astype(np.float32)


def _logits(vocabulary, number, dtype, seed):
    logits = jnp.asarray(rows(vocabulary, number, seed), dtype)
    return logits, jax.random.split(jax.random.key(seed), len(logits))


def _plain_logits(batch, vocabulary, seed):
    logits = 2 * np.random.default_rng(seed).normal(size=(batch, vocabulary))
    return jnp.asarray(logits, jnp.float32), jax.random.split(jax.random.key(seed), batch)


def _hidden(batch, width, vocabulary, dtype, seed):
    generator = np.random.default_rng(seed)
    hidden = jnp.asarray(generator.normal(size=(batch, width)), jnp.float32)
    head = jnp.asarray(3 * generator.normal(size=(width, vocabulary)) / width, dtype)
    return hidden, head, jax.random.split(jax.random.key(seed), batch)


def _categorical(logits, keys, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What one writes with jax.lax and jax.random: of top_p and min_p it knows nothing."""
    logits = logits / temperature
    if top_k:
        last = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _product_and_categorical(hidden, head, keys, **choice):
    return _categorical(hidden @ head, keys, **choice)


def _name(choice):
    return ", ".join(f"{name} {value}" for name, value in choice.items()) or "no filter"


SUITES = (
    Suite(
        "sample_logits",
        sample_logits,
        cases=(
            *(
                Case(
                    _name(choice),
                    functools.partial(_logits, 9, 640, "float32"),
                    choice,
                    seeds=4,
                    large=True,
                )
                for choice in (*FILTERS, *_LIMITS)
            ),
            *(
                Case(
                    f"three rows, {_name(choice)}",
                    functools.partial(_logits, 300, 1, "float32"),
                    choice,
                )
                for choice in (FILTERS[7], {"temperature": 0})
            ),
            *(
                Case(
                    f"{dtype}, {_name(choice)}",
                    functools.partial(_logits, 300, 64, dtype),
                    choice,
                    large=True,
                )
                for dtype in ("float16", "bfloat16")
                for choice in ({}, {"temperature": 0.7, "top_k": 4})
            ),
        ),
        timed=tuple(
            Case(
                f"batch {batch}, {vocabulary} tokens, {_name(choice)}",
                functools.partial(_plain_logits, batch, vocabulary),
                choice,
            )
            for batch, vocabulary in ((1, 50257), (16, 50257), (64, 256))
            for choice in ({}, {"top_k": 40})
        ),
        peers={"categorical": _categorical},
    ),
    Suite(
        "sample_token",
        sample_token,
        cases=(
            *(
                Case(
                    _name(choice),
                    functools.partial(_hidden, 192, 16, 9, "float32"),
                    choice,
                    large=True,
                )
                for choice in ({"temperature": 0}, *FILTERS[:3], FILTERS[4])
            ),
            Case(
                "a head in bfloat16", functools.partial(_hidden, 192, 16, 9, "bfloat16"), large=True
            ),
            Case(
                "300 tokens",
                functools.partial(_hidden, 20, 128, 300, "float32"),
                {"top_k": 7},
                large=True,
            ),
            Case(
                "2 of 600 tokens", functools.partial(_hidden, 2, 16, 600, "float32"), {"top_k": 7}
            ),
        ),
        timed=tuple(
            Case(
                f"batch {batch}, width 768, 50257 tokens, {_name(choice)}",
                functools.partial(_hidden, batch, 768, 50257, "float32"),
                choice,
            )
            for batch in (1, 16)
            for choice in ({}, {"top_k": 40})
        ),
        peers={"categorical": _product_and_categorical},
        estimated=tuple(
            Case(
                f"batch {batch}, width 768, 50257 tokens, {dtype}, {_name(choice)}",
                functools.partial(_hidden, batch, 768, 50257, dtype),
                choice,
            )
            for batch, dtype, choice in (
                (64, "bfloat16", {"top_k": 50}),
                (64, "float32", {"top_k": 50}),
                (1, "bfloat16", {"top_k": 50}),
                (64, "bfloat16", {"top_p": 0.9}),
            )
        ),
    ),
)
