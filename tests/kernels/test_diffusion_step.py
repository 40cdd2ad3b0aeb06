"""diffusion_step: noise that depends only on the key. The formula is in its cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import dispatch

X, OUTPUT = np.random.default_rng(0).normal(size=(2, 6, 4, 4, 3)).astype(np.float32)
COEFFICIENTS = kernels.StepCoefficients(1.5, -0.7, 0.6, 0.3, -0.2, 0.4, 0.9)


@jax.jit
def step(x, output, keys):
    return kernels.diffusion_step(x, output, COEFFICIENTS, keys=keys)


def test_noise_is_standard_normal_and_scaled():
    x = jnp.zeros((6, 64, 64, 3))
    noise, _ = step(x, x, jax.random.split(jax.random.key(9), 6))
    noise = np.asarray(noise) / 0.9
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    assert len({row.tobytes() for row in noise}) == 6


def test_noise_of_a_sample_does_not_know_its_batch():
    keys = jax.random.split(jax.random.key(9), 6)
    whole, _ = step(X, OUTPUT, keys)
    for size in (1, 5):
        part, _ = step(X[:size], OUTPUT[:size], keys[:size])
        np.testing.assert_array_equal(part, whole[:size])


def test_unknown_implementation():
    with pytest.raises(NotImplementedError, match="known: reference"):
        kernels.diffusion_step(X, OUTPUT, COEFFICIENTS, implementation="mosaic")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"coefficients": COEFFICIENTS._replace(x0_x=jnp.ones((6, 1, 1, 1)))}, "needs coeffic"),
        ({"x": X.astype(np.float16)}, "needs float32, not float16"),
        ({"x": X[:0], "output": OUTPUT[:0]}, "needs at least one value"),
        ({"keys": jax.random.split(jax.random.key(0, impl="rbg"), 6)}, "knows threefry keys, not "),
    ],
)
def test_what_the_kernel_for_gpus_refuses(changes, reason):
    arguments = {"x": X, "output": OUTPUT, "coefficients": COEFFICIENTS, **changes}
    with dispatch.any_platform(), pytest.raises(dispatch.Refusal, match=f"gpu {reason}"):
        kernels.diffusion_step(**arguments, implementation="gpu")
