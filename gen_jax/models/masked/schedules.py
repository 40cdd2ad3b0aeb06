"""How many positions each round of parallel decoding reveals: mask schedules as objects.

A schedule is the share gamma(r) of positions that are still masked when a share r of the rounds is
over (Chang et al. 2022, 2202.04200, section 3.2), falling from 1 to 0. Importing this loads nothing
heavy.
"""

import math

import numpy as np
from jaxtyping import Int32

from gen_jax.config import frozen

__all__ = [
    "SCHEDULES",
    "Cosine",
    "Curve",
    "Exponential",
    "Fixed",
    "Logarithmic",
    "Optimal",
    "Power",
    "Schedule",
    "check_rounds",
    "masked_after",
]


@frozen
class Schedule:
    """Sizes of the groups of positions that are revealed together; a subclass says which."""

    def sizes(self, length: int, rounds: int) -> tuple[int, ...]:
        """Positions revealed in each round, `rounds` of them, at least 1 each, `length` in all.

        Raises:
          ValueError: there are no rounds, or more rounds than positions.
        """
        raise NotImplementedError

    def check(self, length: int, rounds: int) -> None:
        """Refuses what `sizes` refuses.

        Raises:
          ValueError: there are no rounds, or more rounds than positions.
        """
        check_rounds(length, rounds)


def check_rounds(length: int, rounds: int) -> None:
    """Refuses a number of rounds that cannot reveal at least one position each.

    Raises:
      ValueError: there are no rounds, or more rounds than positions.
    """
    if rounds < 1:
        raise ValueError(f"the number of rounds must be at least 1, got {rounds}")
    if rounds > length:
        raise ValueError(
            f"{rounds} rounds are more than the {length} positions: each round reveals at least "
            f"one, so use at most {length}"
        )


@frozen
class Curve(Schedule):
    """A schedule that follows gamma, rounded down, and reveals at least one position a round."""

    def gamma(self, ratio: float, length: int) -> float:
        """The share of `length` positions that is masked after a share `ratio` of the rounds.

        Args:
          ratio: in (0, 1).
          length: L.
        """
        raise NotImplementedError

    def sizes(self, length: int, rounds: int) -> tuple[int, ...]:
        """See `Schedule.sizes`."""
        check_rounds(length, rounds)
        masked, sizes = length, []
        for done in range(1, rounds + 1):
            left = rounds - done
            wanted = math.floor(length * self.gamma(done / rounds, length) + 1e-9) if left else 0
            wanted = min(max(wanted, left), masked - 1)
            sizes.append(masked - wanted)
            masked = wanted
        return tuple(sizes)


@frozen
class Cosine(Curve):
    """gamma(r) = cos(pi r / 2), MaskGIT's choice."""

    def gamma(self, ratio: float, length: int) -> float:
        """See `Curve.gamma`."""
        return math.cos(math.pi * ratio / 2)


@frozen
class Power(Curve):
    """gamma(r) = 1 - r ** exponent: 1 linear (Mask-Predict), 2 square, 3 cubic, 1/2 square root.

    Attributes:
      exponent: above 0.
    """

    exponent: float = 1.0

    def __post_init__(self):
        if self.exponent <= 0:
            raise ValueError(f"the exponent must be above 0, got {self.exponent}")

    def gamma(self, ratio: float, length: int) -> float:
        """See `Curve.gamma`."""
        return 1 - ratio**self.exponent


@frozen
class Exponential(Curve):
    """gamma(r) = 1 - L ** (r - 1): slow, then all at once."""

    def gamma(self, ratio: float, length: int) -> float:
        """See `Curve.gamma`."""
        return 1 - length ** (ratio - 1)


@frozen
class Logarithmic(Curve):
    """gamma(r) = -log r / log L, at most 1: nearly all at once, then slow."""

    def gamma(self, ratio: float, length: int) -> float:
        """See `Curve.gamma`."""
        return min(-math.log(ratio) / math.log(length), 1.0) if length > 1 else 0.0


