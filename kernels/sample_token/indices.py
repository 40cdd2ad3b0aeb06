"""Choice of the next token among the k most probable: k values and their ids, nothing of size V.

The filters and the noise are those of the reference, at the k places alone.
"""

import jax
import jax.numpy as jnp

from kernels.dispatch import EVERYWHERE, register
from kernels.sample_token.reference import vocabulary_product
from kernels.threefry import gumbel

__all__ = ["sample_logits", "sample_token"]


def _refusal(logits, keys, *, temperature, top_k, **filters):
    vocabulary = logits.shape[-1]
    if temperature == 0:
        return "needs a temperature above 0"
    if not 0 < top_k < vocabulary:
        return f"needs a top_k between 0 and the {vocabulary} tokens, not {top_k}"
    return None


def _refusal_with_head(hidden, head, keys, **choice):
    return _refusal(head, keys, **choice)  # both are [.., V]


@register("sample_logits", "indices", default_on=EVERYWHERE, refusal=_refusal)
def sample_logits(logits, keys, *, temperature, top_k, top_p, min_p):
    """See `kernels.sample_logits`."""
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


@register("sample_token", "indices", default_on=EVERYWHERE, refusal=_refusal_with_head)
def sample_token(hidden, head, keys, **choice):
    """See `kernels.sample_token`."""
    return sample_logits(vocabulary_product(hidden, head), keys, **choice)
