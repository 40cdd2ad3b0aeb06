"""group_norm_silu: gradients by differences, and what it refuses. The rest are its cases."""

import functools

import jax
import pytest
from jax.test_util import check_grads

import kernels
from kernels.group_norm_silu.cases import example


def test_gradients():
    run = jax.jit(functools.partial(kernels.group_norm_silu, groups=2))
    check_grads(run, example((2, 3, 3, 4)), 1, ("rev",), rtol=0.02)


def test_what_it_refuses():
    x, scale, bias = example((2, 3, 3, 4))
    with pytest.raises(ValueError, match="3 groups do not divide 4 channels"):
        kernels.group_norm_silu(x, scale, bias, groups=3)
    with pytest.raises(NotImplementedError, match="no implementation 'mosaic'; known: ref"):
        kernels.group_norm_silu(x, scale, bias, groups=2, implementation="mosaic")
