"""What losses and samplers of token sequences share: which positions count, and how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from kernels.threefry import uniform_each

__all__ = ["cross_entropy", "fill_after_eos", "mean_of_first", "uniform_by_position", "valid_mask"]


def valid_mask(
    values: Shaped[Array | np.ndarray, "B L"], length: Int[Array | np.ndarray, " B"] | None = None
) -> Bool[Array, "B L"]:
    """Whether each position is among the first `length` of its row; all are where it is None."""
    if length is None:
        return jnp.ones(values.shape, bool)
    return jnp.arange(values.shape[1])[None] < jnp.asarray(length)[:, None]


def cross_entropy(
    logits: Float[Array | np.ndarray, "*positions V"],
    targets: Int[Array | np.ndarray, "*positions"],
    smoothing: float = 0.0,
) -> Float[Array, "*positions"]:
    """The negative log-probability of each target, in nats.

    Args:
      logits: float32.
      targets: in 0 to V - 1.
      smoothing: the share of the target's probability that is spread over all V tokens (label
        smoothing: Szegedy et al. 2016), in [0, 1).
    """
    values = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        values = (1 - smoothing) * values + smoothing * uniform
    return values


def mean_of_first(
    values: Float[Array | np.ndarray, "B L"], length: Int[Array | np.ndarray, " B"] | None = None
) -> Float[Array, ""]:
    """The mean over the first `length` values of each row, or over all; 0 where there are none."""
    counts = valid_mask(values, length)
    return jnp.where(counts, values, 0).sum() / jnp.maximum(counts.sum(), 1)


def fill_after_eos(tokens: Int[Array | np.ndarray, "B L"], eos: int) -> Int[Array, "B L"]:
    """The tokens, with all that follows the first `eos` of a row replaced by `eos`."""
    return jnp.where(jnp.cumsum(tokens == eos, axis=1) > 0, eos, tokens)


def uniform_by_position(keys: Key[Array, " B"], length: int) -> Float[Array, "B {length}"]:
    """Uniform draws; those of the first positions do not depend on how many there are."""
    return uniform_each(keys, (length,))
