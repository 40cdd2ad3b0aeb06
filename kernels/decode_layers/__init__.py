"""All layers of a causal transformer for one new token of each row."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels.decode_attention import KVCache
from kernels.decode_layers.reference import LayerVectors, LayerWeights
from kernels.dispatch import Operation
from kernels.typing import AnyArray, IntScalar, Scalar

__all__ = ["LayerVectors", "LayerWeights", "decode_layers", "stack_vectors"]

_decode_layers = Operation("decode_layers", __name__)


def stack_vectors(
    layers: Sequence[LayerVectors], weights: Sequence[LayerWeights]
) -> Float32[Array, "N 8 W"]:
    """The vectors of all layers as `decode_layers` reads them, computed once before a loop.

    Args:
      layers: of N layers of the same sizes.
      weights: of the same layers.

    Returns:
      float32, the vectors of each layer in their order, with zeros up to the width of the widest
      matrix.
    """
    wide = _widest(weights)

    def row(vector):
        vector = jnp.zeros(0) if vector is None else jnp.asarray(vector, jnp.float32)
        return jnp.pad(vector, (0, wide - len(vector)))

    return jnp.stack([jnp.stack([row(vector) for vector in layer]) for layer in layers])


def _widest(weights):
    return max(matrix.shape[1] for matrix in weights[0])


def decode_layers(
    x: Float[AnyArray, "B D"],
    weights: tuple[LayerWeights, ...],
    vectors: Float32[AnyArray, "N 8 W"],
    caches: tuple[KVCache, ...],
    column: IntScalar | Int[AnyArray, ""] | Int[AnyArray, " B"],
    first: Int[AnyArray, " B"] | None = None,
    *,
    heads: IntScalar,
    epsilon: Scalar = 1e-5,
    window: IntScalar = 0,
    otherwise: Callable | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], tuple[KVCache, ...]]:
    """The residual stream after all layers of a transformer in the form of GPT-2, and its caches.

    A layer is attention and a feed-forward network with GELU (tanh), each on the normalised stream
    and added to it. The new token of each row joins those in the caches.

    Args:
      x: [B, D] float32 or bfloat16, the embedding of the new tokens.
      weights: of each layer, in the type of x.
      vectors: of `stack_vectors`.
      caches: of `make_kv_cache`, one for each layer; to be updated in place they must not be used
        again.
      column: of the new token in the caches: one for all rows, or int32 [B].
      first: int32 [B], the first column of each row that holds a token; None for 0.
      heads: H, of queries as well as of keys and values.
      epsilon: is added to the variance in the normalisations.
      window: the number of columns that a token sees, its own included; 0 for all.
      otherwise: computes the same from `x` and `caches`, and is taken by default where the
        reference would be.
      implementation: "reference"; "tpu" is one kernel for up to eight rows (the default there).

    Returns:
      [B, D], and the caches after the write.

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: the numbers of weights, vectors and caches differ, or the new token does not fit
        into the caches (when `column` is an int).
    """
    numbers = len(weights), len(vectors), len(caches)
    if len(set(numbers)) > 1 or not weights:
        raise ValueError("weights of {}, vectors of {} and caches of {} layers".format(*numbers))
    if vectors.shape[2] != _widest(weights):
        raise ValueError(f"vectors have {_widest(weights)} columns here, not {vectors.shape[2]}")
    length = caches[0].keys.shape[-1]
    if isinstance(column, int) and not 0 <= column < length:
        raise ValueError(f"a new token at column {column} does not fit into caches of {length}")
    arguments = x, weights, vectors, caches, column, first
    options = {"heads": heads, "epsilon": epsilon, "window": window}
    if implementation is None and otherwise is not None:

        def reference(x, weights, vectors, caches, *rest, **options):
            return otherwise(x, caches)

        return _decode_layers.or_else(reference, *arguments, **options)
    return _decode_layers(implementation, *arguments, **options)
