"""A tokenizer of whole words, for texts of a small vocabulary that is known beforehand."""

import json
from dataclasses import field
from functools import cached_property

import numpy as np
from jaxtyping import Int32

from gen_jax.config import frozen
from gen_jax.data.tokenizer_base import EOS_NAMES, Ids, StoredTokenizer, TextStream

__all__ = ["Words"]


@frozen
class Words(StoredTokenizer):
    """Words of a fixed list, between spaces.

    A text whose words lie one space apart comes back as it was.

    Attributes:
      words: at least one, each once, not empty and without whitespace; token i is word i, and
        the EOS token is the word that is named like one ("</s>"), where there is one.

    Raises:
      ValueError: the words are none, or one of them is repeated or no word.
    """

    words: tuple[str, ...] = field(repr=False)

    kind = "words"

    def __post_init__(self):
        for word in self.words:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is no word of a vocabulary: give text without spaces")
        if not self.words or len(set(self.words)) != len(self.words):
            raise ValueError("the words of a vocabulary must be at least one, and each there once")

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    @cached_property
    def eos(self) -> int | None:
        return next((self._ids[name] for name in EOS_NAMES if name in self._ids), None)

    def encode(self, text: str) -> Int32[np.ndarray, " L"]:
        words = text.split()
        unknown = sorted({word for word in words if word not in self._ids})
        if unknown:
            raise ValueError(
                f"{len(unknown)} words of the text are not in the vocabulary: "
                f"{', '.join(map(repr, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}"
            )
        return np.array([self._ids[word] for word in words], np.int32)

    def decode(self, ids: Ids) -> str:
        return " ".join(self.words[id] for id in self.checked(ids).tolist())

    def stream(self) -> TextStream:
        return _WordStream(self)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: id for id, word in enumerate(self.words)}

    def _content(self) -> str:
        return json.dumps({"kind": self.kind, "words": self.words}) + "\n"


class _WordStream:
    def __init__(self, tokenizer: Words) -> None:
        self._tokenizer = tokenizer
        self._gap = ""

    def push(self, id: int | np.integer) -> str:
        text = self._gap + self._tokenizer.decode([id])
        self._gap = " "
        return text

    def flush(self) -> str:
        return ""
