"""Which of the time steps of a diffusion process a sampler visits; needs NumPy alone."""

import dataclasses

import numpy as np

from gen_jax.models.diffusion.config import Spacing


@dataclasses.dataclass(frozen=True)
class TimeGrid:
    """Which of the T time steps a sampler visits, from the noisiest down.

    The three spacings have the meaning of Lin et al. 2023 (2305.08891, table 2): "leading" counts
    up from 0 with a whole stride, "trailing" down from T - 1 with a real one, "linspace" takes
    both ends.
    """

    steps: int
    spacing: Spacing = "leading"

    def timesteps(self, total: int, *, skip_last: bool = False) -> np.ndarray:
        """The steps visited, [steps] int64, decreasing.

        Args:
          total: T.
          skip_last: for "leading" and "linspace" spread one point more and leave the last, t = 0,
            out, which is what multistep solvers do (they jump from the point before to x_0).

        Raises:
          ValueError: more steps than there are, or one step that would start at the clean end.
        """
        points = self.steps + (skip_last and self.spacing != "trailing")
        if points > total:
            raise ValueError(f"{self.steps} sampling steps do not fit in {total} time steps")
        if points == 1 < total and self.spacing != "trailing":
            raise ValueError(f'one step of "{self.spacing}" starts at t = 0; use "trailing"')
        if self.spacing == "leading":
            grid = np.arange(points) * (total // points)
        elif self.spacing == "linspace":
            grid = np.linspace(0, total - 1, points).round()
        else:
            grid = np.round(np.arange(total, 0, -total / points))[:points][::-1] - 1
        return grid[::-1][: self.steps].astype(np.int64)
