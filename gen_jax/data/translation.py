"""Pairs of sentences, and batches of their tokens that are a pure function of (seed, step)."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32, Int64, Integer

from gen_jax import data
from gen_jax.bounded import read_text
from gen_jax.data.bpe import train_bpe
from gen_jax.data.config import TranslationConfig, TranslationSplit
from gen_jax.data.streams import shard_of_step
from gen_jax.data.synonyms import Synonyms
from gen_jax.data.tokenizers import Tokenizer, Words

__all__ = [
    "BUCKET_SHARES",
    "PAD",
    "SYNONYM_PAIRS",
    "Pairs",
    "default_buckets",
    "load_pairs",
    "make_tokenizer",
    "parse_template",
    "texts_of",
]

PAD = 0
_LINE = 64  # bytes of memory for a line, at least
BUCKET_SHARES = (0.3, 0.45, 0.65, 1.0)
SYNONYM_PAIRS = {"train": 50_000, "validation": 1000, "test": 1000}
_STEMS = {"train": ("train",), "validation": ("val",), "test": ("test_2016_flickr", "test")}


def load_pairs(config: TranslationConfig, split: TranslationSplit) -> tuple[list[str], list[str]]:
    """Reads one split of the pairs that the configuration names, as text.

    Args:
      config: the choice of pairs; `pairs` and `targets` are for the train split only.
      split: "train", "validation" or "test".

    Returns:
      Sources and targets, as many and at least one, without the whitespace around a sentence.

    Raises:
      FileNotFoundError: there are no files where the configuration points.
      ValueError: the split is unknown or empty, a file is not UTF-8 text, or the two sides, or
        `targets`, differ in the number of lines.
    """
    if split not in get_args(TranslationSplit):
        raise ValueError(f"split is {split!r}; choose train, validation or test")
    limit = config.pairs if split == "train" else 0
    if config.name == "synonyms":
        sources, targets = Synonyms.of(config).pairs(split, limit or SYNONYM_PAIRS[split])
    elif config.name == "files":
        sources, targets = _read_files(config, split)
    else:
        sources, targets = data.tfds_source.read_pairs(
            config.tfds_name,
            split,
            config.dir,
            config.source,
            config.target,
            limit,
            config.max_bytes,
        )
    sources = [text.strip() for text in sources[: limit or None]]
    targets = [text.strip() for text in targets[: limit or None]]
    if not sources:
        raise ValueError(f"data.name={config.name} holds no pair in its {split} split")
    if config.targets and split == "train":
        targets = _read_lines(Path(config.targets), config.max_bytes)
        if len(targets) != len(sources):
            raise ValueError(
                f"{config.targets} has {len(targets)} lines for {len(sources)} training pairs; "
                "data.targets needs one line for each"
            )
    return sources, targets


def make_tokenizer(config: TranslationConfig) -> Tokenizer:
    """The vocabulary that both sides share, with token 0 for padding and an EOS.

    Byte pairs are learned from the training pairs, without regard to `targets`, so that a
    distilled set has the tokens of the set that it comes from.

    Raises:
      ValueError, FileNotFoundError: as `load_pairs` and `train_bpe`.
    """
    if config.name == "synonyms":
        return Words(Synonyms.of(config).tokens)
    sources, targets = load_pairs(replace(config, targets=""), "train")
    return train_bpe(sources + targets, config.vocabulary)


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Lengths of batches, for sides of at most `max_length` tokens: (12, 18, 26, 40) for 40."""
    return tuple(sorted({max(round(max_length * share), 1) for share in BUCKET_SHARES}))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of token sequences, of which batches of few shapes are drawn.

    Both sides end with the EOS token, which their lengths include; the positions from a length on
    hold token 0. A pair belongs to the smallest bucket that holds both of its sides.

    Attributes:
      source: tokens of at least one pair.
      source_length: each in [1, M].
      target: as many rows.
      length: of the target, each in [1, L].
      buckets: rising lengths, the last of which holds every pair.
      left_out: how many pairs were too long and are not here.
      truncated: how many of those here were too long and lost the end of a side.

    Raises:
      ValueError: another dtype or shape, a length out of range, or buckets that do not rise or
        do not hold every pair.
    """

    source: Int32[np.ndarray, "pairs M"]
    source_length: Int32[np.ndarray, " pairs"]
    target: Int32[np.ndarray, "pairs L"]
    length: Int32[np.ndarray, " pairs"]
    buckets: tuple[int, ...]
    left_out: int = 0
    truncated: int = 0

    def __post_init__(self):
        for name, tokens, lengths in (
            ("source", self.source, self.source_length),
            ("target", self.target, self.length),
        ):
            if tokens.dtype != np.int32 or tokens.ndim != 2 or not len(self.source):
                raise ValueError(
                    f"{name} must be int32 [pairs, length] of at least one pair, "
                    f"not {tokens.dtype} {list(tokens.shape)}"
                )
            if lengths.dtype != np.int32 or lengths.shape != (len(self.source),):
                raise ValueError(
                    f"lengths of {name} must be int32 [{len(self.source)}], "
                    f"not {lengths.dtype} {list(lengths.shape)}"
                )
            if (
                len(tokens) != len(lengths)
                or not 1 <= lengths.min() <= lengths.max() <= tokens.shape[1]
            ):
                raise ValueError(f"lengths of {name} must lie in 1..{tokens.shape[1]}, one a pair")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets are {self.buckets}; give rising lengths")
        if self.longest > self.buckets[-1]:
            raise ValueError(
                f"a side has {self.longest} tokens, more than the last bucket of {self.buckets}"
            )

    @classmethod
    def encode(
        cls,
        tokenizer: Tokenizer,
        sources: list[str],
        targets: list[str],
        max_length: int,
        *,
        long: Literal["leave out", "truncate"],
        buckets: tuple[int, ...] = (),
    ) -> "Pairs":
        """The pairs as tokens.

        Args:
          tokenizer: one with an EOS.
          sources: texts.
          targets: texts, as many.
          max_length: the most tokens of a side with its EOS, from 2 up.
          long: what becomes of a pair with a longer side: "leave out" for training, or
            "truncate" for a test set, whose pairs all stay.
          buckets: rising lengths; empty for `default_buckets(max_length)`.

        Raises:
          ValueError: the tokenizer has no EOS or cannot express a text, a text spells a special
            token, the sides differ in number, or no pair is left.
        """
        if tokenizer.eos in (None, PAD):
            raise ValueError("translation needs a tokenizer with an EOS token other than token 0")
        if max_length < 2 or len(sources) != len(targets) or long not in ("leave out", "truncate"):
            raise ValueError(
                f"give a max_length of at least 2, not {max_length}; as many targets as sources, "
                f"not {len(targets)} and {len(sources)}; and long as 'leave out' or 'truncate', "
                f"not {long!r}"
            )
        sides = [_tokens(tokenizer, sources), _tokens(tokenizer, targets)]
        fits = [max(len(a), len(b)) < max_length for a, b in zip(*sides, strict=True)]
        if long == "leave out":
            sides = [[ids for ids, fit in zip(side, fits, strict=True) if fit] for side in sides]
        if not sides[0]:
            raise ValueError(
                f"none of {len(sources)} pairs has sides of at most {max_length} tokens; "
                "raise --data.max-length"
            )
        missing = len(fits) - sum(fits)
        return cls(
            *_padded(sides[0], max_length, tokenizer.eos),
            *_padded(sides[1], max_length, tokenizer.eos),
            buckets=buckets or default_buckets(max_length),
            left_out=missing if long == "leave out" else 0,
            truncated=missing if long == "truncate" else 0,
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def longest(self) -> int:
        """Tokens of the longest side."""
        return int(max(self.source_length.max(), self.length.max()))

    @cached_property
    def bucket_sizes(self) -> Int64[np.ndarray, " buckets"]:
        """How many pairs belong to each bucket."""
        return np.bincount(self._bucket, minlength=len(self.buckets))

    def batch(
        self, seed: int, step: int, size: int, *, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """This shard of the batch of a training step, a pure function of its arguments.

        The bucket is that of a pair drawn uniformly; the pairs of the batch are drawn from it
        uniformly and independently. So each draw is any pair of the set with equal probability,
        and all shards of a step have the same shape.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: pairs per global batch, over all shards.
          shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
          "source" and "target": int32 [B, L] with B = size / count and L one of `buckets`;
          "source_length" and "length": int32 [B].

        Raises:
          ValueError: an argument is out of range, or count does not divide size.
        """
        generator, mine = shard_of_step(seed, step, size, shard)
        bucket = self._bucket[generator.integers(0, len(self))]
        first = self.bucket_sizes[:bucket].sum()
        draws = generator.integers(first, first + self.bucket_sizes[bucket], size)[mine]
        return self._rows(self._by_bucket[draws], self.buckets[bucket])

    def all(self, max_length: int = 0) -> dict[str, np.ndarray]:
        """All pairs in their order, in one shape, as `batch` returns them.

        Args:
          max_length: L, at least `longest`; 0 for the last bucket.

        Raises:
          ValueError: a side is longer.
        """
        max_length = max_length or self.buckets[-1]
        if max_length < self.longest:
            raise ValueError(
                f"max_length is {max_length}, too short for a side of {self.longest} tokens"
            )
        return self._rows(np.arange(len(self)), max_length)

    @cached_property
    def _bucket(self) -> np.ndarray:
        return np.searchsorted(self.buckets, np.maximum(self.source_length, self.length))

    @cached_property
    def _by_bucket(self) -> np.ndarray:
        return np.argsort(self._bucket, kind="stable")

    def _rows(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        return {
            "source": _resized(self.source[rows], length),
            "source_length": self.source_length[rows],
            "target": _resized(self.target[rows], length),
            "length": self.length[rows],
        }


def texts_of(
    tokenizer: Tokenizer, tokens: Integer[Any, "B L"], lengths: Integer[Any, " B"]
) -> list[str]:
    """Sequences of tokens as texts: what stands before the first EOS, without padding.

    Args:
      tokenizer: one with an EOS.
      tokens: of B sequences.
      lengths: tokens from there on are not read.

    Returns:
      B texts, without the whitespace around them.

    Raises:
      ValueError: a token outside the vocabulary.
    """
    texts = []
    for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
        row = row[:length]
        row = row[: np.argmax(row == tokenizer.eos)] if (row == tokenizer.eos).any() else row
        texts.append(tokenizer.decode(row[row != PAD]).strip())
    return texts


def parse_template(tokenizer: Tokenizer, text: str) -> tuple[list[int | None], bool]:
    """A sequence of which only some tokens are given.

    Args:
      tokenizer: one with an EOS.
      text: what is given, with "_" for each hidden token (the space before it is part of it),
        and "..." at the end where what follows is open.

    Returns:
      One id for each token, None for the hidden ones; and whether the end is open: where it is
      not, EOS is the last id.

    Raises:
      ValueError: as `Pairs.encode`.
    """
    text, is_open = text.strip().removesuffix("..."), text.strip().endswith("...")
    ids: list[int | None] = []
    for part in re.split(r"\s*(_+)", text.rstrip()):
        holes = bool(part) and not part.strip("_")
        if holes:
            ids += [None] * len(part)
        elif part:
            ids += _tokens(tokenizer, [part])[0].tolist()
    return ids + [tokenizer.eos] * (not is_open), is_open


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encoded, special = [tokenizer.encode(text) for text in texts], {PAD, tokenizer.eos}
    for text, ids in zip(texts, encoded, strict=True):
        if not special.isdisjoint(ids.tolist()):
            raise ValueError(
                f"{text!r} spells the padding or the EOS token; take it out of the pairs"
            )
    return encoded


def _padded(
    sequences: list[np.ndarray], max_length: int, eos: int
) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([min(len(ids) + 1, max_length) for ids in sequences], np.int32)
    padded = np.full((len(sequences), lengths.max()), PAD, np.int32)
    for row, ids, length in zip(padded, sequences, lengths, strict=True):
        row[: length - 1] = ids[: length - 1]
        row[length - 1] = eos
    return padded, lengths


def _resized(tokens: np.ndarray, length: int) -> np.ndarray:
    result = np.full((len(tokens), length), PAD, np.int32)
    shared = min(length, tokens.shape[1])
    result[:, :shared] = tokens[:, :shared]
    return result


def _read_files(config: TranslationConfig, split: str) -> tuple[list[str], list[str]]:
    paths = [_find(config.dir, split, language) for language in (config.source, config.target)]
    sources, targets = (_read_lines(path, config.max_bytes) for path in paths)
    if len(sources) != len(targets):
        raise ValueError(
            f"{paths[0]} has {len(sources)} lines and {paths[1]} has {len(targets)}; "
            "a pair is one line of each"
        )
    return sources, targets


def _find(directory: str, split: str, language: str) -> Path:
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{directory} is no folder; give --data.dir one with the pairs")
    stems = "|".join(_STEMS[split])
    pattern = re.compile(rf"(?:.*[_.-])?(?:{stems})\.{re.escape(language)}(?:\.gz)?")
    found = {path for path in folder.iterdir() if pattern.fullmatch(path.name)}
    # A file that is there both plain and compressed is read plain.
    found = sorted(
        path for path in found if not (path.suffix == ".gz" and path.with_suffix("") in found)
    )
    if not found:
        raise FileNotFoundError(
            f"{directory} holds no {_STEMS[split][0]}.{language} (or .gz, or behind a prefix such "
            "as multi30k_); put it there, or take the procedural pairs with --data.name synonyms"
        )
    if len(found) > 1:
        raise ValueError(
            f"{directory} holds {found[0].name} and {found[1].name}; leave one set in the folder"
        )
    return found[0]


def _read_lines(path: Path, most: int) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a UTF-8 text with one sentence per line")
    text = read_text(path, most, "raise --data.max-bytes")
    if text.count("\n") > most // _LINE:
        raise ValueError(f"{path} has more than {most // _LINE} lines; raise --data.max-bytes")
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
