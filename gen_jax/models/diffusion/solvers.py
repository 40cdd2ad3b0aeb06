"""How a sampler goes from one time step to the next; importing this loads no jax.

DDPM, DDIM and DPM-Solver++ (2M) are the same affine update, `kernels.diffusion_step`, with other
coefficients. A solver computes the table of them in float64 on the host, for any sequence of noise
levels; the sampling loop reads a row of it. A new solver of this form is one class, here or
anywhere: it is an option of the command line from its definition on (see `config.Choice`).
"""

from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gen_jax.config import Choice, frozen
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.schedule import (
    Schedule,
    posterior_mean_weights,
    step_variances,
    x0_weights,
)
from gen_jax.models.diffusion.time_grid import Spacing, TimeGrid

__all__ = ["DDIM", "Ancestral", "DPMSolverPP", "Solver", "StepTable"]


class StepTable(NamedTuple):
    """The fields of `kernels.StepCoefficients` for every step, each [S] float64."""

    x0_x: Float[np.ndarray, " S"]
    x0_output: Float[np.ndarray, " S"]
    next_x0: Float[np.ndarray, " S"]
    next_x: Float[np.ndarray, " S"]
    next_output: Float[np.ndarray, " S"]
    next_history: Float[np.ndarray, " S"]
    next_noise: Float[np.ndarray, " S"]


