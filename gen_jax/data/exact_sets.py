"""Known distributions, each with one difficulty of parallel generation, to be enumerated."""

from functools import cached_property
from itertools import pairwise
from itertools import permutations as orderings

import numpy as np
from jaxtyping import Float64, Int32, Integer

from gen_jax.config import frozen
from gen_jax.data.exact import Enumerated
from gen_jax.data.streams import shard_of_step

__all__ = [
    "EOS",
    "BinaryPyramid",
    "NoisyMixture",
    "binary_chain",
    "bit_entropy",
    "even_parity",
    "lengths",
    "lengths_first",
    "modes",
    "permutations",
]

EOS = 1
"""The token that fills the positions behind a sequence of `lengths`; its content is token 0."""


def modes(weights: tuple[float, ...], length: int) -> Enumerated:
    """K sequences of which no two agree at any position: token (k + i) mod K at position i.

    Drawing all positions at once loses (L - 1) H(weights) nats, and gives one of the modes with
    probability sum_k weights_k ** L only (the multi-modality problem of Gu et al., 2017,
    arXiv 1711.02281).

    Args:
      weights: the K probabilities, each above 0, with sum 1.
      length: L, from 1 up.

    Raises:
      ValueError: the weights are no distribution, or the length is below 1.
    """
    number = len(weights)
    support = (np.arange(number)[:, None] + np.arange(length)) % max(number, 1)
    return Enumerated(support.astype(np.int32), np.array(weights, np.float64), number)


@frozen
class NoisyMixture:
    """Modes seen through noise: p(x) = sum_k pi_k prod_i [(1 - e) 1{x_i = c_ki} + e / V].

    Given its latent k the positions are independent: a strategy that draws k first is exact in
    two rounds.

    Attributes:
      number: K, from 1 up to V.
      length: L, from 1 up.
      vocabulary: V.
      noise: e in [0, 1]; the probability that a token is replaced by a uniform one.
      weights: the K probabilities pi, each above 0; None for 1 / K.

    Raises:
      ValueError: an argument is out of range, or the weights are no distribution.
    """

    number: int
    length: int
    vocabulary: int
    noise: float
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        if not 1 <= self.number <= self.vocabulary or self.length < 1 or not 0 <= self.noise <= 1:
            raise ValueError(
                f"{self.number} modes of length {self.length} over {self.vocabulary} tokens with "
                f"noise {self.noise}: there are 1..V modes, the length is at least 1, and the "
                "noise is in [0, 1]"
            )
        prior = self.prior
        if len(prior) != self.number or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-9:
            raise ValueError(f"weights must be {self.number} probabilities above 0 with sum 1")

    @property
    def prior(self) -> Float64[np.ndarray, " K"]:
        """pi, the distribution of the latent."""
        equal = (1 / self.number,) * self.number
        return np.array(equal if self.weights is None else self.weights, np.float64)

    @property
    def centres(self) -> Int32[np.ndarray, "K L"]:
        """The modes; no two agree at any position."""
        rows = (np.arange(self.number)[:, None] + np.arange(self.length)) % self.vocabulary
        return rows.astype(np.int32)

    @property
    def components(self) -> Float64[np.ndarray, "K L V"]:
        """The distribution of each token given the latent."""
        hit = self.centres[:, :, None] == np.arange(self.vocabulary)
        return (1 - self.noise) * hit + self.noise / self.vocabulary

    def posterior(self, tokens: Integer[np.ndarray, "B L"]) -> Float64[np.ndarray, "B K"]:
        """The distribution of the latent given whole sequences.

        Args:
          tokens: each in [0, V).

        Returns:
          By convention the prior where the sequence cannot occur.
        """
        sites = np.arange(self.length)
        likelihood = self.components[:, sites, tokens].prod(axis=2).T * self.prior
        total = likelihood.sum(axis=1, keepdims=True)
        return np.where(total > 0, likelihood / np.where(total > 0, total, 1), self.prior)

    @cached_property
    def data(self) -> Enumerated:
        """The distribution of x, with the latent summed out."""
        return Enumerated.from_dense(self._tables().sum(axis=0))

    @cached_property
    def joint(self) -> Enumerated:
        """The distribution of (k, x): the latent as a token before the sequence."""
        rows = np.argwhere(self._tables() > 0).astype(np.int32)
        return Enumerated(rows, self._tables()[tuple(rows.T)], self.vocabulary)

    def _tables(self) -> np.ndarray:
        """float64 [K, *V]: the joint distribution."""
        result = self.prior
        for i in range(self.length):
            factor = self.components[:, i].reshape(self.number, *[1] * i, self.vocabulary)
            result = result[..., None] * factor
        return result


