"""group_norm_silu against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import kernels


def definition(x, scale, bias, groups, epsilon, silu):
    x = np.asarray(x, np.float64)
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias
    return y / (1 + np.exp(-y)) if silu else y


def example(shape, dtype=jnp.float32, offset=0.0):
    keys = jax.random.split(jax.random.key(sum(shape)), 3)
    x = 2 * jax.random.normal(keys[0], shape) + offset
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[1:])
    return x.astype(dtype), scale, bias


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8, 8, 32), 8), ((1, 3, 5, 6), 3), ((3, 7, 9), 1), ((2, 4, 4, 4), 4), ((5, 1, 1, 8), 2)],
)
def test_agrees_with_the_definition(shape, groups, silu):
    x, scale, bias = example(shape)
    y = kernels.group_norm_silu(x, scale, bias, groups=groups, epsilon=1e-6, silu=silu)
    np.testing.assert_allclose(y, definition(x, scale, bias, groups, 1e-6, silu), atol=2e-5)


def test_a_large_mean_does_not_cost_digits():
    x, scale, bias = example((2, 16, 16, 8), offset=1000.0)
    y = kernels.group_norm_silu(x, scale, bias, groups=2)
    np.testing.assert_allclose(y, definition(x, scale, bias, 2, 1e-6, True), atol=2e-3)


def test_bfloat16_keeps_its_type_and_float32_statistics():
    x, scale, bias = example((2, 16, 16, 8), jnp.bfloat16, offset=30.0)
    y = kernels.group_norm_silu(x, scale, bias, groups=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), definition(x, scale, bias, 2, 1e-6, True), atol=0.05
    )


def test_gradients():
    x, scale, bias = example((2, 3, 3, 4))
    check_grads(
        lambda *a: kernels.group_norm_silu(*a, groups=2), (x, scale, bias), 1, ("rev",), rtol=0.02
    )


def test_what_it_refuses():
    x, scale, bias = example((2, 3, 3, 4))
    with pytest.raises(ValueError, match="3 groups do not divide 4 channels"):
        kernels.group_norm_silu(x, scale, bias, groups=3)
    with pytest.raises(NotImplementedError, match="no implementation 'mosaic'; available: ref"):
        kernels.group_norm_silu(x, scale, bias, groups=2, implementation="mosaic")
