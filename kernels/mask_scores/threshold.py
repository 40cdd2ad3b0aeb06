"""keep_most_confident without sorting: the last kept value is found bit by bit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from kernels.dispatch import EVERYWHERE, register
from kernels.typing import AnyArray

__all__ = ["keep_most_confident"]

_SORTED_SIZE = 64  # the largest for which sorting was measured to be faster on a CPU


def _is_large(confidence, count):
    return confidence.size > _SORTED_SIZE


@register("keep_most_confident", "threshold", default_on=EVERYWHERE, default_when=_is_large)
def keep_most_confident(
    confidence: Float32[AnyArray, "B L"], count: Int32[Array, " B"]
) -> Bool[Array, "B L"]:
    """See `kernels.keep_most_confident`; the count is from 0 to L."""
    count = count[:, None]
    bits = jax.lax.bitcast_convert_type(jnp.where(confidence == 0, 0, confidence), jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the order of the floats

    def raise_bit(i, threshold):  # the largest so far that `count` values reach
        higher = threshold + (jnp.int32(1) << (31 - i))  # the first wraps from the least to 0
        enough = (ordered >= higher).sum(-1, keepdims=True) >= count
        return jnp.where(enough, higher, threshold)

    least = jnp.full_like(count, jnp.iinfo(jnp.int32).min)
    threshold = jax.lax.fori_loop(0, 32, raise_bit, least)
    above, equal = ordered > threshold, ordered == threshold
    room = count - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, -1) <= room))
