"""Choice of the next token: vocabulary product, filters, and a draw with a key per sample."""

import jax
import jax.numpy as jnp

from kernels.dispatch import select
from kernels.sample_token import reference
from kernels.sample_token.reference import filter_logits
from kernels.sample_token.threefry import gumbel

__all__ = ["filter_logits", "sample_logits", "sample_token"]


def sample_token(
    hidden: jax.Array, head: jax.Array, keys: jax.Array, *, implementation=None, **choice
) -> jax.Array:
    """A token for each row of hidden values: `sample_logits` of their product with the head.

    Args:
      hidden: [B, D] float32.
      head: [D, V], stored so that the product with a few rows reads memory in order.
      keys: [B] keys, one per sample; not read when the temperature is 0.
      implementation: as in `sample_logits`.
      **choice: `temperature`, `top_k`, `top_p`, `min_p` of `sample_logits`.

    Returns:
      int32 [B].
    """
    logits = jnp.matmul(hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    return sample_logits(logits, keys, implementation=implementation, **choice)


def sample_logits(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """A token for each row of logits, drawn from the filtered distribution (Gumbel-max).

    The filters apply in this order: temperature, top_k, top_p (of what top_k kept), min_p. Of
    equal logits at the edge top_k keeps the lower ids; the others keep all.

    Args:
      logits: [B, V]; computed with in float32. -inf excludes a token.
      keys: [B] threefry keys. Without filters row b is `jax.random.categorical(keys[b], ...)`.
      temperature: divides the logits, at least 1e-6; 0 takes the most probable token (the first
        of equals).
      top_k: keep the k most probable tokens; 0 for all.
      top_p: keep the smallest set of most probable tokens with at least this mass, in (0, 1].
      min_p: keep tokens at least this share as probable as the most probable one, in [0, 1].
      implementation: "reference" filters the whole vocabulary. "indices" (the default where
        top_k is given) goes on with k values and their ids: the same token, but for rounding.

    Returns:
      int32 [B].

    Raises:
      NotImplementedError: `implementation` is not available for these arguments.
      ValueError: an argument is out of range.
    """
    warm = temperature == 0 or 1e-6 <= temperature < float("inf")
    if not (warm and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"out of range: temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}"
        )
    available = {"reference": reference.sample_logits}
    if temperature > 0 and 0 < top_k < logits.shape[-1]:
        available["indices"] = _by_indices
        implementation = implementation or "indices"
    chosen = select("sample_logits", implementation, available)
    return chosen(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def _by_indices(logits, keys, *, temperature, top_k, top_p, min_p):
    values, ids = jax.lax.top_k(logits.astype(jnp.float32), top_k)  # largest first
    values = values / temperature
    if top_p < 1:
        weights = jnp.exp(values - values[:, :1])
        mass = jnp.cumsum(weights, axis=-1)
        inside = mass - weights < top_p * mass[:, -1:]
        edge = jnp.where(inside, values, jnp.inf).min(-1, keepdims=True)
        values = jnp.where(values >= edge, values, -jnp.inf)
    if min_p > 0:
        values = jnp.where(values >= values[:, :1] + jnp.log(min_p), values, -jnp.inf)
    best = jnp.argmax(values + gumbel(keys, ids), axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, best, axis=-1)[:, 0].astype(jnp.int32)
