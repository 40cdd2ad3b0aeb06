"""The forward process, what the network should predict, and the clean image that follows from it.

Random numbers come from one key per image, so that neither the batch nor the devices change them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from gen_jax.models.diffusion.schedule import Schedule, x0_weights

__all__ = [
    "at",
    "diffuse",
    "normal_each",
    "predicted_x0",
    "split_each",
    "target",
    "to_signal",
]


def at(table: Float[np.ndarray, " T"], t: Int[Array | np.ndarray, " B"]) -> Float[Array, "B 1 1 1"]:
    """Entries of a table at each t, as float32."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def diffuse(
    schedule: Schedule,
    x0: Float[Array | np.ndarray, "B height width C"],
    t: Int[Array | np.ndarray, " B"],
    noise: Float[Array, "B height width C"],
) -> Float[Array, "B height width C"]:
    """A draw of q(x_t | x_0) from unit noise (2006.11239 eq. 4)."""
    return at(np.sqrt(schedule.alpha_bar), t) * x0 + at(np.sqrt(1 - schedule.alpha_bar), t) * noise


def target(
    schedule: Schedule,
    x0: Float[Array | np.ndarray, "B height width C"],
    t: Int[Array | np.ndarray, " B"],
    noise: Float[Array, "B height width C"],
) -> Float[Array | np.ndarray, "B height width C"]:
    """What the network should predict at x_t (v: 2202.00512, appendix D)."""
    prediction = schedule.process.prediction
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    alpha, sigma = at(np.sqrt(schedule.alpha_bar), t), at(np.sqrt(1 - schedule.alpha_bar), t)
    return alpha * noise - sigma * x0


def predicted_x0(
    schedule: Schedule,
    x: Float[Array, "B height width C"],
    t: Int[Array | np.ndarray, " B"],
    output: Float[Array, "B height width C"],
) -> Float[Array, "B height width C"]:
    """The clean image that the network's output implies at x_t, unclipped."""
    x_weight, output_weight = x0_weights(schedule.process.prediction, schedule.alpha_bar)
    return at(x_weight, t) * x + at(output_weight, t) * output


def to_signal(
    images: Shaped[Array | np.ndarray, "B height width C"],
) -> Float[Array | np.ndarray, "B height width C"]:
    """Images of integers from 0 to 255 as float32 in [-1, 1].

    Raises:
      ValueError: the images are no integers, but say on another scale already.
    """
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(f"images must be integers from 0 to 255 (uint8), not {images.dtype}")
    return images.astype(jnp.float32) / 127.5 - 1


def split_each(keys: Key[Array, " B"], count: int) -> tuple[Key[Array, " B"], ...]:
    """`count` arrays of [B] keys."""
    return jax.vmap(lambda key: tuple(jax.random.split(key, count)))(keys)


def normal_each(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """One standard normal float32 array of this shape per key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