@frozen
class Fixed(Schedule):
    """Sizes that are written out.

    Attributes:
      groups: positions revealed in each round.
    """

    groups: tuple[int, ...]

    def __post_init__(self):
        if not self.groups or min(self.groups) < 1:
            raise ValueError(f"every round must reveal at least one position, got {self.groups}")

    def sizes(self, length: int, rounds: int) -> tuple[int, ...]:
        """The sizes; see `check`."""
        self.check(length, rounds)
        return self.groups

    def check(self, length: int, rounds: int) -> None:
        """Refuses a length or a number of rounds that is not that of the sizes.

        Raises:
          ValueError: one of them is not.
        """
        check_rounds(length, rounds)
        if rounds != len(self.groups) or length != sum(self.groups):
            raise ValueError(
                f"{self.groups} is a schedule of {len(self.groups)} rounds over "
                f"{sum(self.groups)} positions, not of {rounds} over {length}"
            )


@frozen
class Optimal(Schedule):
    """The sizes that lose least in a random order, by dynamic programming.

    With f(m) the mean entropy of a random subset of m positions, a group of g positions drawn at
    once when m are known loses g [f(m + 1) - f(m)] - [f(m + g) - f(m)] nats (2510.25544). The
    profile is known for a known distribution, and can be measured for a network
    (`losses.entropy_profile`).

    Attributes:
      profile: f(0) = 0 to f(L), L + 1 values in nats.
    """

    profile: tuple[float, ...]

    def __post_init__(self):
        if len(self.profile) < 2:
            raise ValueError("a profile has at least two values, f(0) to f(L)")

    def sizes(self, length: int, rounds: int) -> tuple[int, ...]:
        """See `Schedule.sizes` and `check`."""
        self.check(length, rounds)
        best = {length: (0.0, ())}  # from m known positions to all, with `left` rounds
        for left in range(1, rounds + 1):
            longer = {}
            for known in range(length - left + 1):
                if left == rounds and known:
                    break
                ways = (
                    (self._lost(known, end - known) + best[end][0], (end - known, *best[end][1]))
                    for end in range(known + 1, length + 1)
                    if end in best
                )
                longer[known] = min(ways)
            best = longer
        return best[0][1]

    def check(self, length: int, rounds: int) -> None:
        """Refuses a length that is not that of the profile, and impossible rounds.

        Raises:
          ValueError: the length is another, there are no rounds, or more rounds than positions.
        """
        check_rounds(length, rounds)
        if length != len(self.profile) - 1:
            raise ValueError(f"this profile is of {len(self.profile) - 1} positions, not {length}")

    def _lost(self, known, size):
        f = self.profile
        return size * (f[known + 1] - f[known]) - (f[known + size] - f[known])


SCHEDULES: dict[str, Curve] = {
    "cosine": Cosine(),
    "linear": Power(1.0),
    "square": Power(2.0),
    "cubic": Power(3.0),
    "square_root": Power(0.5),
    "exponential": Exponential(),
    "logarithmic": Logarithmic(),
}


def masked_after(
    schedule: Schedule, length: int, rounds: int
) -> Int32[np.ndarray, "{length}+1 {rounds}"]:
    """Positions still masked after each round, for every number of positions up to `length`.

    A curve is followed anew for each number of positions; where they are fewer than the rounds, one
    is revealed a round, and the rounds that are left do nothing. The sizes of other schedules are
    those of the largest number; where there are fewer positions, the first groups count as revealed
    already.

    Args:
      schedule: gives the sizes.
      length: the largest number of positions.
      rounds: how many.

    Returns:
      int32 [length + 1, rounds]; row n is for n positions.

    Raises:
      ValueError: there are no rounds, or more than positions.
    """
    check_rounds(length, rounds)
    if not isinstance(schedule, Curve):
        left = length - np.cumsum(schedule.sizes(length, rounds))
        return np.minimum(np.arange(length + 1)[:, None], left).astype(np.int32)
    table = np.zeros((length + 1, rounds), np.int32)
    for number in range(1, length + 1):
        sizes = schedule.sizes(number, min(rounds, number))
        table[number, : len(sizes)] = number - np.cumsum(sizes)
    return table
