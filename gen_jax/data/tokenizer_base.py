"""What every tokenizer is, and what all kinds of them share."""

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from gen_jax import whole_file
from gen_jax.data.streams import check_tokens
from gen_jax.data.text import digest

__all__ = ["EOS_NAME", "EOS_NAMES", "PAD_NAME", "StoredTokenizer", "TextStream", "Tokenizer"]

PAD_NAME, EOS_NAME = "<pad>", "</s>"  # of the vocabularies that are made here
EOS_NAMES = ("<|endoftext|>", EOS_NAME, "<eos>", "<|end_of_text|>")
"""What the token that ends a text is called; where several are there, the first of these."""

Ids = Integer[Any, " L"] | Sequence[int | np.integer]


@runtime_checkable
class TextStream(Protocol):
    """Decodes token by token: what `push` and `flush` return, joined, is `decode` of the tokens."""

    def push(self, id: int | np.integer) -> str:
        """Takes a token and returns the characters that it completes, which may be none.

        Raises:
          ValueError: the token is outside the vocabulary.
        """

    def flush(self) -> str:
        """Ends the text and returns what was held back."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocabulary(self) -> int:
        """Tokens lie in [0, vocabulary)."""

    @property
    def eos(self) -> int | None:
        """The token that ends a text, where there is one."""

    def encode(self, text: str) -> Int32[np.ndarray, " L"]:
        """The tokens of a text, and no others: nothing is put before, between or after them.

        Raises:
          ValueError: the text holds what the tokenizer cannot express.
        """

    def decode(self, ids: Ids) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: another shape or dtype, or a token outside the vocabulary.
        """

    def stream(self) -> TextStream:
        """A decoder of one text, token by token."""

    def describe(self) -> dict[str, Any]:
        """For JSON: kind, vocabulary, digest (SHA-256 of what `save` writes), and characters."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file, which `load` reads; a reader sees the old one or the new one."""


class StoredTokenizer:
    """What all kinds share; `_content()` is the text of the file that `save` writes."""

    kind: str

    @property
    def eos(self) -> int | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "digest": digest(self._content()),
        }

    def save(self, path: str | os.PathLike) -> None:
        whole_file.write(path, self._content())

    def checked(self, ids: Ids) -> Integer[np.ndarray, " L"]:
        """Tokens as an array.

        Raises:
          ValueError: another shape or dtype, or a token outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            ids = ids.astype(np.int32)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be integers [L], not {ids.dtype} {list(ids.shape)}")
        check_tokens(ids, self.vocabulary)
        return ids