def even_parity(length: int) -> Enumerated:
    """Bits whose sum is even, all 2 ** (L - 1) sequences alike.

    Any L - 1 of the bits are independent, so it is the last one alone that may not be drawn in
    parallel. A mixture of products needs 2 ** (L - 1) components to be exact.

    Raises:
      ValueError: the length is below 1.
    """
    bits = _all_bits(length)
    even = bits[bits.sum(axis=1) % 2 == 0]
    return Enumerated(even, np.full(len(even), 1 / len(even)), 2)


def permutations(length: int) -> Enumerated:
    """The L! orders of L different tokens, all alike.

    Raises:
      ValueError: the length is not in 1..8.
    """
    if not 1 <= length <= 8:
        raise ValueError(f"length is {length}; 1..8 have permutations few enough to list")
    rows = np.array(list(orderings(range(length))), np.int32)
    return Enumerated(rows, np.full(len(rows), 1 / len(rows)), length)


def binary_chain(length: int, stay: float) -> Enumerated:
    """A stationary Markov chain of bits that keeps its state with one probability.

    Drawing all positions at once loses (L - 1) (ln 2 - h(stay)) nats, with h the entropy of a bit.

    Args:
      length: L, from 1 up.
      stay: in [0, 1].

    Raises:
      ValueError: an argument is out of range.
    """
    if not 0 <= stay <= 1:
        raise ValueError(f"stay is {stay}, no probability")
    bits = _all_bits(length)
    kept = bits[:, 1:] == bits[:, :-1]
    prob = 0.5 * np.where(kept, stay, 1 - stay).prod(axis=1)
    return Enumerated(bits[prob > 0], prob[prob > 0], 2)


def lengths(maximum: int) -> Enumerated:
    """n times token 0, then `EOS` up to the last position, with n uniform on 1..maximum.

    The content holds no information, so that all that a strategy can get wrong is the length.

    Raises:
      ValueError: the maximum is below 1.
    """
    if maximum < 1:
        raise ValueError(f"maximum is {maximum}; a sequence has at least one token")
    support = np.where(np.arange(maximum) <= np.arange(maximum)[:, None], 0, EOS)
    return Enumerated(support.astype(np.int32), np.full(maximum, 1 / maximum), 2)


def lengths_first(maximum: int) -> Enumerated:
    """The same sequences behind a token n - 1 that tells their length.

    Raises:
      ValueError: the maximum is below 1.
    """
    behind = lengths(maximum)
    support = np.concatenate([np.arange(maximum, dtype=np.int32)[:, None], behind.support], axis=1)
    return Enumerated(support, behind.prob, max(maximum, 2))


