"""Erase-and-repair with a perfect network: its Markov kernels and the laws that they pass."""

from itertools import combinations
from math import prod
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Integer

from gen_jax.data.exact import Enumerated
from gen_jax.metrics.gaps import law_of_groups

__all__ = ["Rule", "kernel_of_conditionals", "mode_agreement", "repair_curve", "repair_kernel"]

Rule = Literal["random_one", "random_half", "confidence_one"]

_MOST_STATES = 4096


def repair_kernel(dist: Enumerated, rule: Rule) -> Float64[np.ndarray, "states states"]:
    """One round of erasing positions and drawing them again in parallel, as a Markov kernel.

    "random_one" erases one position, each alike: Gibbs sampling, with p stationary. "random_half"
    erases L // 2 positions, each set alike. "confidence_one" erases the position whose token is
    the least probable given all others, the first of equals.

    Args:
      dist: p, with V**L at most 4096.
      rule: which positions are erased.

    Returns:
      Of V**L states: row x is the distribution of the next sequence. Sequences are in
      lexicographic order, that of `Enumerated.dense` flattened.

    Raises:
      ValueError: the rule is unknown, or the sequences are too many.
    """
    length, states = dist.length, dist.vocabulary**dist.length
    if states > _MOST_STATES:
        raise ValueError(f"{states} sequences are too many for a kernel; at most {_MOST_STATES}")
    if rule == "confidence_one":
        sites = set(range(length))
        own = [dist.conditional_table(i, sites - {i}).reshape(-1) for i in range(length)]
        return kernel_of_conditionals(np.stack(own), dist.vocabulary, rule)
    if rule not in ("random_one", "random_half"):
        raise ValueError(f"rule is {rule!r}; choose random_one, random_half or confidence_one")
    number = 1 if rule == "random_one" else max(length // 2, 1)
    erased = list(combinations(range(length), number))
    return sum(_erase(_together(dist, some), some) for some in erased) / len(erased)


def kernel_of_conditionals(
    own: Float[np.ndarray, "L states"], vocabulary: int, rule: Rule
) -> Float[np.ndarray, "states states"]:
    """One round of erasing one position and drawing it again from given conditionals.

    Args:
      own: of each of V**L sequences, in lexicographic order, the probability of its token at each
        position given all its others, by any model.
      vocabulary: V.
      rule: "random_one" or "confidence_one".

    Returns:
      A kernel, as `repair_kernel`.

    Raises:
      ValueError: the rule is another.
    """
    if rule not in ("random_one", "confidence_one"):
        raise ValueError(f"rule is {rule!r}; choose random_one or confidence_one")
    shape = (vocabulary,) * len(own)
    kernels = [_erase(table.reshape(shape), (i,)) for i, table in enumerate(own)]
    if rule == "random_one":
        return sum(kernels) / len(kernels)
    # Rounding must not order tokens that are equally probable.
    erased = (own <= own.min(axis=0) * (1 + 1e-9)).argmax(axis=0)
    return sum((erased == i)[:, None] * kernel for i, kernel in enumerate(kernels))


def repair_curve(dist: Enumerated, rule: Rule, rounds: tuple[int, ...]) -> list[np.ndarray]:
    """The laws after some rounds of erase-and-repair that begin at a one-shot draw.

    Args:
      dist: p, with V**L at most 4096.
      rule: as in `repair_kernel`.
      rounds: numbers of rounds, from 0 up, each above the one before.

    Returns:
      One law per entry of rounds: float64 [V, ..., V], one axis per position.

    Raises:
      ValueError: the rule is unknown, the sequences are too many, or the rounds do not ascend.
    """
    if any(b <= a for a, b in zip((-1, *rounds), rounds, strict=False)):
        raise ValueError(f"rounds {rounds} must be at least 0 and ascend")
    kernel, laws, done = repair_kernel(dist, rule), [], 0
    law = law_of_groups(dist, (tuple(range(dist.length)),))
    for target in rounds:
        for _ in range(target - done):
            law = (law.reshape(-1) @ kernel).reshape(law.shape)
        laws.append(law)
        done = target
    return laws


def mode_agreement(centres: Integer[np.ndarray, "K L"], law: Float64[np.ndarray, "*V"]) -> float:
    """The mean part of a sequence's tokens that agree with its nearest mode.

    A law that seeks modes agrees more than the data does.

    Args:
      centres: the modes.
      law: one axis per position.
    """
    rows = np.stack(np.unravel_index(np.arange(law.size), law.shape), axis=1)
    agreement = (rows[:, None] == centres).mean(axis=2).max(axis=1)
    return float(law.reshape(-1) @ agreement)


def _erase(drawn: np.ndarray, positions: tuple[int, ...]) -> np.ndarray:
    """float64 [states, states]: the kernel that draws these positions again.

    Args:
      drawn: float64 [V, ..., V], the probability of their tokens given the other positions.
      positions: those that are erased.
    """
    shape = drawn.shape
    index = np.arange(drawn.size).reshape(shape)
    # Sequences share a context where they are equal once the erased tokens are set to 0.
    first = tuple(slice(0, 1) if i in positions else slice(None) for i in range(len(shape)))
    context = np.broadcast_to(index[first], shape).reshape(-1)
    return (context[:, None] == context) * drawn.reshape(-1)


def _together(dist: Enumerated, positions: tuple[int, ...]) -> np.ndarray:
    """float64 [V, ..., V]: the probability of these tokens, each given the other positions."""
    kept = set(range(dist.length)) - set(positions)
    tables = (dist.conditional_table(position, kept) for position in positions)
    return prod(tables, start=np.ones((dist.vocabulary,) * dist.length))
