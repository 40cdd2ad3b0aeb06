"""Samplers of diffusion models: ancestral DDPM, DDIM, DPM-Solver++ (2M).

Ho et al. 2020 (2006.11239, algorithm 2), Song et al. 2020 (2010.02502, eq. 12), Lu et al. 2022
(2211.01095, algorithm 2). Each is a table of coefficients for the one affine update in
`kernels.diffusion_step`, worked out in float64 on the host for any sub-sequence of the time steps.
"""

import dataclasses
import functools
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import kernels
from gen_jax.models.diffusion import losses as diffusion
from gen_jax.models.diffusion.config import DiffusionConfig, SolverConfig
from gen_jax.models.diffusion.losses import Network, Schedule, fold_in_each, normal_each, split_each
from gen_jax.models.diffusion.time_grid import TimeGrid


class Solver(Protocol):
    """One way to go from a time step to the next; a frozen dataclass.

    Attributes:
      noisy: whether steps add noise.
      multistep: whether steps use the clean image predicted one step before.
    """

    noisy: bool
    multistep: bool

    def coefficients(
        self, alpha_bar: np.ndarray, alpha_bar_next: np.ndarray, prediction: str
    ) -> kernels.StepCoefficients:
        """The update of every step, each entry [S] float64.

        Args:
          alpha_bar: [S], at the current time of each step.
          alpha_bar_next: [S], at the time it goes to; 1 for the last.
          prediction: what the network predicts.
        """


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """DDPM: a draw of p(x_s | x_t), whose variance is beta-tilde ("fixed_small") or beta.

    With "learned" the noise coefficient is 1 and the sampler scales the noise itself.
    """

    variance: str = "fixed_large"
    noisy = True
    multistep = False

    def coefficients(self, alpha_bar, alpha_bar_next, prediction):
        """See `Solver`."""
        x0_weight, x_weight = diffusion.posterior_mean_weights(alpha_bar, alpha_bar_next)
        small, large = _step_variances(alpha_bar, alpha_bar_next)
        deviation = np.sqrt({"fixed_small": small, "fixed_large": large}.get(self.variance, 1.0))
        noise = np.where(alpha_bar_next < 1, deviation, 0.0)  # none in the last step
        zero = np.zeros_like(alpha_bar)
        return kernels.StepCoefficients(
            *diffusion.x0_weights(prediction, alpha_bar), x0_weight, x_weight, zero, zero, noise
        )


@dataclasses.dataclass(frozen=True)
class DDIM:
    """DDIM: deterministic at eta = 0; at eta = 1 the noise of DDPM with beta-tilde.

    The direction to x_t comes from the network's output as it is; with `clipped_direction` from
    the clean image after clipping, which makes eta = 1 equal to DDPM with clipping too.
    """

    eta: float = 0.0
    clipped_direction: bool = False
    multistep = False

    @property
    def noisy(self):
        """Whether steps add noise."""
        return self.eta > 0

    def coefficients(self, alpha_bar, alpha_bar_next, prediction):
        """See `Solver`."""
        small, _ = _step_variances(alpha_bar, alpha_bar_next)
        noise = self.eta * np.sqrt(small)
        direction = np.sqrt(np.maximum(1 - alpha_bar_next - noise**2, 0))
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        x0_x, x0_output = diffusion.x0_weights(prediction, alpha_bar)
        # epsilon = (x - alpha x0) / sigma, with x0 before clipping or after it.
        if self.clipped_direction:
            next_x0 = np.sqrt(alpha_bar_next) - direction * alpha / sigma
            next_x, next_output = direction / sigma, np.zeros_like(sigma)
        else:
            next_x0 = np.sqrt(alpha_bar_next)
            next_x = direction * (1 - alpha * x0_x) / sigma
            next_output = -direction * alpha * x0_output / sigma
        zero = np.zeros_like(sigma)
        return kernels.StepCoefficients(x0_x, x0_output, next_x0, next_x, next_output, zero, noise)


