"""The specification of decode_layers in plain jax.numpy, and the forms of its arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.decode_attention import reference as attention
from kernels.dispatch import register
from kernels.typing import AnyArray

__all__ = ["LayerVectors", "LayerWeights", "decode_layers", "normalise"]


class LayerWeights(NamedTuple):
    """The matrices of a layer; F is the width of its feed-forward network.

    Attributes:
      qkv: queries, keys and values, each with the columns of head after head.
      out: of what was attended.
      up: to the feed-forward network.
      down: from it.
    """

    qkv: Float[AnyArray, "D 3*D"]
    out: Float[AnyArray, "D D"]
    up: Float[AnyArray, "D F"]
    down: Float[AnyArray, "F D"]


class LayerVectors(NamedTuple):
    """The vectors of a layer; None stands for zeros.

    Attributes:
      attention_scale: of the normalisation before attention.
      attention_bias: of the same.
      feed_forward_scale: of the normalisation before the feed-forward network.
      feed_forward_bias: of the same.
      qkv: the bias of that matrix, as of the others.
      out: see `qkv`.
      up: see `qkv`.
      down: see `qkv`.
    """

    attention_scale: Float[AnyArray, " D"]
    attention_bias: Float[AnyArray, " D"] | None
    feed_forward_scale: Float[AnyArray, " D"]
    feed_forward_bias: Float[AnyArray, " D"] | None
    qkv: Float[AnyArray, " 3*D"] | None
    out: Float[AnyArray, " D"] | None
    up: Float[AnyArray, " F"] | None
    down: Float[AnyArray, " D"] | None


def normalise(x, scale, bias, epsilon):
    """LayerNorm over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


@register("decode_layers", "reference")
def decode_layers(x, weights, vectors, caches, column, first, *, heads, epsilon, window):
    """See `kernels.decode_layers`; layer after layer."""
    grown = []
    for matrices, rows, cache in zip(weights, vectors, caches, strict=True):
        x, cache = _layer(x, matrices, rows, cache, column, first, heads, epsilon, window)
        grown.append(cache)
    return x, tuple(grown)


def _layer(x, weights, vectors, cache, column, first, heads, epsilon, window):
    (batch, width), dtype = x.shape, x.dtype
    vector = LayerVectors(*vectors)

    def linear(x, matrix, bias):
        y = x.astype(dtype) @ matrix.astype(dtype)
        return y + bias[None, : matrix.shape[1]].astype(dtype)

    def norm(x, scale, bias):
        return normalise(x, scale[None, :width], bias[None, :width], epsilon)

    h = norm(x, vector.attention_scale, vector.attention_bias)
    q, k, v = linear(h, weights.qkv, vector.qkv).reshape(batch, 1, 3, heads, -1).swapaxes(0, 2)
    q, k, v = (array.swapaxes(0, 1) for array in (q, k, v))
    cache = attention.write(cache, k, v, column)
    attended = attention.attend(q, cache.keys, cache.values, column, first, window, causal=True)
    x = x + linear(attended.reshape(batch, width), weights.out, vector.out)
    h = norm(x, vector.feed_forward_scale, vector.feed_forward_bias)
    h = jax.nn.gelu(linear(h, weights.up, vector.up), approximate=True)
    return x + linear(h, weights.down, vector.down), cache
