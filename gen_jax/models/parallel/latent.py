"""The latent that all positions of a parallel decoder share, as functions of its parameters.

B batch, L length, D width, Z parameters of a distribution: 2 x size for a Gaussian (means, then
log-variances), K for one of K codes (logits).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gen_jax.models.parallel.config import LatentConfig
from kernels.threefry import normal_each

__all__ = ["gaussian_kl", "init_latent", "sample_gaussian"]


def init_latent(
    config: LatentConfig,
    keys: Key[Array, " 3"],
    width: int,
    max_length: int,
) -> dict:
    """Fresh float32 parameters of prior and posterior, less the network of the posterior.

    Means and codes are initialised randomly, so that the decoder can learn what they mean;
    variances are initialised to 1, and the prior to the same distribution for all conditions.
    """
    shape = (width, config.size)
    kernel = jax.random.normal(keys[0], shape) * 2 / width**0.5
    if config.kind == "gaussian":
        kernel = jnp.concatenate([kernel, jnp.zeros(shape)], axis=1)
    table = jax.random.normal(keys[1], (config.size, max_length, width))
    return {
        "pool": jax.random.normal(keys[2], (max_length, width)),
        "posterior_kernel": kernel,
        "prior_kernel": jnp.zeros_like(kernel),
        "prior_bias": jnp.zeros(kernel.shape[1]),
        "table": 0.2 * table,
    }


def sample_gaussian(
    distribution: Float[Array, "B Z"], keys: Key[Array, " B"], temperature: float = 1.0
) -> Float[Array, "B size"]:
    """A draw for each row; `temperature` scales the standard deviation."""
    mean, log_var = jnp.split(distribution, 2, axis=-1)
    noise = normal_each(keys, mean.shape[1:])
    return mean + temperature * jnp.exp(0.5 * log_var) * noise


def gaussian_kl(posterior: Float[Array, "B Z"], prior: Float[Array, "B Z"]) -> Float[Array, " B"]:
    """The KL divergence of the posterior from the prior, in nats."""
    mean, log_var = jnp.split(posterior, 2, axis=-1)
    prior_mean, prior_log_var = jnp.split(prior, 2, axis=-1)
    ratio = (jnp.exp(log_var) + (mean - prior_mean) ** 2) / jnp.exp(prior_log_var)
    return 0.5 * (ratio - 1 + prior_log_var - log_var).sum(-1)