@dataclasses.dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++ (2M): second order in the log signal-to-noise ratio, one evaluation a step.

    The first step, and the last when it goes to noise zero, are of first order.
    """

    noisy = False
    multistep = True

    def coefficients(self, alpha_bar, alpha_bar_next, prediction):
        """See `Solver`."""
        alpha_next, sigma_next = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
        with np.errstate(divide="ignore"):
            step = 0.5 * (
                _log_odds(alpha_bar_next) - _log_odds(alpha_bar)
            )  # h, in log(alpha/sigma)
        growth = -alpha_next * np.expm1(-step)
        before = np.append(np.inf, step[:-1])  # the first step has no history
        extrapolate = np.where(np.isfinite(step), 0.5 * np.where(np.isfinite(step), step, 0), 0)
        extrapolate = extrapolate / before  # 1 / 2r
        return kernels.StepCoefficients(
            *diffusion.x0_weights(prediction, alpha_bar),
            growth * (1 + extrapolate),
            sigma_next / np.sqrt(1 - alpha_bar),
            np.zeros_like(growth),
            -growth * extrapolate,
            np.zeros_like(growth),
        )


def _log_odds(alpha_bar):
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def _step_variances(alpha_bar, alpha_bar_next):
    beta = 1 - alpha_bar / alpha_bar_next
    return beta * (1 - alpha_bar_next) / (1 - alpha_bar), beta


@flax.struct.dataclass
class DiffusionState:
    """Between two steps.

    Attributes:
      x: [B, H, W, C] float32, the noisy image.
      x0: [B, H, W, C] float32, the clean image predicted in the last step.
      keys: [B], from which the noise of every step is drawn.
      label: [B] int32, or None.
    """

    x: jax.Array
    x0: jax.Array
    keys: jax.Array
    label: jax.Array | None


@dataclasses.dataclass(frozen=True)
class DiffusionSampler:
    """A Sampler of images from a trained network; the condition is a label [B] or None.

    Attributes:
      network: predicts at (params, x, t, label, keys).
      process: what it was trained on.
      shape: (H, W, C) of the samples.
      grid: the time steps visited.
      solver: how to go from one to the next.
      clip: bound on the predicted clean image, or None.
      guidance: scale s of classifier-free guidance (2207.12598): the prediction is
        unconditional + s (conditional - unconditional); 1 for none. Both halves are one
        evaluation of twice the batch.

    Raises:
      ValueError: more steps than the process has.
    """

    network: Network
    process: DiffusionConfig
    shape: tuple[int, int, int]
    grid: TimeGrid
    solver: Solver
    clip: float | None = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        self.timesteps  # noqa: B018, fails early when the grid does not fit

    @property
    def nfe(self) -> int:
        """Sequential evaluations of the network."""
        return self.grid.steps

    @property
    def steps(self) -> int:
        """Trips of the loop."""
        return self.grid.steps

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """The time steps visited, [steps] int64."""
        return self.grid.timesteps(self.process.timesteps, skip_last=self.solver.multistep)

    @functools.cached_property
    def coefficients(self) -> kernels.StepCoefficients:
        """The update of every step, each entry [steps] float32."""
        alpha_bar = Schedule(self.process).alpha_bar[self.timesteps]
        table = self.solver.coefficients(
            alpha_bar, np.append(alpha_bar[1:], 1.0), self.process.prediction
        )
        return kernels.StepCoefficients(*(np.asarray(entry, np.float32) for entry in table))

    def prepare(self, params):
        """The network's own preparation, where it has one; see `Sampler`."""
        prepare = getattr(self.network, "prepare", None)
        return params if prepare is None else prepare(params)

    def init(self, params, keys, cond):
        """Noise x_T from the first half of each key; see `Sampler`."""
        del params
        noise_keys, keys = split_each(keys, 2)
        x = normal_each(noise_keys, self.shape)
        return DiffusionState(x=x, x0=jnp.zeros_like(x), keys=keys, label=cond)

    def step(self, params, state, i):
        """One evaluation of the network and one update; see `Sampler`."""
        coefficients = jax.tree.map(lambda column: jnp.asarray(column)[i], self.coefficients)
        t = jnp.full(state.x.shape[:1], jnp.asarray(self.timesteps, jnp.int32)[i])
        output = self._predict(params, state.x, t, state.label)
        if self.process.variance == "learned":
            output, variance_output = jnp.split(output, 2, axis=-1)
            if isinstance(self.solver, Ancestral) and self.solver.variance == "learned":
                deviation = self._learned_deviation(i, variance_output)
                coefficients = coefficients._replace(next_noise=coefficients.next_noise * deviation)
        x, x0 = kernels.diffusion_step(
            state.x,
            output,
            coefficients,
            keys=fold_in_each(state.keys, i) if self.solver.noisy else None,
            history=state.x0 if self.solver.multistep else None,
            clip=self.clip,
        )
        return state.replace(x=x, x0=x0)

    def finish(self, params, state):
        """The images, [B, H, W, C] float32, about in [-1, 1]; see `Sampler`."""
        del params
        return state.x

    def _predict(self, params, x, t, label):
        if self.guidance == 1.0 or label is None:
            return self.network(params, x, t, label)
        pair = jnp.concatenate([label, jnp.full_like(label, -1)])
        both = self.network(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), pair)
        conditional, unconditional = jnp.split(both, 2)
        guided = unconditional + self.guidance * (conditional - unconditional)
        if self.process.variance == "learned":  # guide the mean, not the variance
            channels = self.shape[-1]
            guided = jnp.concatenate([guided[..., :channels], conditional[..., channels:]], -1)
        return guided

    def _learned_deviation(self, i, variance_output):
        # 2102.09672 eq. 15, for the betas of the sub-sequence.
        alpha_bar = Schedule(self.process).alpha_bar[self.timesteps]
        small, large = _step_variances(alpha_bar, np.append(alpha_bar[1:], 1.0))
        small[-1] = large[-1]  # the last step adds no noise; keep the logarithm finite
        log_small, log_large = (jnp.asarray(np.log(v), jnp.float32)[i] for v in (small, large))
        share = (variance_output + 1) / 2
        return jnp.exp(0.5 * (share * log_large + (1 - share) * log_small))


def make_sampler(
    network: Network, process: DiffusionConfig, shape: tuple[int, int, int], config: SolverConfig
) -> DiffusionSampler:
    """The sampler that a configuration describes.

    Raises:
      ValueError: more steps than the process has.
    """
    solver = {
        "ddpm": Ancestral(process.variance),
        "ddim": DDIM(config.eta),
        "dpm_solver_pp": DPMSolverPP(),
    }[config.solver]
    return DiffusionSampler(
        network=network,
        process=process,
        shape=shape,
        grid=TimeGrid(config.steps, config.spacing),
        solver=solver,
        clip=1.0 if config.clip else None,
        guidance=config.guidance,
    )
