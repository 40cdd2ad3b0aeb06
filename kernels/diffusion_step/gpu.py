"""diffusion_step for GPUs (Hopper): one pass over the sample, with noise that is never in memory.

A warpgroup has 512 values of a sample. The bits of the noise are those of `jax.random.normal`.
The gradient is that of the reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels import gpu
from kernels.diffusion_step import reference
from kernels.diffusion_step.reference import StepCoefficients
from kernels.dispatch import register
from kernels.operands import alike, result
from kernels.threefry import normal_of

__all__ = ["diffusion_step"]

_LINE = 128  # values that are loaded at once, one for each thread
_LINES = 4  # at once where a sample is a multiple of so many: loads of 16 bytes
_LARGEST = 1 << 31  # a place is an int32


def _refusal(x, output, coefficients, *, keys, history, clip):
    if any(np.ndim(number) for number in (*coefficients, 0.0 if clip is None else clip)):
        return "needs coefficients that are scalars"
    arrays = [x, output] if history is None else [x, output, history]
    for array in arrays:
        if array.dtype != jnp.float32:
            return f"needs float32, not {array.dtype}"
    if not x.size:
        return "needs at least one value"
    if x[0].size >= _LARGEST:
        return f"takes samples of fewer than {_LARGEST:,} values, not {x[0].size:,}"
    if keys is not None and str(jax.random.key_impl(keys)) != "threefry2x32":
        return f"knows threefry keys, not {jax.random.key_impl(keys)}"
    return gpu.unfit()


@register("diffusion_step", "gpu", only_on=("cuda",), refusal=_refusal)
def diffusion_step(x, output, coefficients, *, keys, history, clip):
    """See `kernels.diffusion_step`."""
    return _step(x, output, coefficients, history, clip, keys)


@jax.custom_jvp
def _step(x, output, coefficients, history, clip, keys):
    numbers = [*coefficients, jnp.inf if clip is None else clip]
    arrays = [x, output] if history is None else [x, output, history]
    size = x[0].size
    missing = -size % _LINE
    following, x0 = _run(
        [jnp.pad(array.reshape(len(array), -1), ((0, 0), (0, missing))) for array in arrays],
        jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers]),
        None if keys is None else jax.random.key_data(keys),
        clips=clip is not None,
    )
    return following[:, :size].reshape(x.shape), x0[:, :size].reshape(x.shape)


@_step.defjvp
def _tangent(primals, tangents):
    *floats, keys = primals

    def of_floats(x, output, coefficients, history, clip):
        return reference.diffusion_step(
            x, output, coefficients, keys=keys, history=history, clip=clip
        )

    return _step(*primals), jax.jvp(of_floats, tuple(floats), tangents[:-1])[1]


@functools.partial(jax.jit, static_argnames="clips")
def _run(arrays, coefficients, words, *, clips):
    batch, size = arrays[0].shape
    draws = words is not None
    operands = alike(coefficients, *([words] if draws else []), *arrays)
    line = _LINE * _LINES if size % (_LINE * _LINES) == 0 else _LINE
    out = result((batch, size), jnp.float32, operands[0])
    return gpu.kernel(
        functools.partial(_kernel, line=line, clips=clips, draws=draws),
        name="diffusion_step",
        out_type=(out, out),
        grid=(batch, size // line),
        grid_names=("row", "line"),
    )(*operands)


def _kernel(coefficients, *refs, line, clips, draws):
    """One line of a sample. The words of keys come first, where noise is drawn."""
    words, *sources = refs[:-2] if draws else (None, *refs[:-2])
    following, x0 = refs[-2:]
    b, first = jax.lax.axis_index("row"), jax.lax.axis_index("line") * line
    place = pl.ds(first, line)
    x, output, *history = (source[b, place] for source in sources)
    *numbers, most = (coefficients[i] for i in range(coefficients.shape[0]))
    c = StepCoefficients(*numbers)
    clean = c.x0_x * x + c.x0_output * output
    if clips:
        clean = jnp.minimum(jnp.maximum(clean, -most), most)
    total = c.next_x0 * clean + c.next_x * x + c.next_output * output
    for before in history:
        total += c.next_history * before
    if draws:
        ids = first + jax.lax.broadcasted_iota(jnp.int32, (line,), 0)
        total += c.next_noise * normal_of((words[b, 0], words[b, 1]), ids)
    following[b, place], x0[b, place] = total, clean
