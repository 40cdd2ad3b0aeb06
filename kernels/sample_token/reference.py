"""Choice of the next token from logits: specification.

The kept set is always {v: logit_v >= threshold}: of the k largest, of the smallest set of most
probable tokens whose mass reaches p (Holtzman et al. 2020, 1904.09751), of those at least as
probable as a share of the most probable one (Nguyen et al. 2024, 2407.01082). So the filters
compose by taking the largest threshold, and equal logits are kept or dropped together. The choice
itself is Gumbel-max: argmax of logit + Gumbel noise, with noise that depends only on (key, v).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from kernels.dispatch import register
from kernels.threefry import gumbel
from kernels.typing import AnyArray, IntScalar, Scalar

__all__ = [
    "filter_logits",
    "first_of_the_largest",
    "nucleus_threshold",
    "sample_logits",
    "sample_token",
    "vocabulary_product",
]


def nucleus_threshold(
    logits: Float32[AnyArray, "B V"], kept: Bool[AnyArray, "B V"], mass: Scalar | Float[Array, ""]
) -> Float32[Array, "B 1"]:
    """The smallest logit of the nucleus, by bisection over the bits of a float rather than sorting.

    Args:
      logits: float32 [B, V], finite or -inf.
      kept: bool [B, V], the tokens that compete.
      mass: the share p of their probability that the nucleus reaches, in (0, 1].

    Returns:
      float32 [B, 1].
    """
    weights = jnp.where(kept, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    wanted = mass * weights.sum(-1, keepdims=True)
    # Not negative, so that floats and their bits are in the same order.
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def narrow(_, bounds):  # the mass of {bits >= low} is enough, that of {bits >= high} is not
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle, weights, 0).sum(-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    low, high = jnp.zeros_like(wanted, jnp.int32), jnp.full_like(wanted, one + 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, narrow, (low, high), unroll=True)
    return jnp.where(kept & (bits >= low), logits, jnp.inf).min(-1, keepdims=True)


def filter_logits(
    logits: Float[AnyArray, "B V"],
    *,
    temperature: Scalar = 1.0,
    top_k: IntScalar = 0,
    top_p: Scalar = 1.0,
    min_p: Scalar = 0.0,
) -> Float32[Array, "B V"]:
    """Logits [B, V] over the temperature (above 0), -inf outside the kept set.

    The arguments are those of `kernels.sample_logits`.
    """
    logits = logits.astype(jnp.float32) / temperature
    kept = logits > -jnp.inf
    if 0 < top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, top_k)[0][:, -1:]
        above, equal = logits > last, logits == last
        room = top_k - above.sum(-1, keepdims=True)
        kept &= above | (equal & (jnp.cumsum(equal, -1) <= room))
    if top_p < 1:
        kept &= logits >= nucleus_threshold(logits, kept, top_p)
    if min_p > 0:
        kept &= logits >= logits.max(-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(kept, logits, -jnp.inf)


@register("sample_logits", "reference")
def sample_logits(logits, keys, *, temperature, top_k, top_p, min_p):
    """See `kernels.sample_logits`; it filters all tokens, draws noise for all, takes the best."""
    if temperature == 0:
        return first_of_the_largest(logits)
    kept = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    noise = gumbel(keys, jnp.arange(logits.shape[-1]))
    return first_of_the_largest(kept + noise)


@register("sample_token", "reference")
def sample_token(hidden, head, keys, **choice):
    """See `kernels.sample_token`."""
    return sample_logits(vocabulary_product(hidden, head), keys, **choice)


def vocabulary_product(
    hidden: Float[AnyArray, "B D"], head: Float[AnyArray, "D V"]
) -> Float32[Array, "B V"]:
    """Logits in float32, of a product in the dtype of the head."""
    return jnp.matmul(hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)


def first_of_the_largest(x: Float[AnyArray, "*rows V"]) -> Int32[Array, " *rows"]:
    """argmax over V in two plain reductions, which compilers vectorise better."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = x == x.max(-1, keepdims=True)
    return jnp.where(largest, ids, x.shape[-1] - 1).min(-1)
