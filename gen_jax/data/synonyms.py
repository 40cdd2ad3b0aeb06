"""A translation task whose targets have known modes: two styles and two word orders.

One source has up to four valid targets, all of one length. They are what a model that draws all
tokens at once, each from its own marginal, mixes up (the multi-modality of Gu et al., 1711.02281);
here the part of the probability that it loses is known exactly.
"""

import math
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from gen_jax.config import frozen
from gen_jax.data.config import TranslationConfig, TranslationSplit
from gen_jax.data.streams import check_range, generator
from gen_jax.data.tokenizer_base import EOS_NAME, PAD_NAME

__all__ = ["Synonyms"]

_STREAMS = {"dictionary": 0, "train": 1, "validation": 2, "test": 3}


@frozen
class Synonyms:
    """Sources of distinct words, and their translations in a style and an order.

    A source has n words, n uniform in [min_words, max_words], drawn without replacement. Each
    translates to one token, to two tokens, or to one of two synonyms; the synonyms of a target are
    all formal or all informal. The words of a target stand in the order of the source or in its
    reverse. Style and order are independent fair coins, so that the valid targets of a source are
    equally probable, and of one length.

    Attributes:
      words: W, source words: "s0" to "s{W-1}". Word i translates to "t{i}", to "t{i} u{i}", or
        to "f{i}" (formal) or "i{i}" (informal).
      min_words: fewest words of a source, from 1 up.
      max_words: most words of a source, at most W.
      orders: 2, or 1 for the order of the source only.
      styles: 2, or 1 for formal targets only.
      seed: in [0, 2**64); decides which words have synonyms or two tokens, and the pairs.
      styled: share of the words that have synonyms.
      double: share of the words that translate to two tokens.

    Raises:
      ValueError: a field is out of range.
    """

    words: int = 64
    min_words: int = 3
    max_words: int = 8
    orders: Literal[1, 2] = 2
    styles: Literal[1, 2] = 2
    seed: int = 0
    styled: float = 0.5
    double: float = 0.25

    def __post_init__(self):
        check_range("seed", self.seed, 0, 1 << 64)
        if not 1 <= self.min_words <= self.max_words <= self.words:
            raise ValueError(
                f"min_words {self.min_words}, max_words {self.max_words} and words {self.words} "
                "must rise, from 1 up"
            )
        if not (self.styled >= 0 and self.double >= 0 and self.styled + self.double <= 1):
            raise ValueError(
                f"styled {self.styled} and double {self.double} must be shares of at most 1 in sum"
            )

    @classmethod
    def of(cls, config: TranslationConfig) -> "Synonyms":
        """The task that a configuration names."""
        return cls(
            words=config.words,
            min_words=config.min_words,
            max_words=config.max_words,
            orders=config.orders,
            styles=config.styles,
            seed=config.seed,
        )

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens: padding, EOS, the source words, then those of the translations."""
        target = {
            token
            for number in range(self.words)
            for style in range(self.styles)
            for token in self._translations[style][number]
        }
        sources = (f"s{number}" for number in range(self.words))
        return (
            PAD_NAME,
            EOS_NAME,
            *sources,
            *sorted(target, key=lambda token: (int(token[1:]), token)),
        )

    def pairs(self, split: TranslationSplit, number: int) -> tuple[list[str], list[str]]:
        """The first pairs of a split, each an independent draw from the task.

        The splits have random numbers of their own, but the same short source may be in both.

        Args:
          split: "train", "validation" or "test".
          number: of pairs, from 1 up; fewer are the first of more.

        Returns:
          Sources and targets, words and tokens between single spaces.

        Raises:
          ValueError: the split is unknown, or the number out of range.
        """
        if split not in get_args(TranslationSplit):
            raise ValueError(f"split is {split!r}; choose train, validation or test")
        check_range("number of pairs", number, 1, 1 << 40)
        random = generator(self.seed, _STREAMS[split])
        sources, targets = [], []
        for _ in range(number):
            count = random.integers(self.min_words, self.max_words + 1)
            numbers = random.permutation(self.words)[:count].tolist()
            style, order = random.integers(0, 2, 2).tolist()
            sources.append(" ".join(f"s{number}" for number in numbers))
            targets.append(self._target(numbers, style % self.styles, order % self.orders))
        return sources, targets

    def modes(self, source: str) -> list[tuple[str, float]]:
        """All valid targets of a source, each once, with their probabilities, which are equal.

        Args:
          source: distinct words of the task, between spaces; their number may be any.

        Raises:
          ValueError: another word, or a repeated one, or none.
        """
        numbers = self._numbers(source)
        targets = {
            self._target(numbers, style, order): None
            for style in range(self.styles)
            for order in range(self.orders)
        }
        return [(target, 1 / len(targets)) for target in targets]

    def log_prob(self, source: str, target: str) -> float:
        """log p(target | source) in nats; -inf for a target that is not valid.

        Raises:
          ValueError: as `modes`.
        """
        probability = dict(self.modes(source)).get(target, 0.0)
        return math.log(probability) if probability else -math.inf

    @cached_property
    def conditional_entropy(self) -> float:
        """H(target | source) in nats, the mean over all sources, exactly."""
        plain = self.words - self._counts[0]
        total = 0.0
        for count in range(self.min_words, self.max_words + 1):
            without_style = math.comb(plain, count) / math.comb(self.words, count)
            coins = (self.orders == 2 and count > 1) + (self.styles == 2) * (1 - without_style)
            total += coins * math.log(2)
        return total / (self.max_words - self.min_words + 1)

    def one_shot_valid_mass(self, source: str) -> float:
        """The probability of a valid target where each token is drawn from its own marginal.

        The marginals are exact given the source, and so is the length; 1 where one target is
        valid.

        Raises:
          ValueError: as `modes`.
        """
        tokens = self._tokens(source)
        marginals = (tokens[:, :, None] == tokens[:, None, :]).mean(axis=2)  # [L, modes]
        return float(marginals.prod(axis=0).sum())

    def conditional_total_correlation(self, source: str) -> float:
        """The entropies of the tokens given the source, summed, less that of the target; nats.

        It is the KL divergence from the distribution of the targets to the product of their
        marginals.

        Raises:
          ValueError: as `modes`.
        """
        tokens = self._tokens(source)
        marginals = (tokens[:, :, None] == tokens[:, None, :]).mean(axis=2)
        return float(-np.log(marginals).mean(axis=1).sum() - math.log(tokens.shape[1]))

    def accuracy(self, sources: list[str], outputs: list[str]) -> float:
        """The share of outputs that are a valid target of their source.

        Args:
          sources: at least one.
          outputs: as many.

        Raises:
          ValueError: the numbers differ or are 0, or as `modes`.
        """
        if not sources or len(sources) != len(outputs):
            raise ValueError(
                f"{len(outputs)} outputs for {len(sources)} sources; give one for each"
            )
        valid = [output in dict(self.modes(s)) for s, output in zip(sources, outputs, strict=True)]
        return sum(valid) / len(valid)

    @property
    def _counts(self) -> tuple[int, int]:
        styled = round(self.styled * self.words)
        return styled, min(round(self.double * self.words), self.words - styled)

    @cached_property
    def _kinds(self) -> tuple[str, ...]:
        styled, double = self._counts
        kinds = ["styled"] * styled + ["double"] * double
        kinds += ["plain"] * (self.words - len(kinds))
        order = generator(self.seed, _STREAMS["dictionary"]).permutation(self.words)
        return tuple(kinds[place] for place in order)

    @cached_property
    def _translations(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """By style and source word."""

        def of(number, kind, style):
            return {
                "styled": (f"{style}{number}",),
                "double": (f"t{number}", f"u{number}"),
                "plain": (f"t{number}",),
            }[kind]

        return tuple(
            tuple(of(number, kind, style) for number, kind in enumerate(self._kinds))
            for style in "fi"
        )

    def _target(self, numbers: list[int], style: int, order: int) -> str:
        numbers = numbers[::-1] if order else numbers
        translations = self._translations[style]
        return " ".join(token for n in numbers for token in translations[n])

    def _numbers(self, source: str) -> list[int]:
        known, words = self._known, source.split()
        if not words or len(set(words)) != len(words) or not set(words) <= known.keys():
            raise ValueError(
                f"{source!r} is no source: give distinct words of s0..s{self.words - 1}"
            )
        return [known[word] for word in words]

    @cached_property
    def _known(self) -> dict[str, int]:
        return {f"s{number}": number for number in range(self.words)}

    def _tokens(self, source: str) -> np.ndarray:
        return np.array([target.split() for target, _ in self.modes(source)]).T  # [L, modes]