@frozen
class Solver(Choice):
    """What every solver has: its options, the time steps that it visits, and its table.

    Class attributes, which say what the sampling loop must give to a step:
      name: how the command line and stored configurations call the solver.
      noisy: whether steps add noise.
      multistep: whether steps use the clean image that was predicted one step before.
      reverse_variance: whether the noise has the variance of the reverse process. Where that is
        learned, `next_noise` is 1 and the sampler scales the noise itself.

    Raises:
      ValueError: at construction, where a value is out of its range.
    """

    name: ClassVar[str]
    noisy: ClassVar[bool] = False
    multistep: ClassVar[bool] = False
    reverse_variance: ClassVar[bool] = False

    steps: int = 1000
    """Steps, each one evaluation of the network."""
    spacing: Spacing = "leading"
    """Which of the T time steps are visited."""
    clip: bool = True
    """Clip the predicted clean image to [-1, 1] in every step."""
    guidance: float = 1.0
    """Scale s of classifier-free guidance (2207.12598): the prediction is unconditional
    + s (conditional - unconditional); 1 for none."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def timesteps(self, total: int) -> Int[np.ndarray, " S"]:
        """The time steps that are visited out of `total`, [steps] int64, decreasing.

        Raises:
          ValueError: they do not fit; see `TimeGrid.timesteps`.
        """
        return TimeGrid(self.steps, self.spacing).timesteps(total, skip_last=self.multistep)

    def check(self, process: DiffusionConfig) -> None:
        """Refuses a process that this solver cannot sample.

        Raises:
          ValueError: the steps do not fit in those of the process, or there is guidance and the
            process hides no labels in training.
        """
        self.timesteps(process.timesteps)
        if self.guidance != 1.0 and not process.label_dropout:
            raise ValueError(
                f"guidance {self.guidance} needs a model trained with label_dropout, which is 0"
            )

    def table(self, process: DiffusionConfig) -> StepTable:
        """The update of every step for a process, each entry [steps] float64."""
        return self.coefficients(*self.alpha_bars(process), process)

    def alpha_bars(
        self, process: DiffusionConfig
    ) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        """alpha_bar at the time of each step, and at the time that it goes to; 1 for the last."""
        alpha_bar = Schedule(process).alpha_bar[self.timesteps(process.timesteps)]
        return alpha_bar, np.append(alpha_bar[1:], 1.0)

    def coefficients(
        self,
        alpha_bar: Float[np.ndarray, " S"],
        alpha_bar_next: Float[np.ndarray, " S"],
        process: DiffusionConfig,
    ) -> StepTable:
        """The update between given noise levels.

        Args:
          alpha_bar: at the current time of each step.
          alpha_bar_next: at the time that it goes to; 1 for the clean image.
          process: says what the network predicts, and the variance of the reverse process.

        Returns:
          The table, each entry [S] float64.
        """
        raise NotImplementedError


@frozen
class Ancestral(Solver):
    """DDPM (2006.11239, algorithm 2): a draw of p(x_s | x_t), with the variance of the process."""

    name: ClassVar[str] = "ddpm"
    noisy: ClassVar[bool] = True
    reverse_variance: ClassVar[bool] = True

    def coefficients(
        self,
        alpha_bar: Float[np.ndarray, " S"],
        alpha_bar_next: Float[np.ndarray, " S"],
        process: DiffusionConfig,
    ) -> StepTable:
        """See `Solver.coefficients`."""
        x0_weight, x_weight = posterior_mean_weights(alpha_bar, alpha_bar_next)
        small, large = step_variances(alpha_bar, alpha_bar_next)
        variance = {"fixed_small": small, "fixed_large": large, "learned": np.ones_like(large)}
        deviation = np.sqrt(variance[process.variance])
        noise = np.where(alpha_bar_next < 1, deviation, 0.0)  # none in the last step
        zero = np.zeros_like(alpha_bar)
        x0_x, x0_output = x0_weights(process.prediction, alpha_bar)
        return StepTable(x0_x, x0_output, x0_weight, x_weight, zero, zero, noise)


@frozen
class DDIM(Solver):
    """DDIM (2010.02502, eq. 12): deterministic at eta = 0, the noise of DDPM at eta = 1."""

    name: ClassVar[str] = "ddim"

    eta: float = 0.0
    """Noise, as a multiple of that of DDPM with beta-tilde; 0 for none."""
    clipped_direction: bool = False
    """Take the direction to x_t from the clean image after clipping, which makes eta = 1 equal to
    DDPM with clipping too; otherwise it comes from the network's output as it is."""
    offset: int = 0
    """Added to the time steps of spacing "leading"; 1 in the code of latent diffusion."""
    end: Literal["clean", "first"] = "clean"
    """Where the last step goes: to the clean image, or to the noise of t = 0, as in the code of
    latent diffusion."""

    def __post_init__(self):
        super().__post_init__()
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")
        TimeGrid(self.steps, self.spacing, self.offset)

    @property
    def noisy(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0

    def timesteps(self, total: int) -> Int[np.ndarray, " S"]:
        """See `Solver.timesteps`."""
        return TimeGrid(self.steps, self.spacing, self.offset).timesteps(total)

    def alpha_bars(
        self, process: DiffusionConfig
    ) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        """See `Solver.alpha_bars`; the last step goes to `end`."""
        alpha_bar, following = super().alpha_bars(process)
        if self.end == "first":
            following[-1] = Schedule(process).alpha_bar[0]
        return alpha_bar, following

    def coefficients(
        self,
        alpha_bar: Float[np.ndarray, " S"],
        alpha_bar_next: Float[np.ndarray, " S"],
        process: DiffusionConfig,
    ) -> StepTable:
        """See `Solver.coefficients`."""
        small, _ = step_variances(alpha_bar, alpha_bar_next)
        noise = self.eta * np.sqrt(small)
        direction = np.sqrt(np.maximum(1 - alpha_bar_next - noise**2, 0))
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        x0_x, x0_output = x0_weights(process.prediction, alpha_bar)
        # epsilon = (x - alpha x0) / sigma, with x0 before clipping or after it.
        if self.clipped_direction:
            next_x0 = np.sqrt(alpha_bar_next) - direction * alpha / sigma
            next_x, next_output = direction / sigma, np.zeros_like(sigma)
        else:
            next_x0 = np.sqrt(alpha_bar_next)
            next_x = direction * (1 - alpha * x0_x) / sigma
            next_output = -direction * alpha * x0_output / sigma
        zero = np.zeros_like(sigma)
        return StepTable(x0_x, x0_output, next_x0, next_x, next_output, zero, noise)


@frozen
class DPMSolverPP(Solver):
    """DPM-Solver++ (2M) (2211.01095, algorithm 2): second order in log(alpha / sigma).

    The first step, and the last when it goes to noise zero, are of first order.
    """

    name: ClassVar[str] = "dpm_solver_pp"
    multistep: ClassVar[bool] = True

    steps: int = 20
    """Steps, each one evaluation of the network; at most T - 1 unless spacing is trailing."""

    def coefficients(
        self,
        alpha_bar: Float[np.ndarray, " S"],
        alpha_bar_next: Float[np.ndarray, " S"],
        process: DiffusionConfig,
    ) -> StepTable:
        """See `Solver.coefficients`."""
        alpha_next, sigma_next = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
        with np.errstate(divide="ignore"):  # the step to the clean image is infinite
            step = 0.5 * (_log_odds(alpha_bar_next) - _log_odds(alpha_bar))  # h of the paper
        growth = -alpha_next * np.expm1(-step)
        before = np.append(np.inf, step[:-1])  # the first step has no history
        extrapolate = np.where(np.isfinite(step), 0.5 * np.where(np.isfinite(step), step, 0), 0)
        extrapolate = extrapolate / before  # 1 / 2r
        x0_x, x0_output = x0_weights(process.prediction, alpha_bar)
        zero = np.zeros_like(growth)
        return StepTable(
            x0_x=x0_x,
            x0_output=x0_output,
            next_x0=growth * (1 + extrapolate),
            next_x=sigma_next / np.sqrt(1 - alpha_bar),
            next_output=zero,
            next_history=-growth * extrapolate,
            next_noise=zero,
        )


def _log_odds(alpha_bar):
    return np.log(alpha_bar) - np.log1p(-alpha_bar)
