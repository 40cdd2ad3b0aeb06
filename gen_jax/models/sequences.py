"""What losses and samplers of token sequences share: which positions count, and how much.

B batch, L positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax


def valid_mask(tokens, length=None) -> jax.Array:
    """Bool [B, L]: the first `length` int [B] positions of each row, or all."""
    if length is None:
        return jnp.ones(tokens.shape, bool)
    return jnp.arange(tokens.shape[1])[None] < length[:, None]


def cross_entropy(logits, targets, smoothing: float = 0.0) -> jax.Array:
    """[..., V] float32, int [...] -> nats [...], with label smoothing."""
    values = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        values = (1 - smoothing) * values + smoothing * uniform
    return values


def mean_of_first(values, length=None) -> jax.Array:
    """The mean of [B, L] over all, or over the first `length` int [B] of each row."""
    counts = valid_mask(values, length)
    return jnp.where(counts, values, 0).sum() / jnp.maximum(counts.sum(), 1)


def fill_after_eos(tokens, eos: int) -> jax.Array:
    """Tokens int [B, L] with all that follows the first `eos` of a row replaced by `eos`."""
    return jnp.where(jnp.cumsum(tokens == eos, axis=1) > 0, eos, tokens)
