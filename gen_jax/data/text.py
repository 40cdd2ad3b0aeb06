"""Text, and a stream of its tokens whose batches are a pure function of (seed, step)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int32, UInt16

from gen_jax import data
from gen_jax.bounded import read_text
from gen_jax.data.config import Split, TextConfig
from gen_jax.data.streams import check_range, check_tokens, shard_of_step

__all__ = ["TokenStream", "digest", "load_text"]


def load_text(config: TextConfig, split: Split) -> str:
    """Reads one split of the text that the configuration names.

    Of a pydoc or file text the test split is the last `validation` share, and the train split is
    all before it, as nanoGPT splits.

    Args:
      config: the choice of a text.
      split: "train" or "test".

    Returns:
      A text of at least one character.

    Raises:
      FileNotFoundError: there is no text where the configuration points.
      ValueError: the split is unknown or empty, or the text is not UTF-8.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose train or test")
    if config.name == "tfds":
        source = f"the TFDS data set {config.tfds_name}"
        part = data.tfds_source.read_text(
            config.tfds_name, split, config.dir, config.characters, config.max_bytes
        )
    else:
        source = config.path or "the pydoc text"
        whole = _read_pydoc(config) if config.name == "pydoc" else _read_file(config)
        end = int(len(whole) * (1 - config.validation))
        part = whole[:end] if split == "train" else whole[end:]
    if not part:
        raise ValueError(f"{source} leaves no character for the {split} split; give a longer text")
    return part


def digest(text: str) -> str:
    """The SHA-256 of the text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of a text, all in memory, of which windows are drawn.

    Attributes:
      tokens: at least one, each in [0, vocabulary).
      vocabulary: the number of different tokens.

    Raises:
      ValueError: another dtype or shape, or a token outside the vocabulary.
    """

    tokens: Int32[np.ndarray, " tokens"] | UInt16[np.ndarray, " tokens"]
    vocabulary: int

    def __post_init__(self):
        tokens = self.tokens
        if tokens.dtype not in (np.int32, np.uint16) or tokens.ndim != 1 or not len(tokens):
            raise ValueError(
                "tokens must be int32 or uint16 [tokens], at least one, "
                f"not {tokens.dtype} {list(tokens.shape)}"
            )
        check_tokens(tokens, self.vocabulary)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(
        self, seed: int, step: int, size: int, *, length: int, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """This shard of the batch of a training step, a pure function of its arguments.

        Each window begins at an offset that is drawn uniformly and independently.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: windows per global batch, over all shards.
          length: targets per window, from 1 up; a window is one token longer.
          shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
          "tokens": int32 [B, length + 1], with B = size / count.

        Raises:
          ValueError: an argument is out of range, count does not divide size, or the stream is
            shorter than one window.
        """
        check_range("length", length, 1, 1 << 40)
        if len(self) <= length:
            raise ValueError(
                f"{len(self)} tokens are too few for a window of {length + 1}; "
                f"give a longer text or a length of at most {len(self) - 1}"
            )
        generator, mine = shard_of_step(seed, step, size, shard)
        offsets = generator.integers(0, len(self) - length, size)[mine]
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, length + 1)
        return {"tokens": windows[offsets].astype(np.int32)}

    def windows(
        self, length: int
    ) -> tuple[Int32[np.ndarray, "windows {length}+1"], Int32[np.ndarray, " windows"]]:
        """The whole stream in consecutive windows, which overlap in one token.

        Every token but the first is a target, a token of a window that is not its first, exactly
        once. The last window may have fewer targets; it is padded with token 0.

        Args:
          length: targets per window, from 1 up.

        Returns:
          The tokens of ceil((tokens - 1) / length) windows, and the number of targets of each
          window that are not padding, in [1, length].

        Raises:
          ValueError: the length is out of range, or the stream has fewer than two tokens.
        """
        check_range("length", length, 1, 1 << 40)
        if len(self) < 2:
            raise ValueError("1 token is too few for a window; give a text of at least 2 tokens")
        starts = np.arange(0, len(self) - 1, length)
        padded = np.zeros(len(starts) * length + 1, np.int32)
        padded[: len(self)] = self.tokens
        windows = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[starts]
        return windows, np.minimum(length, len(self) - 1 - starts).astype(np.int32)


def _read_pydoc(config: TextConfig) -> str:
    try:
        # The module holds the text itself, and some distributions of Python leave it out.
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "this Python comes without pydoc_data; give a text with --data.name file --data.path"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    return text[: config.characters or None]


def _read_file(config: TextConfig) -> str:
    path = config.path
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is no file; give --data.path a UTF-8 text file, or use the embedded text "
            "with --data.name pydoc"
        )
    return read_text(Path(path), config.max_bytes, "raise --data.max-bytes", config.characters)
