"""Constants of the forward process, in float64 on the host; importing this loads no jax."""

import functools

import numpy as np
from jaxtyping import Float

from gen_jax.config import frozen
from gen_jax.models.diffusion.config import DiffusionConfig, Prediction

__all__ = ["Schedule", "posterior_mean_weights", "step_variances", "x0_weights"]


@frozen
class Schedule:
    """Constants of the forward process at each of its T time steps, computed once."""

    process: DiffusionConfig

    @functools.cached_property
    def beta(self) -> Float[np.ndarray, " T"]:
        """Variance added in step t."""
        process = self.process
        if process.schedule == "linear":
            return np.linspace(process.beta_start, process.beta_end, process.timesteps)
        if process.schedule == "scaled_linear":
            ends = np.sqrt([process.beta_start, process.beta_end])
            return np.linspace(*ends, process.timesteps) ** 2
        # 2102.09672 eq. 17, with s = 0.008 and beta at most 0.999.
        t = np.arange(process.timesteps + 1) / process.timesteps
        f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)

    @functools.cached_property
    def alpha_bar(self) -> Float[np.ndarray, " T"]:
        """Product of 1 - beta up to and including t: q(x_t | x_0) has mean sqrt(alpha_bar) x_0."""
        return np.cumprod(1 - self.beta)

    @property
    def alpha_bar_before(self) -> Float[np.ndarray, " T"]:
        """alpha_bar one step earlier; 1 before the first step."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def posterior_variance(self) -> Float[np.ndarray, " T"]:
        """beta-tilde, the variance of q(x_{t-1} | x_t, x_0) (2006.11239 eq. 7); 0 at t = 0."""
        return self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> Float[np.ndarray, " T"]:
        """log beta-tilde with the entry at t = 0 taken from t = 1, as in the paper's code."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.beta, variance[1:]))


def x0_weights(
    prediction: Prediction, alpha_bar: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """(a, b) with x0 = a x_t + b output, for each alpha_bar.

    Raises:
      ValueError: the prediction is none of those that there are.
    """
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        return alpha, -sigma
    raise ValueError(f"prediction must be 'epsilon', 'x0' or 'v', got {prediction!r}")


def posterior_mean_weights(
    alpha_bar: Float[np.ndarray, " S"], alpha_bar_next: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """(a, b) with E q(x_s | x_t, x_0) = a x_0 + b x_t, for s before t (2006.11239 eq. 7)."""
    alpha = alpha_bar / alpha_bar_next
    x0_weight = np.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar)
    x_weight = np.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
    return x0_weight, x_weight


def step_variances(
    alpha_bar: Float[np.ndarray, " S"], alpha_bar_next: Float[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """(beta-tilde, beta) of a step between any two time steps (2102.09672 eq. 19)."""
    beta = 1 - alpha_bar / alpha_bar_next
    return beta * (1 - alpha_bar_next) / (1 - alpha_bar), beta
