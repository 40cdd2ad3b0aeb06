"""Cases of group_norm_silu: any rank, one group and as many as channels, large means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.group_norm_silu import group_norm_silu
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example"]


def example(shape: tuple[int, ...], seed: int = 0, dtype="float32", offset: float = 0.0) -> tuple:
    """Features around `offset`, and float32 scale and bias."""
    generator = np.random.default_rng(seed)
    x = 2 * generator.normal(size=shape) + offset
    scale, bias = generator.normal(size=(2, shape[-1])).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(scale), jnp.asarray(bias)


def _definition(x, scale, bias, *, groups, epsilon=1e-6, silu=True):
    x = np.asarray(x, np.float64)
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    y = y * np.asarray(scale) + np.asarray(bias)
    return y / (1 + np.exp(-y)) if silu else y


def _grouped(x, scale, bias, *, groups, epsilon=1e-6):
    """The formula as it is written, with one reduction over two axes."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    normalised = jax.nn.standardize(grouped, axis=(1, 3), epsilon=epsilon)
    places = (1,) * (x.ndim - 1) + (-1,)
    return jax.nn.silu(normalised.reshape(x.shape) * scale.reshape(places) + bias.reshape(places))


def _case(
    name,
    shape,
    groups,
    atol=2e-5,
    silu=True,
    epsilon=1e-6,
    gradient=(),
    dtype="float32",
    offset=0.0,
    large=False,
):
    options = {"groups": groups, "silu": silu, "epsilon": epsilon}
    arguments = functools.partial(example, shape, dtype=dtype, offset=offset)
    return Case(name, arguments, options, atol=atol, dtype=dtype, gradient=gradient, large=large)


_SHAPES = (
    ((2, 8, 8, 32), 8),
    ((1, 3, 5, 6), 3),
    ((3, 7, 9), 1),
    ((2, 4, 4, 4), 4),
    ((5, 1, 1, 8), 2),
)

SUITES = (
    Suite(
        "group_norm_silu",
        group_norm_silu,
        cases=(
            *(
                _case(
                    f"{shape} in {groups}{'' if silu else ', no SiLU'}",
                    shape,
                    groups,
                    silu=silu,
                    large=silu or groups != 4,
                )
                for shape, groups in _SHAPES
                for silu in (True, False)
            ),
            _case("gradients", (2, 3, 3, 4), 2, gradient=(0, 1, 2), large=True),
            _case("gradients of a rest", (1, 5, 17, 16), 8, gradient=(0, 1, 2)),
            _case(
                "gradients without SiLU", (1, 64, 8), 2, silu=False, gradient=(0, 1, 2), large=True
            ),
            _case("a large mean", (2, 16, 16, 8), 2, atol=2e-3, offset=1000.0),
            _case("bfloat16", (2, 16, 16, 8), 2, atol=0.05, dtype="bfloat16", offset=30.0),
            _case("another epsilon", (2, 4, 4, 4), 2, epsilon=0.5, large=True),
        ),
        timed=tuple(
            Case(
                f"{batch} x {side} x {side}, {channels} in 32",
                functools.partial(example, (batch, side, side, channels)),
                {"groups": 32},
                atol=1e-4,
            )
            for batch in (1, 16)
            for side, channels in ((32, 128), (16, 256), (8, 256))
        ),
        definition=_definition,
        peers={"grouped": _grouped},
        estimated=tuple(
            _case(
                f"{batch} x {side} x {side}, {channels} in 32, {dtype}",
                (batch, side, side, channels),
                32,
                atol=0.05 if dtype == "bfloat16" else 1e-4,
                dtype=dtype,
            )
            for batch, side, channels, dtype in (
                (64, 32, 128, "bfloat16"),
                (64, 32, 128, "float32"),
                (1, 32, 128, "bfloat16"),
                (64, 16, 256, "bfloat16"),
            )
        ),
    ),
)
