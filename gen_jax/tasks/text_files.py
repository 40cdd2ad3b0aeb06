"""What the tasks of text share: how samples are shown and written, and scores without a network."""

import functools
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int

from gen_jax import evaluation
from gen_jax.data.text import digest
from gen_jax.data.tokenizers import Tokenizer

__all__ = [
    "HIDDEN",
    "cut",
    "decode",
    "decode_with_masks",
    "from_first_word",
    "listing",
    "pieces",
    "score",
    "show",
    "title",
]

UNKNOWN = "\ufffd"
HIDDEN = "\u2591"  # a light shade
_BETWEEN_WORDS = re.compile(r"[\W\d_]+")


def cut(tokens: Int[np.ndarray, " L"], eos: int | None) -> Int[np.ndarray, " N"]:
    """The tokens before the one that ends the sample."""
    ends = np.flatnonzero(tokens == eos) if eos is not None else ()
    return tokens[: ends[0]] if len(ends) else tokens


def pieces(
    tokenizer: Tokenizer,
    eos: int | None,
    prompt: Int[np.ndarray, " P"],
    tokens: Iterable[int | np.integer],
) -> Iterator[str]:
    """The text of a sample, piece by piece; what the tokenizer does not have is U+FFFD."""
    stream = tokenizer.stream()
    for token in prompt:
        yield stream.push(token)
    for token in tokens:
        if token != eos:
            yield stream.push(token) if token < tokenizer.vocabulary else UNKNOWN
    yield stream.flush()


def decode(
    tokenizer: Tokenizer,
    eos: int | None,
    prompt: Int[np.ndarray, " P"],
    tokens: Int[np.ndarray, " L"],
) -> str:
    """The text of a sample and what it goes on from, up to the token that ends it."""
    tokens = cut(tokens, eos)
    if tokens.max(initial=0) < tokenizer.vocabulary:
        return tokenizer.decode(np.concatenate([prompt, tokens]))
    return "".join(pieces(tokenizer, eos, prompt, tokens))


def decode_with_masks(tokenizer: Tokenizer, tokens: Int[np.ndarray, " L"], mask: int) -> str:
    """The text of tokens of which some are hidden, each of them one `HIDDEN`."""
    ends = np.flatnonzero(np.diff(tokens == mask)) + 1
    parts = np.split(tokens, ends)
    return "".join(
        HIDDEN * len(part) if part[0] == mask else decode(tokenizer, None, part[:0], part)
        for part in parts
    )


def score(texts: list[str], known: str) -> dict[str, float]:
    """How far texts are of a language: a cheap check, which no text of that language fails.

    Args:
      texts: the last word of each, which may be cut, does not count; where a text begins within a
        word, leave that away (see `from_first_word`).
      known: a text in the language.

    Returns:
      known_words: share of their letters that are in words of the known text.
      distinct_2: pairs of neighbouring words that differ, as a share of all (Li et al. 2016).
    """
    make = functools.partial(_score, texts, known)
    return evaluation.kept_figures(make, [digest(known), *texts])


def _score(texts, known):
    vocabulary = set(_BETWEEN_WORDS.split(known))
    words = [[word for word in _BETWEEN_WORDS.split(sample)[:-1] if word] for sample in texts]
    letters = [len(word) for some in words for word in some]
    hits = [len(word) for some in words for word in some if word in vocabulary]
    pairs = [pair for some in words for pair in itertools.pairwise(some)]
    return {
        "known_words": sum(hits) / max(sum(letters), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
    }


def from_first_word(text: str) -> str:
    """A text that may begin within a word, without its first letters."""
    return text.lstrip("".join({letter for letter in text if not _BETWEEN_WORDS.match(letter)}))


def title(number: int) -> str:
    """The line above a sample."""
    return f"{'-' * 32} sample {number}"


def listing(texts: Iterable[str]) -> str:
    """Samples below each other, each with its line above."""
    return "".join(f"{title(number)}\n{text}\n" for number, text in enumerate(texts))


def show(piece: str) -> None:
    """Prints what the terminal can show, without control characters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "replace").decode(encoding), end="", flush=True)
