"""Cases of conv_3x3: small and odd sizes, and the sizes of DDPM's CIFAR-10 network."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels.conv_3x3 import conv_3x3
from kernels.conv_3x3.winograd import transform_kernel
from kernels.testing import Case, Suite

__all__ = ["SUITES", "convolution_by_shifts", "example"]


def example(
    batch: int,
    height: int,
    width: int,
    channels: int,
    channels_out: int,
    seed: int = 0,
    dtype: str = "float32",
    read: bool = False,
) -> tuple:
    """Features and weights, and with `read` the transformed weights, on any platform."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(batch, height, width, channels)).astype(np.float32)
    kernel = generator.normal(size=(3, 3, channels, channels_out)) / (9 * channels) ** 0.5
    kernel = kernel.astype(np.float32)
    if read:
        return jnp.asarray(x), jnp.asarray(kernel), transform_kernel(kernel)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def convolution_by_shifts(x, kernel):
    """The definition in float64: a sum over nine shifts of the padded features."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def _definition(x, kernel, prepared=None):
    return convolution_by_shifts(x, kernel)


def _case(name, *shape, atol=2e-5, dtype="float32", read=False, gradient=()):
    arguments = functools.partial(example, *shape, dtype=dtype, read=read)
    return Case(name, arguments, atol=atol, dtype=dtype, gradient=gradient)


_TIMED = (
    (32, 128, 128),
    (32, 384, 128),
    (16, 256, 256),
    (16, 512, 256),
    (8, 512, 256),
    (4, 512, 256),
    (2, 256, 256),
)  # height = width, C, Cout

SUITES = (
    Suite(
        "conv_3x3",
        conv_3x3,
        cases=(
            _case("one pixel in, one out", 1, 2, 2, 1, 1),
            _case("4 x 6", 3, 4, 6, 5, 7, gradient=(0, 1)),
            _case("8 x 8", 2, 8, 8, 16, 3),
            _case("several slices", 5, 32, 32, 4, 8),
            _case("gradient in slices", 6, 32, 32, 32, 4, atol=1e-4, gradient=(0, 1)),
            _case("gradient, odd sizes", 3, 5, 7, 2, 4, gradient=(0, 1)),
            _case("prepared", 2, 8, 8, 6, 4, read=True),
            _case("odd sizes", 2, 5, 4, 3, 3),
            _case("odd sizes, prepared", 2, 7, 9, 3, 5, read=True),
            _case("2 x 2", 3, 2, 2, 5, 4, gradient=(0, 1)),
            _case("1 x 2", 2, 1, 2, 3, 4, gradient=(0, 1)),
            _case("one position", 1, 1, 1, 3, 4, gradient=(0, 1)),
            _case("bfloat16", 2, 4, 4, 6, 4, dtype="bfloat16", atol=0.03),
        ),
        timed=tuple(
            _case(
                f"{batch} x {side} x {side}, {channels} to {channels_out}",
                *(batch, side, side, channels, channels_out),
                read=True,
                atol=1e-4,
            )
            for batch in (1, 16)
            for side, channels, channels_out in _TIMED
        ),
        definition=_definition,
    ),
)
