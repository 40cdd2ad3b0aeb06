"""Cases of decode_layers: at the edges of blocks and registers, ragged, padded, with windows."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from kernels.decode_attention import KVCache
from kernels.decode_attention.cases import definition as attention
from kernels.decode_layers import LayerVectors, LayerWeights, decode_layers, stack_vectors
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example"]

_EPSILON = 1e-3  # large enough to be seen


def example(
    seed: int,
    batch: int = 2,
    layers: int = 3,
    heads: int = 4,
    width: int = 128,
    inner: int = 256,
    length: int = 128,
    dtype: str = "float32",
    bias: bool = True,
) -> tuple:
    """Embeddings, weights and vectors of layers, and caches without an empty column."""
    generator = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, offset=0.0):
        return jnp.asarray(offset + scale * generator.normal(size=shape), jnp.float32)

    def matrix(rows, columns):
        return normal(rows, columns, scale=rows**-0.5).astype(dtype)

    def scale():
        return normal(width, scale=0.3, offset=1.0)

    def shift(size):
        return normal(size, scale=0.3).astype(dtype) if bias else None

    weights = tuple(
        LayerWeights(
            matrix(width, 3 * width),
            matrix(width, width),
            matrix(width, inner),
            matrix(inner, width),
        )
        for _ in range(layers)
    )
    vectors = stack_vectors(
        [
            LayerVectors(
                scale(),
                shift(width),
                scale(),
                shift(width),
                *map(shift, (3 * width, width, inner, width)),
            )
            for _ in range(layers)
        ],
        weights,
    )
    shapes = (batch, heads, width // heads, length), (batch, heads, length, width // heads)
    caches = tuple(
        KVCache(*(normal(*shape).astype(dtype) for shape in shapes)) for _ in range(layers)
    )
    return normal(batch, width).astype(dtype), weights, vectors, caches


def _step(shape, columns, seed, *, ragged=False, padded=False):
    """A step of a loop at one of the columns; others of other rows."""
    batch = shape.get("batch", 2)
    column = np.int32(columns[seed])
    if ragged:
        column = np.maximum(column - 90 * np.arange(batch), 0).astype(np.int32)
    first = np.minimum(3 * np.arange(batch), column).astype(np.int32) if padded else None
    arguments = *example(seed, **shape), jnp.asarray(column)
    return *arguments, None if first is None else jnp.asarray(first)


def _definition(x, weights, vectors, caches, column, first=None, *, heads, epsilon, window=0):
    """By NumPy in float64, with the definition of attention."""
    x, vectors = np.asarray(x, np.float64), np.asarray(vectors, np.float64)
    width, grown = x.shape[1], []
    for matrices, rows, cache in zip(weights, vectors, caches, strict=True):
        qkv, out, up, down = (np.asarray(matrix, np.float64) for matrix in matrices)
        vector = LayerVectors(*rows)
        h = _normalised(x, vector.attention_scale, vector.attention_bias, epsilon)
        parts = np.split(h @ qkv + vector.qkv[: 3 * width], 3, axis=1)
        q, k, v = (jnp.asarray(part.reshape(len(x), 1, heads, -1)) for part in parts)
        attended, cache = attention(q, k, v, cache, column, first, window=window)
        grown.append(cache)
        x = x + attended.reshape(x.shape) @ out + vector.out[:width]
        h = _normalised(x, vector.feed_forward_scale, vector.feed_forward_bias, epsilon)
        h = h @ up + vector.up[: up.shape[1]]
        h = h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2
        x = x + h @ down + vector.down[:width]
    return x, tuple(grown)


def _normalised(x, scale, bias, epsilon):
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + epsilon)
    return x * scale[: x.shape[1]] + bias[: x.shape[1]]


def _case(name, columns, window=0, ragged=False, padded=False, **shape):
    dtype = shape.get("dtype", "float32")
    options = {"heads": shape.get("heads", 4), "epsilon": _EPSILON}
    return Case(
        name,
        functools.partial(_step, shape, columns, ragged=ragged, padded=padded),
        options | ({"window": window} if window else {}),
        seeds=len(columns),
        atol=2e-4 if dtype == "float32" else 0.25,
        dtype=dtype,
    )


def _sizes_only(batch, column, dtype, seed):
    """GPT-2 small, whose layers share their arrays."""
    layers, width, heads, length = 12, 768, 12, 1024
    shapes = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    weights = LayerWeights(*(jnp.zeros(shape, dtype) for shape in shapes))
    shapes = (batch, heads, width // heads, length), (batch, heads, length, width // heads)
    cache = KVCache(*(jnp.zeros(shape, dtype) for shape in shapes))
    vectors = jnp.zeros((layers, len(LayerVectors._fields), 4 * width))
    x = jnp.zeros((batch, width), dtype)
    return x, (weights,) * layers, vectors, (cache,) * layers, jnp.int32(column)


def _estimated(batch, column, dtype):
    first = 2 + 12 * len(LayerWeights._fields)  # of the caches among the arrays
    return Case(
        f"batch {batch}, GPT-2 small, column {column} of 1024, {dtype}",
        functools.partial(_sizes_only, batch, column, dtype),
        {"heads": 12},
        dtype=dtype,
        donated=tuple(range(first, first + 12 * len(KVCache._fields))),
        scalar=column,
    )


def _timed(batch, column):
    shape = {"layers": 12, "heads": 12, "width": 768, "inner": 3072, "length": 1024}
    name = f"batch {batch}, GPT-2 small, column {column} of 1024"
    return dataclasses.replace(_case(name, (column,), batch=batch, **shape), rtol=2e-4)


SUITES = (
    Suite(
        "decode_layers",
        decode_layers,
        cases=(
            _case("384 columns", (0, 127, 128, 383), batch=1, length=384, inner=128),
            _case(
                "384 columns, ragged, padded, window 140",
                (383, 100),
                layers=2,
                length=384,
                inner=128,
                window=140,
                ragged=True,
                padded=True,
            ),
            _case("four parts, no biases", (0,), batch=1, layers=1, inner=512, bias=False),
            _case("16 heads, bfloat16", (200,), layers=1, heads=16, length=512, dtype="bfloat16"),
            _case("9 rows", (100,), batch=9, layers=1, ragged=True, padded=True),
            _case("heads of 4", (5,), layers=1, heads=32),
        ),
        timed=(_timed(1, 1000),),
        estimated=(
            *(_estimated(*sizes, "bfloat16") for sizes in ((1, 1023), (1, 255), (8, 1023))),
            _estimated(1, 1023, "float32"),
        ),
        definition=_definition,
    ),
)
