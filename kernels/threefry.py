"""Threefry-2x32 (Salmon et al. 2011) in plain uint32 operations, bit for bit that of `jax.random`.

JAX hides the generator behind a primitive that is a loop of its own on some platforms. Written
out it fuses with what uses the numbers, and every backend of a kernel can do the same. On CPUs that
loop takes several times as long for many keys, and seconds more to compile.

The functions whose names end in "each" take keys of any shape. They leave the bits to `jax.random`
for other generators than threefry, where `jax_threefry_partitionable` is off, and where
`jax_debug_key_reuse` is on, which sees what `jax.random` does with a key.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer, Key, UInt32

from kernels.typing import AnyArray

__all__ = [
    "fold_in_each",
    "gumbel",
    "gumbel_each",
    "gumbel_of",
    "normal_each",
    "normal_of",
    "split_each",
    "threefry2x32",
    "uniform_each",
]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    x: UInt32[Array, "..."],
    y: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The block cipher: two words of key and two of counter to two words; shapes broadcast."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + schedule[0], y + schedule[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def fold_in_each(
    keys: Key[Array, "*#keys"], data: int | Integer[AnyArray, "*#keys"]
) -> Key[Array, "*keys"]:
    """`jax.random.fold_in` of each key; shapes broadcast.

    Args:
      keys: typed keys.
      data: integers, taken as 32 bits.
    """
    if isinstance(data, int):
        data = np.uint32(data)  # raises OverflowError out of range, as jax.random does
    return _fold_in_each(keys, data)


@jax.jit
def _fold_in_each(keys, data):
    shape = jnp.broadcast_shapes(keys.shape, jnp.shape(data))
    keys, data = jnp.broadcast_to(keys, shape), jnp.broadcast_to(data, shape).astype(jnp.uint32)
    if not _is_written_out(keys):
        return jax.vmap(jax.random.fold_in)(keys.ravel(), data.ravel()).reshape(shape)
    words = threefry2x32(_words(keys, 0), jnp.zeros_like(data), data)
    return jax.random.wrap_key_data(jnp.stack(words, -1), impl="threefry2x32")


@functools.partial(jax.jit, static_argnames="count")
def split_each(keys: Key[Array, "*keys"], count: int) -> tuple[Key[Array, "*keys"], ...]:
    """`jax.random.split` of each key, as `count` arrays of the shape of the keys."""
    if _is_written_out(keys):  # key i of a split is that with i folded in
        parts = _fold_in_each(keys[..., None], _places(keys, (count,)))
    else:
        parts = _of_each(lambda key: jax.random.split(key, count), keys)
    return tuple(parts[..., i] for i in range(count))


@functools.partial(jax.jit, static_argnames="shape")
def uniform_each(keys: Key[Array, "*keys"], shape: tuple[int, ...] = ()) -> Float32[Array, "..."]:
    """`jax.random.uniform` of this shape for each key, float32 in [0, 1)."""
    if not _is_written_out(keys):
        return _of_each(lambda key: jax.random.uniform(key, shape, jnp.float32), keys)
    return _uniform_of(_words(keys, len(shape)), _places(keys, shape))


@functools.partial(jax.jit, static_argnames="shape")
def normal_each(keys: Key[Array, "*keys"], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """`jax.random.normal` of this shape for each key, float32."""
    if not _is_written_out(keys):
        return _of_each(lambda key: jax.random.normal(key, shape, jnp.float32), keys)
    symmetric = _symmetric_of(_words(keys, len(shape)), _places(keys, shape))
    return np.float32(2**0.5) * jax.lax.erf_inv(symmetric)


@functools.partial(jax.jit, static_argnames="shape")
def gumbel_each(keys: Key[Array, "*keys"], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """`jax.random.gumbel` of this shape for each key, float32."""
    if not _is_written_out(keys):
        return _of_each(lambda key: jax.random.gumbel(key, shape, jnp.float32), keys)
    return gumbel_of(_words(keys, len(shape)), _places(keys, shape))


def _is_written_out(keys):
    """Whether the numbers of these keys are those of the functions here."""
    is_threefry = str(jax.random.key_impl(keys)) == "threefry2x32"
    config = jax.config
    return is_threefry and config.jax_threefry_partitionable and not config.jax_debug_key_reuse


def _of_each(draw, keys):
    drawn = jax.vmap(draw)(keys.ravel())
    return drawn.reshape(*keys.shape, *drawn.shape[1:])


def _words(keys, further):
    """The two words of each key, with further axes for the counters."""
    data = jax.random.key_data(keys)
    shape = *keys.shape, *(1,) * further
    return data[..., 0].reshape(shape), data[..., 1].reshape(shape)


def _places(keys, shape):
    """The counters of an array for each key: 0, 1, 2, ... in its shape."""
    if math.prod(shape) > 2**32:
        raise ValueError(f"no counters of 32 bits for the {math.prod(shape)} numbers of a key")
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape((1,) * keys.ndim + shape)


def gumbel(
    keys: Key[Array, " B"],
    ids: Integer[AnyArray, "B N"] | Integer[AnyArray, " N"],
) -> Float32[Array, "B N"]:
    """The noise of `jax.random.gumbel(key, [V])` at some of its V places, and no others.

    Args:
      keys: [B] threefry keys.
      ids: integers [B, N] or [N], places.

    Returns:
      float32 [B, N].
    """
    data = jax.random.key_data(keys)
    return gumbel_of((data[:, :1], data[:, 1:]), jnp.atleast_2d(ids))


def gumbel_of(
    key: tuple[UInt32[Array, "*#key"], UInt32[Array, "*#key"]], ids: Integer[AnyArray, "*#N"]
) -> Float32[Array, "..."]:
    """`gumbel` from the two words of a key, at ids; shapes broadcast."""
    uniform = _uniform_of(key, ids)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def normal_of(
    key: tuple[UInt32[Array, "*#key"], UInt32[Array, "*#key"]], ids: Integer[AnyArray, "*#N"]
) -> Float32[Array, "..."]:
    """The noise of `jax.random.normal` from the two words of a key, at ids; shapes broadcast.

    The uniform number is that of `jax.random.normal` to the bit. Its inverse error function is the
    polynomial that XLA has (Giles 2010), written out with a logarithm, which kernels have, where
    XLA has log1p: of the 2^23 numbers that there are, none is further than 3 ulp from XLA's.
    """
    return np.float32(2**0.5) * _inverse_erf(_symmetric_of(key, ids))


_LOWEST = np.nextafter(np.float32(-1), np.float32(0))
_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def _inverse_erf(x):
    """Of numbers in (-1, 1)."""
    square = x * x
    rest = 1 - square
    w = -(jnp.log(rest) + ((1 - rest) - square) / rest)  # -log1p(-square), whatever is fused
    is_central = w < 5
    inverse = jax.lax.rsqrt(w)
    root = w * inverse
    root = root + 0.5 * inverse * (w - root * root)  # kernels of jax 0.10 have no square root
    w = jnp.where(is_central, w - 2.5, root - 3)
    value = jnp.zeros_like(w)
    for central, tail in zip(_CENTRE, _TAIL, strict=True):
        value = value * w + jnp.where(is_central, jnp.float32(central), jnp.float32(tail))
    return value * x


def _symmetric_of(key, ids):
    """Numbers in (-1, 1)."""
    return jnp.maximum(_uniform_of(key, ids) * 2 + _LOWEST, _LOWEST)


def _uniform_of(key, ids):
    """Numbers in [0, 1), multiples of 2^-23."""
    ids = ids.astype(jnp.uint32)
    high, low = threefry2x32(key, jnp.zeros_like(ids), ids)
    bits = ((high ^ low) >> 9) | jnp.uint32(0x3F800000)  # a float in [1, 2)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1
