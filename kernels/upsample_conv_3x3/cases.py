"""Cases of upsample_conv_3x3: one pixel, odd and unequal sides, and the sizes of UNets."""

import functools

import numpy as np

from kernels.conv_3x3.cases import convolution_by_shifts, example
from kernels.testing import Case, Suite
from kernels.upsample_conv_3x3 import upsample_conv_3x3

__all__ = ["SUITES"]


def _definition(x, kernel):
    return convolution_by_shifts(np.repeat(np.repeat(np.asarray(x), 2, 1), 2, 2), kernel)


def _case(name, *shape, atol=2e-5, dtype="float32", gradient=()):
    arguments = functools.partial(example, *shape, dtype=dtype)
    return Case(name, arguments, atol=atol, dtype=dtype, gradient=gradient)


SUITES = (
    Suite(
        "upsample_conv_3x3",
        upsample_conv_3x3,
        cases=(
            _case("one pixel", 2, 1, 1, 3, 5, gradient=(0, 1)),
            _case("3 x 5", 2, 3, 5, 4, 2, gradient=(0, 1)),
            _case("8 x 8", 2, 8, 8, 16, 8),
            _case("bfloat16", 2, 4, 4, 6, 4, dtype="bfloat16", atol=0.03),
        ),
        timed=tuple(
            _case(
                f"{batch} x {side} x {side}, {channels} to {channels}",
                *(batch, side, side, channels, channels),
                atol=1e-4,
            )
            for batch in (1, 16)
            for side, channels in ((4, 64), (4, 256), (8, 256), (16, 256))
        ),
        definition=_definition,
    ),
)
