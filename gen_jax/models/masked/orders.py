"""Orders of the positions of a grid that are the same for all samples; imports nothing heavy."""

import functools
import itertools
import math

__all__ = ["halton_order"]

_BASES = 2, 3, 5


@functools.lru_cache
def halton_order(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of a grid in the order in which points of the Halton sequence reach them.

    The points fill the grid evenly, so that positions that are drawn together are far from each
    other and tell little about each other (Besnier et al. 2025, 2503.17076, section 4). The axes
    have the bases 2, 3 and 5; of points in a cell that was reached before only the first counts.
    A line has the order of van der Corput: its middle, its quarters, and so on.

    Args:
      grid: sizes of one to three axes, such as rows and columns.

    Returns:
      All positions, counted along the last axis first.

    Raises:
      ValueError: there are no axes, more than three, or one of them is empty.
    """
    if not 1 <= len(grid) <= len(_BASES) or min(grid) < 1:
        raise ValueError(f"a grid has one to three axes of at least one position, not {grid}")
    reached: dict[int, None] = {}
    for index in itertools.count(1):
        position = 0
        for base, size in zip(_BASES, grid, strict=False):
            numerator, denominator = _mirrored(index, base)
            position = position * size + numerator * size // denominator
        reached.setdefault(position)
        if len(reached) == math.prod(grid):
            return tuple(reached)
    raise AssertionError("a Halton sequence reaches every cell")


def _mirrored(index, base):
    """The digits of a number behind the point, the last one first, as a fraction."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator
