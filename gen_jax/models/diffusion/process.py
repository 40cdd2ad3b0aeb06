"""The forward process, what the network should predict, and the clean image that follows from it.

Random numbers come from one key per image, so that neither the batch nor the devices change them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from gen_jax.models.diffusion.schedule import Schedule, x0_weights

__all__ = [
    "at",
    "diffuse",
    "noise_between",
    "predicted_x0",
    "stable_x0",
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


def noise_between(
    schedule: Schedule,
    x0: Float[Array | np.ndarray, "B height width C"],
    x: Float[Array, "B height width C"],
    t: Int[Array | np.ndarray, " B"],
) -> Float[Array, "B height width C"]:
    """The unit noise by which `diffuse` goes from x_0 to x_t."""
    alpha, sigma = at(np.sqrt(schedule.alpha_bar), t), at(np.sqrt(1 - schedule.alpha_bar), t)
    return (x - alpha * x0) / sigma


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


def stable_x0(
    schedule: Schedule,
    x0: Float[Array | np.ndarray, "B height width C"],
    x: Float[Array, "B height width C"],
    t: Int[Array | np.ndarray, " B"],
    reference: Float[Array | np.ndarray, "R height width C"],
    allowed: Bool[Array, "B R"] | None = None,
) -> Float[Array, "B height width C"]:
    """The mean of clean images given x_t, over the image itself and others (2302.00670, eq. 6).

    An image x_i has the weight q(x_t | x_i), normalised over all; a copy of the image itself among
    the others has none. The network that predicts best from such targets is the same as from the
    image alone, and the targets differ less.

    Args:
      schedule: of the process.
      x0: the images that `x` was diffused from.
      x: x_t.
      t: their time steps.
      reference: the other images.
      allowed: which of them count for which image; None for all.
    """
    flat, own, others = (values.reshape(len(values), -1) for values in (x, x0, reference))
    alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None]
    alpha = jnp.sqrt(alpha_bar)

    def log_weight(product, square):  # [B, n] each, up to what all images share
        return (alpha * product - 0.5 * alpha_bar * square) / (1 - alpha_bar)

    precision = jax.lax.Precision.HIGHEST
    products = jnp.einsum("bd,rd->br", flat, others, precision=precision)
    weights = log_weight(products, jnp.square(others).sum(axis=1)[None])
    is_copy = _fingerprint(own)[:, None] == _fingerprint(others)[None]
    counts = ~is_copy if allowed is None else allowed & ~is_copy
    weights = jnp.where(counts, weights, -jnp.inf)
    ours = log_weight((flat * own).sum(1, keepdims=True), jnp.square(own).sum(1, keepdims=True))
    weights = jax.nn.softmax(jnp.concatenate([ours, weights], axis=1), axis=1)
    mean = jnp.einsum("br,rd->bd", weights[:, 1:], others, precision=precision)
    return (weights[:, :1] * own + mean).reshape(x.shape)


def _fingerprint(flat):
    """A number [n] of each row of float32 [n, D], by its bits; different ones for what differs."""
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    odd = np.random.default_rng(0).integers(0, 2**31, flat.shape[1], np.uint32) * 2 + 1
    return (bits * odd[None]).sum(axis=1, dtype=jnp.uint32)


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
