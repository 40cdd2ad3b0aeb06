"""Cases of decode_attention: around the edges of buckets, windows, ragged rows, shared heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.decode_attention import KVCache, decode_attention
from kernels.testing import Case, Suite

__all__ = ["EDGES", "LENGTH", "SUITES", "definition", "example"]

LENGTH = 100
EDGES = (0, 31, 62, 63, 64, 65, 94, 95, 96, 97, 99)
_TILES = 384  # three blocks of the kernel for TPUs, which wants whole registers of columns
_TILE_EDGES = (0, 1, 127, 128, 129, 255, 256, 300, 383)


def example(
    seed, batch=2, new=1, heads=4, kv_heads=2, width=8, length=LENGTH, dtype="float32"
) -> tuple:
    """New queries, keys and values, and a cache without an empty column."""
    generator = np.random.default_rng(seed)
    shapes = [(batch, new, n, width) for n in (heads, kv_heads, kv_heads)]
    shapes += [(batch, kv_heads, width, length), (batch, kv_heads, length, width)]
    q, k, v, *cache = (
        jnp.asarray(2 * generator.normal(size=shape).astype(np.float32), dtype) for shape in shapes
    )
    return q, k, v, KVCache(*cache)


def _step(shape, columns, seed, *, ragged=False, padded=False):
    """A step of a loop at one of the columns."""
    q, k, v, cache = example(seed, **shape)
    column = min(columns[seed], cache.keys.shape[-1] - q.shape[1])
    column = np.array([column, max(column - 40, 0)] if ragged else column, np.int32)
    first = np.array([0, min(3, column.min())], np.int32) if padded else None
    return q, k, v, cache, jnp.asarray(column), None if first is None else jnp.asarray(first)


def _prefill(shape, column, seed):
    return *example(seed, **shape), column


def definition(q, k, v, cache, column, first=None, *, window=0, causal=True) -> tuple:
    """Each sample, head and query on its own."""
    q, k, v = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, k, v))
    keys, values = (np.array(a.astype(jnp.float32), np.float64) for a in cache)
    keys, window = keys.transpose(0, 1, 3, 2), window or keys.shape[-1]
    batch, new, heads, width = q.shape
    column = np.broadcast_to(column, batch)
    first = np.zeros(batch, int) if first is None else np.asarray(first)
    out = np.zeros(q.shape)
    for b in range(batch):
        for i in range(new):
            keys[b, :, column[b] + i], values[b, :, column[b] + i] = k[b, i], v[b, i]
        for i in range(new):
            own = column[b] + (i if causal else new - 1)
            seen = slice(max(first[b], own + 1 - window), own + 1)
            for h in range(heads):
                j = h // (heads // k.shape[2])
                scores = keys[b, j, seen] @ q[b, i, h] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights / weights.sum() @ values[b, j, seen]
    return out, KVCache(keys.transpose(0, 1, 3, 2), values)


def _whole_cache(q, k, v, cache, column, first=None):
    """What one writes with jax.nn: a cache [B, T, Hkv, Dh] and a mask over all of it."""
    put = jax.lax.dynamic_update_slice
    keys = put(cache.keys.transpose(0, 3, 1, 2), k, (0, column, 0, 0))
    values = put(cache.values.transpose(0, 2, 1, 3), v, (0, column, 0, 0))
    seen = jnp.arange(keys.shape[1]) <= column + jnp.arange(q.shape[1])[:, None]
    out = jax.nn.dot_product_attention(q, keys, values, mask=seen[None, None])
    return out, KVCache(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))


def _at_edges(
    name,
    atol=2e-5,
    window=0,
    causal=True,
    ragged=False,
    padded=False,
    edges=EDGES,
    estimated=False,
    **shape,
):
    arguments = functools.partial(_step, shape, edges, ragged=ragged, padded=padded)
    options = {"window": window} if window else {}
    options |= {} if causal else {"causal": False}
    case = Case(
        name,
        arguments,
        options,
        seeds=len(edges),
        atol=(atol, 0.0),
        dtype=shape.get("dtype", "float32"),
    )
    if not estimated:
        return case
    # The cache is given up for the new one; a length is what the kernel reads of the arguments.
    return dataclasses.replace(case, donated=(3, 4), scalar=edges[0])


def _filled(column, causal=True, **shape):
    arguments = functools.partial(_prefill, shape, column)
    name = f"{shape['new']} tokens, prefill at {column}{', all seen' * (not causal)}"
    return Case(name, arguments, {} if causal else {"causal": False}, atol=(2e-5, 0.0))


def _timed(batch, heads, length, column):
    shape = {"batch": batch, "heads": heads, "kv_heads": heads, "width": 64, "length": length}
    name = f"batch {batch}, {heads} heads, column {column} of {length}"
    return _at_edges(name, edges=(column,), **shape)


SUITES = (
    Suite(
        "decode_attention",
        decode_attention,
        cases=(
            *(
                _at_edges(
                    f"{new} tokens{', ragged' * ragged}{', padded' * padded}",
                    ragged=ragged,
                    padded=padded,
                    new=new,
                )
                for new in (1, 3)
                for ragged in (False, True)
                for padded in (False, True)
            ),
            *(
                _at_edges(f"{new} tokens, window {window}", window=window, padded=True, new=new)
                for new, window in ((1, 1), (3, 20), (1, 99), (3, 200))
            ),
            _at_edges("4 tokens that see each other", causal=False, padded=True, new=4),
            _filled(63, causal=False, new=16),
            _filled(0, new=1),
            _filled(0, new=100),
            _filled(63, new=2),
            *(
                _at_edges(
                    f"{_TILES} columns{', ragged' * ragged}{f', window {window}' * bool(window)}",
                    length=_TILES,
                    edges=_TILE_EDGES,
                    ragged=ragged,
                    padded=ragged,
                    window=window,
                )
                for ragged, window in ((False, 0), (True, 0), (False, 1), (True, 140))
            ),
            *(
                _at_edges(
                    f"{_TILES} columns, {kv_heads} of 4 heads, {dtype}",
                    atol=2e-5 if dtype == "float32" else 0.06,
                    dtype=dtype,
                    length=_TILES,
                    kv_heads=kv_heads,
                    edges=(70, 300),
                )
                for kv_heads, dtype in ((1, "float32"), (4, "bfloat16"))
            ),
            *(
                _at_edges(
                    f"{length} columns, {kv_heads} of 4 heads of {width}, bfloat16, ragged",
                    atol=0.06,
                    dtype="bfloat16",
                    length=length,
                    kv_heads=kv_heads,
                    width=width,
                    ragged=True,
                    padded=True,
                    window=window,
                    edges=edges,
                )
                for length, kv_heads, width, window, edges in (
                    (768, 1, 64, 0, (0, 200, 767)),
                    (192, 2, 128, 50, (100,)),
                )
            ),
            *(
                _at_edges(f"{kv_heads} of 4 heads", kv_heads=kv_heads, edges=(70,))
                for kv_heads in (4, 1)
            ),
            *(
                _at_edges(
                    f"bfloat16, {new} tokens, {kv_heads} of 4 heads",
                    atol=0.06,
                    dtype="bfloat16",
                    new=new,
                    kv_heads=kv_heads,
                    edges=(70,),
                )
                for new, kv_heads in ((1, 4), (1, 2), (3, 4))
            ),
        ),
        estimated=tuple(
            _at_edges(
                f"batch {batch}, 12 heads of 64, column {column} of 1024, bfloat16",
                batch=batch,
                heads=12,
                kv_heads=12,
                width=64,
                length=1024,
                dtype="bfloat16",
                atol=0.06,
                edges=(column,),
                estimated=True,
            )
            for batch, column in ((8, 1023), (8, 255), (64, 1023))
        ),
        timed=(
            _timed(1, 12, 1024, 100),
            _timed(1, 12, 1024, 1000),
            _timed(8, 12, 1024, 100),
            _timed(8, 12, 1024, 1000),
        ),
        definition=definition,
        peers={"jax.nn": _whole_cache},
    ),
)
