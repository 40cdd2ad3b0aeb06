"""diffusion_step: the affine update, its clipping, and noise that hangs on the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels

X, OUTPUT, HISTORY = (
    jax.random.normal(jax.random.key(i), (6, 4, 4, 3)) for i in range(3)
)  # fmt: skip
COEFFICIENTS = kernels.StepCoefficients(1.5, -0.7, 0.6, 0.3, -0.2, 0.4, 0.9)
KEYS = jax.random.split(jax.random.key(9), 6)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("history", [None, HISTORY])
def test_the_update_is_the_formula(clip, history):
    following, x0 = kernels.diffusion_step(X, OUTPUT, COEFFICIENTS, history=history, clip=clip)
    expected = 1.5 * X - 0.7 * OUTPUT
    expected = expected if clip is None else jnp.clip(expected, -clip, clip)
    np.testing.assert_allclose(x0, expected, atol=1e-6)
    expected = 0.6 * expected + 0.3 * X - 0.2 * OUTPUT
    expected = expected if history is None else expected + 0.4 * history
    np.testing.assert_allclose(following, expected, atol=1e-6)


def test_noise_is_standard_normal_and_scaled():
    x = jnp.zeros((6, 64, 64, 3))
    noise, _ = kernels.diffusion_step(x, x, COEFFICIENTS, keys=KEYS)
    noise = np.asarray(noise) / 0.9
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    assert len({row.tobytes() for row in noise}) == 6


def test_noise_of_a_sample_does_not_know_its_batch():
    whole, _ = kernels.diffusion_step(X, OUTPUT, COEFFICIENTS, keys=KEYS)
    for size in (1, 2, 5):
        part, _ = kernels.diffusion_step(X[:size], OUTPUT[:size], COEFFICIENTS, keys=KEYS[:size])
        np.testing.assert_array_equal(part, whole[:size])


def test_unknown_implementation():
    with pytest.raises(NotImplementedError, match="available: reference"):
        kernels.diffusion_step(X, OUTPUT, COEFFICIENTS, implementation="tpu")
