"""A distribution over a few sequences, known in full: the truth that a strategy is measured by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64, Integer

from gen_jax.data.streams import check_batch, check_tokens, generator, shard_of_step

__all__ = ["Enumerated"]

_LARGEST_DENSE = 1 << 24
_LONGEST_OF_SUBSETS = 16


@dataclass(frozen=True, eq=False)
class Enumerated:
    """A distribution over sequences of L tokens, given by those that can occur: its support.

    A table of the probabilities of all V**L sequences has one axis of size V per position; its
    shape [V, ..., V] is written *V.

    Entropies and correlations are in nats and exact up to rounding.

    Attributes:
      support: distinct rows, at least one, of at least one token.
      prob: of each row, above 0, with sum 1.
      vocabulary: V; every token lies in [0, V).

    Raises:
      ValueError: another dtype or shape, equal rows, a token out of range, or probabilities
        that are no distribution.
    """

    support: Int32[np.ndarray, "sequences L"]
    prob: Float64[np.ndarray, " sequences"]
    vocabulary: int

    def __post_init__(self):
        support, prob = self.support, self.prob
        if support.dtype != np.int32 or support.ndim != 2 or 0 in support.shape:
            raise ValueError(
                "support must be int32 [sequences, L], both at least 1, "
                f"not {support.dtype} {list(support.shape)}"
            )
        if prob.dtype != np.float64 or prob.shape != support.shape[:1]:
            raise ValueError(
                f"prob must be float64 [{len(support)}], not {prob.dtype} {list(prob.shape)}"
            )
        check_tokens(support, self.vocabulary)
        # A NaN fails both comparisons.
        if not (np.all(prob > 0) and abs(prob.sum() - 1) <= 1e-9):
            raise ValueError("prob is no distribution: not above 0 with sum 1")
        if self.agreement(range(self.length)).max() + 1 < len(support):
            raise ValueError("support holds a sequence twice; add its probabilities up")

    @classmethod
    def from_dense(cls, dense: Float64[np.ndarray, "*V"]) -> "Enumerated":
        """The distribution with the probabilities of a table.

        Args:
          dense: one axis per position; sequences of probability 0 are not in the support.

        Raises:
          ValueError: the axes differ, or the entries are no distribution.
        """
        if dense.ndim == 0 or len(set(dense.shape)) != 1:
            raise ValueError(f"a table has L >= 1 axes of one size V, not {list(dense.shape)}")
        # Where an entry is below 0 or NaN it stays, to be refused.
        support = np.argwhere(dense != 0).astype(np.int32)
        return cls(support, dense[dense != 0], dense.shape[0])

    @property
    def length(self) -> int:
        """L, the number of positions."""
        return self.support.shape[1]

    def dense(self) -> Float64[np.ndarray, "*V"]:
        """The table of the probabilities of all V**L sequences.

        Raises:
          ValueError: there are more than 2**24 sequences.
        """
        if self.vocabulary**self.length > _LARGEST_DENSE:
            raise ValueError(
                f"{self.vocabulary}**{self.length} sequences are too many for one table"
            )
        table = np.zeros((self.vocabulary,) * self.length)
        table[tuple(self.support.T)] = self.prob
        return table

    def log_prob(self, tokens: Integer[Any, "B L"]) -> Float64[np.ndarray, " B"]:
        """The log-probability of sequences.

        Args:
          tokens: each in [0, V).

        Returns:
          In nats; -inf for a sequence that cannot occur.

        Raises:
          ValueError: another shape or dtype, or a token out of range.
        """
        tokens = self._check(tokens)
        check_tokens(tokens, self.vocabulary)
        rows = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(self.support))}
        found = [rows.get(row.tobytes(), -1) for row in np.ascontiguousarray(tokens, np.int32)]
        return np.append(np.log(self.prob), -np.inf)[np.array(found, np.int64)]

    def sample(self, seed: int, number: int) -> Int32[np.ndarray, "{number} L"]:
        """Independent sequences, a pure function of the arguments.

        Args:
          seed: in [0, 2**64).
          number: from 1 up.

        Raises:
          ValueError: an argument is out of range.
        """
        check_batch(seed, 0, number)
        return self._draw(generator(seed, 0).random(number))

    def batch(
        self, seed: int, step: int, size: int, *, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """This shard of a batch of independent sequences, a pure function of its arguments.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: sequences per global batch, over all shards.
          shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
          "tokens": int32 [B, L], with B = size / count.

        Raises:
          ValueError: an argument is out of range, or count does not divide size.
        """
        stream, mine = shard_of_step(seed, step, size, shard)
        return {"tokens": self._draw(stream.random(size)[mine])}

    @cached_property
    def entropy(self) -> float:
        """H(x), in nats."""
        return float(-self.prob @ np.log(self.prob))

    @cached_property
    def marginals(self) -> Float64[np.ndarray, "L V"]:
        """The distribution of the token at each position."""
        return (self.prob @ self._one_hot).reshape(self.length, self.vocabulary)

    def conditionals(
        self, tokens: Integer[Any, "B L"], mask_id: int
    ) -> Float64[np.ndarray, "B L V"]:
        """The distribution of each position given the positions that are known.

        A known position has its own token with probability 1. What cannot occur has no
        conditional distribution; there, by convention, an unknown position is uniform.

        Args:
          tokens: mask_id where unknown, else in [0, V).
          mask_id: outside [0, V).

        Raises:
          ValueError: another shape or dtype, or a token out of range.
        """
        tokens, size = self._check(tokens), self.vocabulary
        if 0 <= mask_id < size:
            raise ValueError(f"mask_id is {mask_id}, a token; choose one outside 0..{size - 1}")
        known = tokens != mask_id
        check_tokens(tokens[known], size)
        observed = (tokens[:, :, None] == np.arange(size)).reshape(len(tokens), -1)
        agreements = observed.astype(np.float64) @ self._one_hot.T
        weights = np.where(agreements > known.sum(axis=1, keepdims=True) - 0.5, self.prob, 0)
        joint = (weights @ self._one_hot).reshape(*tokens.shape, size)
        total = weights.sum(axis=1)[:, None, None]
        result = np.where(total > 0, joint / np.where(total > 0, total, 1), 1 / size)
        return np.where(known[:, :, None], observed.reshape(result.shape), result)

    def conditional_table(self, position: int, known: set[int]) -> Float64[np.ndarray, "*V"]:
        """p(x_position | x_known) for all contexts; uniform where the context cannot occur.

        Args:
          position: not in known.
          known: positions.

        Returns:
          One axis per position: of size V at `position` and those known, else 1.

        Raises:
          ValueError: there are more than 2**24 sequences.
        """
        others = tuple(i for i in range(self.length) if i not in known and i != position)
        joint = self.dense().sum(axis=others, keepdims=True)
        context = joint.sum(axis=position, keepdims=True)
        safe = np.where(context > 0, context, 1)
        return np.where(context > 0, joint / safe, 1 / self.vocabulary)

    def subset_entropy(self, positions: tuple[int, ...]) -> float:
        """H(x_S), in nats, of the tokens at some positions S; 0 where there are none.

        Raises:
          ValueError: a position is out of range or named twice.
        """
        self._check_positions(positions)
        return _entropy(np.bincount(self.agreement(positions), self.prob))

    def total_correlation(
        self, positions: tuple[int, ...] | None = None, given: tuple[int, ...] = ()
    ) -> float:
        """What drawing positions S in parallel loses, given positions E: a KL divergence in nats.

        sum over i in S of H(x_i | x_E), less H(x_S | x_E): the total correlation of Watanabe
        (1960), conditional as in Huang et al. (2022, arXiv 2206.05975).

        Args:
          positions: S; None for all that are not given.
          given: E, disjoint from S.

        Raises:
          ValueError: a position is out of range or named twice.
        """
        if positions is None:
            positions = tuple(i for i in range(self.length) if i not in given)
        given = tuple(given)
        context = self.subset_entropy(given)
        alone = sum(self.subset_entropy((*given, i)) - context for i in positions)
        return alone - (self.subset_entropy((*given, *positions)) - context)

    @cached_property
    def subset_entropies(self) -> Float64[np.ndarray, " 2**{self.length}"]:
        """H of every subset of positions, in nats.

        Position i is in the subset of index b where bit i of b is set.

        Raises:
          ValueError: L is above 16.
        """
        if self.length > _LONGEST_OF_SUBSETS:
            raise ValueError(f"{self.length} positions have too many subsets; at most 16 do")
        result = np.zeros(1 << self.length)
        pending = [(0, 0, np.zeros(len(self.support), np.int64))]
        while pending:
            index, first, groups = pending.pop()
            result[index] = _entropy(np.bincount(groups, self.prob))
            for i in range(first, self.length):
                finer = np.unique(self._keys(groups, i), return_inverse=True)[1]
                pending.append((index | 1 << i, i + 1, finer))
        return result

    @cached_property
    def entropy_profile(self) -> Float64[np.ndarray, " {self.length}+1"]:
        """f(m) for m = 0..L, in nats: the mean of H(x_S) over the subsets S of m positions.

        Raises:
          ValueError: L is above 16.
        """
        sizes = [index.bit_count() for index in range(1 << self.length)]
        sums = np.bincount(sizes, self.subset_entropies)
        return sums / [comb(self.length, m) for m in range(self.length + 1)]

    def agreement(self, positions: Sequence[int]) -> Int64[np.ndarray, " sequences"]:
        """A number for each sequence of the support: equal where they agree at some positions."""
        groups, bound = np.zeros(len(self.support), np.int64), 1
        for position in positions:
            if bound > np.iinfo(np.int64).max // self.vocabulary:
                groups = np.unique(groups, return_inverse=True)[1]
                bound = int(groups.max()) + 1
            groups, bound = self._keys(groups, position), bound * self.vocabulary
        return np.unique(groups, return_inverse=True)[1]

    @cached_property
    def _one_hot(self) -> np.ndarray:
        one_hot = self.support[:, :, None] == np.arange(self.vocabulary)
        return one_hot.reshape(len(self.support), -1).astype(np.float64)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        # The last entry is exactly 1, so that a number below 1 never falls behind the last row.
        sums = np.cumsum(self.prob)
        return sums / sums[-1]

    def _draw(self, uniform: np.ndarray) -> np.ndarray:
        return self.support[np.searchsorted(self._cumulative, uniform, side="right")]

    def _keys(self, groups: np.ndarray, position: int) -> np.ndarray:
        """int64 [sequences]: equal where rows have one group and one token at the position."""
        return groups * self.vocabulary + self.support[:, position]

    def _check(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        wanted = tokens.ndim == 2 and tokens.shape[1] == self.length
        if not wanted or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens must be integers [B, {self.length}], "
                f"not {tokens.dtype} {list(tokens.shape)}"
            )
        return tokens

    def _check_positions(self, positions) -> None:
        distinct = len(set(positions)) == len(positions)
        if not distinct or not all(0 <= i < self.length for i in positions):
            raise ValueError(
                f"positions {tuple(positions)} must be distinct and in 0..{self.length - 1}"
            )


def _entropy(prob: np.ndarray) -> float:
    return float(-prob @ np.log(np.where(prob > 0, prob, 1)))
