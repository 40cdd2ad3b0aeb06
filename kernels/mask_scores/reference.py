"""One round of decoding masked positions: specification.

Every masked position gets a token and a confidence, and the most confident positions keep theirs
(Mask-Predict, Ghazvininejad et al. 2019, 1904.09324). MaskGIT (Chang et al. 2022, 2202.04200)
draws the token instead of taking the most probable one, and adds Gumbel noise to its
log-probability: with noise 1 the kept positions are a draw without replacement, with weights
that are the probabilities of their tokens (Gumbel-top-k).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from kernels.dispatch import register
from kernels.sample_token.reference import first_of_the_largest
from kernels.threefry import gumbel
from kernels.typing import AnyArray

__all__ = ["keep_most_confident", "mask_scores", "merged"]


@register("mask_scores", "reference")
def mask_scores(logits, tokens, masked, keys, *, temperature, noise):
    """Gumbel-max and one gather per position; `noise` None for none.

    The noise of token v at position l depends only on (key, l V + v), that of the confidence only
    on (key, 2^32 - 1 - l): on neither the length nor the batch.
    """
    logits = logits.astype(jnp.float32)
    length, vocabulary = logits.shape[1:]
    scores = logits
    if temperature > 0:
        ids = jnp.arange(length * vocabulary, dtype=jnp.uint32)
        scores = logits / temperature + gumbel(keys, ids).reshape(logits.shape)
    drawn = first_of_the_largest(scores)
    largest = logits.max(-1)
    chosen = jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
    log_mass = jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    return merged(drawn, (chosen - largest) - log_mass, tokens, masked, keys, noise)


def merged(drawn, log_prob, tokens, masked, keys, noise):
    """What `kernels.mask_scores` returns, of what was drawn at all positions [B, L]."""
    confidence = log_prob
    if noise is not None:
        ids = jnp.uint32(2**32 - 1) - jnp.arange(drawn.shape[1], dtype=jnp.uint32)
        confidence = log_prob + noise * gumbel(keys, ids)
    return (
        jnp.where(masked, drawn, tokens.astype(jnp.int32)),
        jnp.where(masked, log_prob, 0),
        jnp.where(masked, confidence, jnp.inf),
    )


@register("keep_most_confident", "reference")
def keep_most_confident(
    confidence: Float32[AnyArray, "B L"], count: Int32[Array, " B"]
) -> Bool[Array, "B L"]:
    """See `kernels.keep_most_confident`; the count is from 0 to L. It sorts, and takes ranks."""
    order = jnp.argsort(-confidence, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count[:, None]
