"""quantized_linear for TPUs: weights come from memory as int8, and are bfloat16 on the chip alone.

A bfloat16 holds every int8, so that the matrix units multiply the weights as they are, and the
scales are factors of the results. A float32 is the sum of three bfloat16, which are three rows of
the same product.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tpu
from kernels.dispatch import register
from kernels.nearest_code.halves import split
from kernels.operands import alike, result, up_to

__all__ = ["quantized_linear"]

_PACKED = 16  # rows of a register of bfloat16
# A block: at most so many rows of x, and of channels the most whose weights are not too many bytes.
# Large blocks of weights are better: the next one is fetched in the time of one, latency included.
_ROWS = 128
_CHANNELS = (2048, 1024, 512, 256, 128)
_MEMORY = 2 << 20  # bytes of weights, and of x
_FEWEST = 2  # blocks, where there are channels enough: the first one is waited for
_MANY = 1 << 24  # weights that take so long to read that the start of the kernel does not matter
_FULL = 64  # rows whose products take longer than that start


def _channels(channels, width):
    """Channels of a block, or None where not even 128 of this width fit."""
    able = [size for size in _CHANNELS if size * up_to(width, tpu.LANES) <= _MEMORY]
    return next((size for size in able if _FEWEST * size <= channels), able[-1]) if able else None


def _refusal(x, weight, scale):
    if not x.shape[0] or not weight.size:
        return "needs at least one row, one channel and one weight of each"
    if _channels(*weight.shape) is None:
        return f"has room for {_MEMORY // _CHANNELS[-1]:,} weights of a channel, not {x.shape[1]:,}"
    return None


def _pays(x, weight, scale):
    """Elsewhere XLA, which turns int8 into bfloat16 within its products too, is as fast."""
    return x.shape[0] <= _ROWS and (weight.size >= _MANY or x.shape[0] >= _FULL)


@register(
    "quantized_linear",
    "tpu",
    default_on=("tpu",),
    default_when=_pays,
    only_on=("tpu",),
    refusal=_refusal,
)
def quantized_linear(x, weight, scale):
    """See `kernels.quantized_linear`."""
    number, width = x.shape
    parts = [x] if x.dtype == jnp.bfloat16 else split(x.astype(jnp.float32))
    most = min(_ROWS, _MEMORY // (2 * len(parts) * up_to(width, tpu.LANES)))
    rows = min(most // _PACKED * _PACKED, up_to(number, _PACKED))
    stacked = jnp.pad(jnp.stack(parts), ((0, 0), (0, -number % rows), (0, 0)))
    return _product(stacked, weight, scale[None], rows=rows)[:number]


@functools.partial(jax.jit, static_argnames="rows")  # traced once for all layers
def _product(x, weight, scale, *, rows):
    parts, number, width = x.shape
    channels = weight.shape[0]
    size = _channels(channels, width)
    x, weight, scale = alike(x, weight, scale)
    return pl.pallas_call(
        _kernel,
        out_shape=result((number, channels), jnp.float32, x),
        grid=(number // rows, pl.cdiv(channels, size)),
        in_specs=[
            pl.BlockSpec((parts, rows, width), lambda r, v: (0, r, 0)),
            pl.BlockSpec((size, width), lambda r, v: (v, 0)),
            pl.BlockSpec((1, size), lambda r, v: (0, v)),
        ],
        out_specs=pl.BlockSpec((rows, size), lambda r, v: (r, v)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="quantized_linear",
    )(x, weight, scale)


def _kernel(x, weight, scale, out):
    """All rows of a block against some channels, of which the last may be no channels at all."""
    parts, rows, width = x.shape
    product = jax.lax.dot_general(
        x[...].reshape(parts * rows, width),
        weight[...].astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    out[...] = sum(product[i * rows : (i + 1) * rows] for i in range(parts)) * scale[...]
