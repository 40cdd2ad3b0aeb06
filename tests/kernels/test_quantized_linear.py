"""quantized_linear: quantisation, gradients, and what is refused. The rest are its cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import dispatch


def test_quantisation_takes_the_nearest_of_255_values_for_each_channel():
    weight = np.random.default_rng(0).normal(size=(37, 53)).astype(np.float32)
    weight *= 10.0 ** np.arange(-18, 19)[:, None].astype(np.float32)
    values, scale = kernels.quantize(weight)
    np.testing.assert_allclose(scale, np.abs(weight).max(1) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(values, int)).max(1) == 127).all()
    error = np.abs(values * np.asarray(scale, np.float64)[:, None] - weight)
    assert (error <= 0.5000001 * scale[:, None]).all()


def test_halves_are_rounded_to_even():
    values, scale = kernels.quantize(jnp.asarray([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]))
    np.testing.assert_array_equal(values, [[127, 0, 2, 2, 0, -2, -2, 126]])
    np.testing.assert_array_equal(scale, [1])


@pytest.mark.parametrize("number", [0.0, -0.0, 1e-44])
def test_a_channel_of_nothing_is_zero(number):
    values, scale = kernels.quantize(jnp.asarray([[number, number], [0.0, 2.0]]))
    np.testing.assert_array_equal(values, [[0, 0], [0, 127]])
    np.testing.assert_allclose(scale, [1, 2 / 127], rtol=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(number):
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = number
    with pytest.raises(ValueError, match="the weights of output channel 1 are not finite"):
        kernels.quantize(weight)
    values, scale = jax.jit(kernels.quantize)(weight)  # where nobody can look
    result = kernels.quantized_linear(jnp.ones((2, 4)), values, scale)
    np.testing.assert_array_equal(jnp.isnan(result), [[False, True, False]] * 2)


def test_the_product_is_that_of_the_quantised_weights():
    generator = np.random.default_rng(1)
    x, weight = generator.normal(size=(5, 96)), generator.normal(size=(40, 96))
    values, scale = kernels.quantize(jnp.float32(weight))
    exact = x @ (np.asarray(values) * np.asarray(scale, np.float64)[:, None]).T
    got = kernels.quantized_linear(jnp.float32(x), values, scale)
    np.testing.assert_allclose(got, exact, atol=1e-5)
    # Half a step of 127 of the largest weight, over 96 weights of random signs.
    assert 0.005 < np.std(got - x @ weight.T) / np.std(exact) < 0.02


def test_weights_and_scales_are_not_trained():
    x, (values, scale) = jnp.ones((2, 3)), kernels.quantize(jnp.ones((4, 3)))

    def total(x, scale):
        return kernels.quantized_linear(x, values, scale).sum()

    gradient = jax.jit(jax.grad(total))(x, scale)
    np.testing.assert_allclose(gradient, np.full((2, 3), 4), rtol=1e-6)
    with pytest.raises(TypeError, match="the scales of weights in int8 have no gradient"):
        jax.grad(total, argnums=1)(x, scale)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda v: kernels.quantized_linear(x, v, scale).sum())(values)


@pytest.mark.parametrize(
    ("name", "shapes", "reason"),
    [
        ("tpu", ((2, 20_000), (3, 20_000)), "tpu has room for 16,384 weights of a channel, not 20"),
        ("tpu", ((2, 3), (0, 3)), "tpu needs at least one row, one channel and one weight of each"),
        ("gpu", ((2, 96), (8, 96)), "gpu needs a multiple of 64 weights of a channel, not 96"),
        ("gpu", ((65, 64), (8, 64)), "gpu takes at most 64 rows, not 65"),
        ("gpu", ((0, 64), (8, 64)), "gpu needs at least one row, one channel"),
    ],
)
def test_what_kernels_do_not_take(name, shapes, reason):
    x, values = jnp.zeros(shapes[0]), jnp.zeros(shapes[1], jnp.int8)
    with dispatch.any_platform(), pytest.raises(dispatch.Refusal, match=reason):
        kernels.quantized_linear(x, values, jnp.ones(len(values)), implementation=name)


def test_none_of_something_is_none():
    x, values, scale = jnp.ones((2, 3)), jnp.ones((4, 3), jnp.int8), jnp.ones(4)
    assert kernels.quantized_linear(x[:0], values, scale).shape == (0, 4)
    assert kernels.quantized_linear(x, values[:0], scale[:0]).shape == (2, 0)
    np.testing.assert_array_equal(
        kernels.quantized_linear(x[:, :0], values[:, :0], scale), np.zeros((2, 4))
    )
    assert [part.shape for part in kernels.quantize(jnp.zeros((0, 3)))] == [(0, 3), (0,)]
