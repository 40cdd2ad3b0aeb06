"""Cases of quantized_linear: sizes that fill no block, and values at the edges of their types."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels.quantized_linear import quantize, quantized_linear
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example"]


def example(
    rows: int, width: int, channels: int, seed: int = 0, dtype: str = "float32", scale: float = 1.0
) -> tuple:
    """Values of about this size, and a matrix with channels of very different sizes.

    The last channel is of zeros.
    """
    generator = np.random.default_rng(seed)
    x = scale * generator.normal(size=(rows, width))
    weight = generator.normal(size=(channels, width)) / width**0.5
    weight *= 10.0 ** generator.uniform(-3, 1, (channels, 1))
    weight[-1] = 0
    return jnp.asarray(x, dtype), *quantize(jnp.asarray(weight, jnp.float32))


def _not_finite(rows, width, channels, seed, dtype="float32"):
    """Rows that have a NaN, an infinity, both infinities, and nothing of that."""
    x, weight, scale = example(rows, width, channels, seed, dtype)
    x = x.at[0, 1].set(jnp.nan).at[1, 0].set(jnp.inf).at[2, 2].set(-jnp.inf)
    return x.at[2, width - 1].set(jnp.inf), weight, scale


def _extreme(rows, width, channels, seed):
    """All weights are -127 or 127, all products large, and what float32 rounds is in the sums."""
    x, _, scale = example(rows, width, channels, seed, scale=1e30)
    signs = np.random.default_rng(seed).choice([-127, 127], (channels, width))
    return x, jnp.asarray(signs, jnp.int8), scale / 1e30


def _sizes_only(rows, width, channels, dtype, seed):
    x = jnp.zeros((rows, width), dtype)
    return x, jnp.ones((channels, width), jnp.int8), jnp.ones(channels)


def _definition(x, weight, scale):
    x, weight, scale = (np.asarray(array, np.float64) for array in (x, weight, scale))
    with np.errstate(invalid="ignore"):
        return (x @ weight.T) * scale[None]


def _case(name, *shape, gradient=(), large=False, arguments=example, **options):
    made = functools.partial(arguments, *shape, **options)
    return Case(name, made, atol=3e-5, rtol=3e-5, gradient=gradient, large=large)


SUITES = (
    Suite(
        "quantized_linear",
        quantized_linear,
        cases=(
            _case("one of one", 1, 1, 1),
            _case("primes", 3, 13, 7),
            _case("primes beyond blocks", 131, 131, 1031, large=True),
            _case("one row", 1, 128, 300),
            _case("8 rows, bfloat16", 8, 256, 384, dtype="bfloat16"),
            _case("blocks of rows", 300, 64, 200, dtype="bfloat16", large=True),
            _case("not finite", 4, 64, 130, arguments=_not_finite),
            _case("not finite, bfloat16", 4, 64, 130, dtype="bfloat16", arguments=_not_finite),
            _case("extreme", 5, 192, 160, arguments=_extreme),
            _case("gradients", 6, 64, 130, gradient=(0,)),
        ),
        definition=_definition,
        timed=tuple(
            _case(f"batch {batch}, {width} to {channels}", batch, width, channels)
            for batch, width, channels in ((1, 768, 50257), (1, 768, 3072), (64, 768, 3072))
        ),
        estimated=tuple(
            _case(
                f"batch {batch}, {width} to {channels}, {dtype}",
                batch,
                width,
                channels,
                dtype,
                arguments=_sizes_only,
            )
            for batch, width, channels, dtype in (
                (1, 768, 50257, "bfloat16"),
                (64, 768, 50257, "bfloat16"),
                (1, 768, 2304, "bfloat16"),
                (1, 3072, 768, "bfloat16"),
                (64, 3072, 768, "bfloat16"),
                (64, 768, 50257, "float32"),
            )
        ),
    ),
)
