"""Terms of the variational lower bound, in bits per dimension."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gen_jax.models.diffusion.process import at, predicted_x0
from gen_jax.models.diffusion.schedule import Schedule, posterior_mean_weights

__all__ = [
    "discretised_log_likelihood",
    "normal_kl",
    "reverse_log_variance",
    "vlb_prior",
    "vlb_term",
]


def vlb_term(
    schedule: Schedule,
    x0: Float[Array | np.ndarray, "B height width C"],
    x: Float[Array, "B height width C"],
    t: Int[Array, " B"],
    output: Float[Array | np.ndarray, "B height width C"],
    variance_output: Float[Array, "B height width C"] | None = None,
    clip: bool = False,
) -> Float[Array, " B"]:
    """L_t of the bound in bits per dimension (2006.11239 eq. 5).

    For t > 0 it is the KL from q(x_{t-1} | x_t, x_0) to the reverse step; at t = 0 it is minus the
    log-likelihood of the discretised decoder (eq. 13).

    Args:
      schedule: of the process.
      x0: clean images in [-1, 1], on the grid of 256 levels.
      x: a draw of x_t.
      t: the time steps.
      output: the network's prediction at x.
      variance_output: the second half of the network's output when the variance is learned.
      clip: clip the predicted clean image to [-1, 1], as sampling does.
    """
    x0_predicted = predicted_x0(schedule, x, t, output)
    if clip:
        x0_predicted = jnp.clip(x0_predicted, -1, 1)
    x0_weight, x_weight = posterior_mean_weights(schedule.alpha_bar, schedule.alpha_bar_before)
    true_mean = at(x0_weight, t) * x0 + at(x_weight, t) * x
    mean = at(x0_weight, t) * x0_predicted + at(x_weight, t) * x
    true_log_variance = at(schedule.posterior_log_variance, t)
    log_variance = reverse_log_variance(schedule, t, variance_output)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    nats = jnp.where((t == 0)[:, None, None, None], decoder, kl)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


def vlb_prior(
    schedule: Schedule, x0: Float[Array | np.ndarray, "B height width C"]
) -> Float[Array, " B"]:
    """L_T, KL(q(x_T | x_0) || N(0, 1)) in bits per dimension."""
    alpha_bar = schedule.alpha_bar[-1]
    nats = normal_kl(np.sqrt(alpha_bar) * x0, np.log1p(-alpha_bar), 0.0, 0.0)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


def reverse_log_variance(
    schedule: Schedule,
    t: Int[Array, " B"],
    variance_output: Float[Array, "B height width C"] | None = None,
) -> Float[Array, "B _ _ _"]:
    """Log of the reverse variance, which broadcasts to [B, height, width, C].

    Raises:
      ValueError: the variance is learned and `variance_output` is missing.
    """
    small = schedule.posterior_log_variance
    large = np.log(schedule.beta)
    variance = schedule.process.variance
    if variance == "fixed_small":
        return at(small, t)
    if variance == "fixed_large":
        # The paper's code takes beta-tilde at t = 0, which gives a better decoder.
        return at(np.append(small[:1], large[1:]), t)
    if variance_output is None:
        raise ValueError("a learned variance needs the second half of the network's output")
    share = (variance_output + 1) / 2  # 2102.09672 eq. 15
    return share * at(large, t) + (1 - share) * at(small, t)


def normal_kl(
    mean_1: Float[Array | np.ndarray, "..."] | float,
    log_variance_1: Float[Array, "..."] | float,
    mean_2: Float[Array, "..."] | float,
    log_variance_2: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """KL(N_1 || N_2) of scalar normals, elementwise, in nats."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        + jnp.exp(log_variance_1 - log_variance_2)
        + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
        - 1
    )


def discretised_log_likelihood(
    x: Float[Array | np.ndarray, "..."],
    mean: Float[Array, "..."] | float,
    log_scale: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """Log mass of a normal on the bin of width 2/255 around x (2006.11239 eq. 13), elementwise.

    The first and last of the 256 bins extend to infinity. Far from the mean the mass is taken as
    the density times the width, which stays finite where the difference of two tails is zero.
    """
    inverse = jnp.exp(-log_scale)
    upper = inverse * (x - mean + 1 / 255)
    lower = inverse * (x - mean - 1 / 255)
    # The difference of two upper tails keeps its digits; mirror so that both are upper ones.
    mirrored = (upper + lower) < 0
    upper, lower = jnp.where(mirrored, -lower, upper), jnp.where(mirrored, -upper, lower)
    mass = jax.scipy.stats.norm.sf(lower) - jax.scipy.stats.norm.sf(upper)
    density = -0.5 * jnp.square(inverse * (x - mean)) - 0.5 * np.log(2 * np.pi)
    middle = jnp.where(
        mass > 1e-10, jnp.log(jnp.maximum(mass, 1e-10)), density - log_scale + np.log(2 / 255)
    )
    first = jax.scipy.stats.norm.logcdf(inverse * (x - mean + 1 / 255))
    last = jax.scipy.stats.norm.logsf(inverse * (x - mean - 1 / 255))
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, middle))
