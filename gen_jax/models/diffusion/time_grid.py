"""Which of the time steps of a diffusion process a sampler visits; importing this loads no jax."""

from typing import Literal

import numpy as np
from jaxtyping import Int

from gen_jax.config import frozen

__all__ = ["Spacing", "TimeGrid"]

Spacing = Literal["leading", "trailing", "linspace"]


@frozen
class TimeGrid:
    """Which of the T time steps a sampler visits, from the noisiest down.

    The three spacings have the meaning of Lin et al. 2023 (2305.08891, table 2): "leading" counts
    up from 0 with a whole stride, "trailing" counts down from T - 1 with a real one, "linspace"
    takes both ends.

    Attributes:
      steps: how many are visited, at least 1.
      spacing: how they are spread.
      offset: added to every step of "leading"; 0 with the other spacings.

    Raises:
      ValueError: at construction, where a value is out of its range.
    """

    steps: int
    spacing: Spacing = "leading"
    offset: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.offset < 0:
            raise ValueError(f"offset must not be negative, got {self.offset}")
        if self.offset and self.spacing != "leading":
            raise ValueError(f'offset {self.offset} is for spacing "leading", not "{self.spacing}"')

    def timesteps(self, total: int, *, skip_last: bool = False) -> Int[np.ndarray, " S"]:
        """The steps visited, [steps] int64, decreasing.

        Args:
          total: T.
          skip_last: for "leading" and "linspace", spread one point more and leave the last one,
            t = 0, out. Multistep solvers do this: they jump from the point before to x_0.

        Raises:
          ValueError: there are more steps than T, the only step would start at the end of the
            grid, where there is no noise to take out, or the offset is not below the stride.
        """
        points = self.steps + (skip_last and self.spacing != "trailing")
        if points > total:
            more = ", one of which this solver leaves out" if points > self.steps else ""
            raise ValueError(f"{self.steps} sampling steps do not fit in {total} time steps{more}")
        if points == 1 < total and self.spacing != "trailing":
            raise ValueError(
                f'one step of "{self.spacing}" starts at t = {self.offset}; use "trailing"'
            )
        if self.offset >= (stride := total // points):
            raise ValueError(
                f"offset {self.offset} must be below the stride of {self.steps} steps, {stride}"
            )
        if self.spacing == "leading":
            grid = np.arange(points) * stride + self.offset
        elif self.spacing == "linspace":
            grid = np.linspace(0, total - 1, points).round()
        else:
            grid = np.round(np.arange(total, 0, -total / points))[:points][::-1] - 1
        return grid[::-1][: self.steps].astype(np.int64)
