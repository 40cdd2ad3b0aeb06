"""Between text and tokens: bytes, characters, or the vocabulary of a published model."""

import codecs
import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from gen_jax.bounded import parse_json, read_bytes
from gen_jax.config import AnyText, frozen
from gen_jax.data import tokenizer_check
from gen_jax.data.tokenizer_base import EOS_NAMES, Ids, StoredTokenizer, TextStream, Tokenizer
from gen_jax.data.words import Words
from gen_jax.extras import require

__all__ = ["Bytes", "Chars", "Pretrained", "TextStream", "Tokenizer", "Words", "load", "make"]


def make(choice: str, text: str) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
      choice: "bytes", "chars", or the path of a tokenizer.json.
      text: whose characters "chars" takes.

    Raises:
      ValueError, FileNotFoundError: as `Chars` and `load`.
    """
    if choice == "bytes":
        return Bytes()
    if choice == "chars":
        return Chars("".join(sorted(set(text))))
    return load(choice)


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer.json, of `save` or of the package `tokenizers`.

    One of the package is tried in another process first, which takes a fraction of a second.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, too large, hostile (see `tokenizer_check`) or no tokenizer,
        or the package `tokenizers` is needed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is no file; choose bytes, chars or the path of a tokenizer.json"
        )
    content = read_bytes(path, tokenizer_check.LARGEST)
    try:
        content = content.decode()
        fields = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); write it again") from None
    match fields:
        case {"kind": "bytes"}:
            return Bytes()
        case {"kind": "chars", "characters": str(characters)}:
            try:
                return Chars(characters)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
        case {"kind": "words", "words": list(words)}:
            try:
                return Words(tuple(words))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
        case {"model": _}:
            require("tokenizers", "text", f"{path} needs")
            tokenizer_check.check(content, fields, str(path))
            return Pretrained(content, str(path))
    raise ValueError(
        f"{path} is no tokenizer: it has neither a kind (bytes, chars, words) nor a model"
    )


@frozen
class Bytes(StoredTokenizer):
    """The 256 bytes of UTF-8."""

    kind = "bytes"
    vocabulary = 256

    def encode(self, text: str) -> Int32[np.ndarray, " L"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        return self.checked(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def stream(self) -> TextStream:
        return _ByteStream(self)

    def _content(self) -> str:
        return json.dumps({"kind": self.kind}) + "\n"


@frozen
class Chars(StoredTokenizer):
    """The characters of a text.

    Attributes:
      characters: at least one, sorted by code point, each once.

    Raises:
      ValueError: the characters are none, or not sorted, or repeated.
    """

    characters: AnyText

    kind = "chars"

    def __post_init__(self):
        if not self.characters:
            raise ValueError("a text without characters gives no vocabulary; give a longer text")
        if "".join(sorted(set(self.characters))) != self.characters:
            raise ValueError("the characters of a vocabulary must be sorted, and each there once")

    @property
    def vocabulary(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Int32[np.ndarray, " L"]:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points)
        known = self._points[np.minimum(ids, self.vocabulary - 1)] == points
        if not known.all():
            unknown = sorted(set(text) - set(self.characters))
            listed = ", ".join(map(repr, unknown[:5]))
            raise ValueError(
                f"{len(unknown)} characters of the text are not in the vocabulary: {listed}"
                f"{' and others' if len(unknown) > 5 else ''}; leave them out, or take bytes"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Ids) -> str:
        return self._points[self.checked(ids)].tobytes().decode("utf-32-le")

    def stream(self) -> TextStream:
        return _CharStream(self)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "characters": self.characters}

    @cached_property
    def _points(self) -> np.ndarray:
        return _code_points(self.characters)

    def _content(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self.characters}) + "\n"


@frozen
class Pretrained(StoredTokenizer):
    """A tokenizer of the package `tokenizers` (Hugging Face), read without network.

    Special tokens are text like any other: `encode` recognises but never adds them, and `decode`
    shows them. Truncation and padding that the file asks for are left out.

    Attributes:
      content: the text of a tokenizer.json; one of others is for `load`, which tries it first.
      source: its name, for errors.

    Raises:
      ValueError: the content is no tokenizer, or the package is not installed.
    """

    content: str = field(repr=False)
    source: str = "tokenizer.json"

    kind = "pretrained"

    def __post_init__(self):
        _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers = require("tokenizers", "text", f"{self.source} needs")
        with _refusing(f"{self.source} is no tokenizer of `tokenizers`"):
            model = tokenizers.Tokenizer.from_str(self.content)
        model.no_truncation()
        model.no_padding()
        if not model.get_vocab_size():
            raise ValueError(f"{self.source} has an empty vocabulary")
        return model

    @cached_property
    def vocabulary(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1

    @cached_property
    def eos(self) -> int | None:
        known = (self._tokenizer.token_to_id(name) for name in EOS_NAMES)
        return next((id for id in known if id is not None), None)

    def encode(self, text: str) -> Int32[np.ndarray, " L"]:
        text.encode()  # a lone surrogate is a ValueError here, and a TypeError of the package
        with _refusing(f"{self.source} has no tokens for the text"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        ids = self.checked(ids).tolist()
        with _refusing(f"{self.source} has no text for the tokens"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def stream(self) -> TextStream:
        return _PretrainedStream(self)

    def _content(self) -> str:
        return self.content


@contextlib.contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """Makes a ValueError of what `tokenizers` raises: an Exception, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem} ({' '.join(str(error).split())})") from None


class _ByteStream:
    def __init__(self, tokenizer: Bytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int | np.integer) -> str:
        return self._decoder.decode(bytes(self._tokenizer.checked([id]).tolist()))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _CharStream:
    def __init__(self, tokenizer: Chars) -> None:
        self._tokenizer = tokenizer

    def push(self, id: int | np.integer) -> str:
        return self._tokenizer.decode([id])

    def flush(self) -> str:
        return ""


class _PretrainedStream:
    """Decodes all tokens again at each push: what one adds depends on those before it.

    The text of a prefix is final but for its last characters where these are U+FFFD, which further
    bytes may complete; and a run of the byte tokens of SentencePiece is decoded as a whole.
    """

    def __init__(self, tokenizer: Pretrained) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def push(self, id: int | np.integer) -> str:
        self._tokenizer.checked([id])
        self._ids.append(int(id))
        name = self._tokenizer._tokenizer.id_to_token(int(id)) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return ""
        return self._rest(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        return self._rest(self._tokenizer.decode(self._ids))

    def _rest(self, text: str) -> str:
        rest = text[self._given :]
        self._given += len(rest)
        return rest


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