@frozen
class BinaryPyramid:
    """Images of bits at sides 1, 2, 4, ...: each pixel copies the pixel above it, or flips.

    A pixel of one level has four children, the block that it covers at the next level. Drawn
    level by level, each in parallel, the images are exact.

    Attributes:
      levels: from 1 up; the finest has side 2 ** (levels - 1).
      flip: in (0, 1); the probability that a child differs from its parent.

    Raises:
      ValueError: an argument is out of range.
    """

    levels: int
    flip: float

    def __post_init__(self):
        if self.levels < 1 or not 0 < self.flip < 1:
            raise ValueError(
                f"{self.levels} levels with flip {self.flip}: give at least 1, and one in (0, 1)"
            )

    @property
    def edges(self) -> int:
        """The number of pixels that have a parent: 4 + 16 + ..."""
        return sum(4**level for level in range(1, self.levels))

    @property
    def entropy(self) -> float:
        """Nats of all levels together: ln 2 + edges h(flip)."""
        return float(np.log(2) + self.edges * bit_entropy(self.flip))

    @property
    def one_shot_gap(self) -> float:
        """What drawing all pixels of all levels at once loses, in nats: edges (ln 2 - h(flip))."""
        return float(self.edges * (np.log(2) - bit_entropy(self.flip)))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The pixels of each level, as positions in the order of `data`."""
        first = np.cumsum([0, *(4**level for level in range(self.levels))])
        return tuple(tuple(range(a, b)) for a, b in pairwise(first))

    def batch(
        self, seed: int, step: int, size: int, *, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """Images with all their levels, "tokens" int32 [B, edges + 1]; see `Enumerated.batch`."""
        stream, mine = shard_of_step(seed, step, size, shard)
        uniform = stream.random((size, self.edges + 1))[mine]
        flipped = uniform < np.append(0.5, np.full(self.edges, self.flip))
        levels = [flipped[:, :1].reshape(-1, 1, 1)]
        for group in self.groups[1:]:
            above = _children(levels[-1])
            levels.append(above ^ flipped[:, group].reshape(above.shape))
        flat = [level.reshape(len(level), -1) for level in levels]
        return {"tokens": np.concatenate(flat, axis=1).astype(np.int32)}

    def log_prob(self, tokens: Integer[np.ndarray, "B L"]) -> Float64[np.ndarray, " B"]:
        """log p of images with all their levels, in nats.

        Args:
          tokens: bits, in the order of `data`.
        """
        levels = [tokens[:, g].reshape(-1, 2**i, 2**i) for i, g in enumerate(self.groups)]
        flips = np.zeros(len(tokens))
        for above, below in pairwise(levels):
            flips += (_children(above) != below).sum((1, 2))
        kept = self.edges - flips
        return flips * np.log(self.flip) + kept * np.log1p(-self.flip) - np.log(2)

    @cached_property
    def data(self) -> Enumerated:
        """The distribution of all pixels, levels one after the other, each row by row.

        Raises:
          ValueError: there are more than 2 levels, and more than 2**20 images.
        """
        if self.levels > 2:
            raise ValueError(f"{self.levels} levels have too many images to list; 2 do not")
        bits = _all_bits(self.edges + 1)
        flipped = bits[:, 1:] != bits[:, :1]
        prob = 0.5 * np.where(flipped, self.flip, 1 - self.flip).prod(axis=1)
        return Enumerated(bits, prob, 2)

    @cached_property
    def leaves(self) -> Enumerated:
        """The distribution of the finest level alone, row by row.

        Raises:
          ValueError: there are more than 3 levels, and more than 2**16 images.
        """
        if self.levels > 3:
            raise ValueError(f"{self.levels} levels have too many images to list; 3 do not")
        same = 1 - self.flip
        copy = np.array([[same, self.flip], [self.flip, same]])
        below = np.eye(2)
        for _ in range(1, self.levels):
            # One child's pixels given its parent, then four children that are independent.
            child = copy @ below
            pair = np.einsum("ra,rb->rab", child, child).reshape(2, -1)
            below = np.einsum("ra,rb->rab", pair, pair).reshape(2, -1)
        prob = 0.5 * below.sum(axis=0)
        return Enumerated(_raster(_all_bits(4 ** (self.levels - 1)), self.levels), prob, 2)


def bit_entropy(probability: float) -> float:
    """h(p), in nats: the entropy of a bit that is set with probability p in [0, 1]."""
    p = np.array([probability, 1 - probability])
    return float(-p @ np.log(np.where(p > 0, p, 1)))


def _children(level: np.ndarray) -> np.ndarray:
    """[B, 2 s, 2 s]: for each pixel of the next level, the pixel [B, s, s] above it."""
    return level.repeat(2, axis=1).repeat(2, axis=2)


def _all_bits(length: int) -> np.ndarray:
    """int32 [2**L, L]: all sequences of bits, in lexicographic order."""
    if not 1 <= length <= 20:
        raise ValueError(f"length is {length}; 1..20 bits have sequences few enough to list")
    return (np.arange(1 << length)[:, None] >> np.arange(length)[::-1] & 1).astype(np.int32)


def _raster(blocks: np.ndarray, levels: int) -> np.ndarray:
    """Pixels listed block by block, blocks of blocks first: int32 [images, side**2] row by row."""
    depth = levels - 1
    if depth == 0:
        return blocks
    tree = blocks.reshape(-1, *[2] * (2 * depth))
    rows = range(1, 2 * depth, 2)
    columns = range(2, 2 * depth + 1, 2)
    return np.ascontiguousarray(tree.transpose(0, *rows, *columns).reshape(len(blocks), -1))
