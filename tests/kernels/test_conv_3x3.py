"""conv_3x3: Winograd's algorithm is the direct sum, for any size and however it is sliced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.conv_3x3 import winograd


def example(batch, height, width, channels, channels_out):
    keys = jax.random.split(jax.random.key(height * channels), 2)
    x = jax.random.normal(keys[0], (batch, height, width, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, channels_out)) / (9 * channels) ** 0.5
    return x, kernel


def direct_sum(x, kernel):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.mark.parametrize("implementation", ["reference", "winograd"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1, 1), (3, 4, 6, 5, 7), (2, 8, 8, 16, 3), (5, 16, 16, 4, 8)]
)
def test_agrees_with_the_direct_sum(shape, implementation):
    x, kernel = example(*shape)
    y = kernels.conv_3x3(x, kernel, implementation=implementation)
    np.testing.assert_allclose(y, direct_sum(x, kernel), atol=2e-5)


@pytest.mark.parametrize("batch", [1, 6, 7, 8])
def test_slices_of_a_batch_do_not_change_it(batch, monkeypatch):
    x, kernel = example(batch, 8, 8, 4, 4)
    whole = kernels.conv_3x3(x, kernel, implementation="winograd")
    monkeypatch.setattr(winograd, "_TILES", 32)  # two images of 16 tiles
    sliced = kernels.conv_3x3(x, kernel, implementation="winograd")
    np.testing.assert_allclose(sliced, whole, atol=1e-6)


def test_prepared_weights_are_the_same_convolution():
    x, kernel = example(2, 8, 8, 128, 128)
    prepared = kernels.prepare_conv_3x3(kernel)
    assert prepared.shape == (16, 128, 128)
    y = jax.jit(kernels.conv_3x3)(x, kernel, prepared)
    np.testing.assert_allclose(y, direct_sum(x, kernel), atol=3e-5)
    # On a CPU the prepared weights are what is read.
    wrong = jax.jit(kernels.conv_3x3)(x, jnp.zeros_like(kernel), prepared)
    assert (np.abs(wrong - y).max() == 0) == (jax.default_backend() == "cpu")


def test_unprepared_or_small_convolutions_are_direct():
    for channels, prepare in ((128, False), (64, True)):
        x, kernel = example(1, 8, 8, channels, channels)
        prepared = kernels.prepare_conv_3x3(kernel) if prepare else None
        assert prepared is None
        text = jax.jit(kernels.conv_3x3).lower(x, kernel, prepared).as_text()
        assert text.count("stablehlo.convolution") == 1


def test_other_platforms_take_the_weights_as_they_are():
    x, kernel = example(2, 8, 8, 128, 128)
    prepared = kernels.prepare_conv_3x3(kernel)
    traced = jax.jit(kernels.conv_3x3).trace(x, kernel, prepared)
    for platform, convolutions in (("cpu", 0), ("cuda", 1), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform


def test_what_it_refuses():
    x, kernel = example(1, 5, 4, 2, 2)
    with pytest.raises(NotImplementedError, match="even height and width, not 5 x 4"):
        kernels.conv_3x3(x, kernel, implementation="winograd")
    x, kernel = (a.astype(jnp.bfloat16) for a in example(1, 4, 4, 2, 2))
    with pytest.raises(NotImplementedError, match="needs float32, not bfloat16"):
        kernels.conv_3x3(x, kernel, implementation="winograd")
    with pytest.raises(NotImplementedError, match="available: reference, winograd"):
        kernels.conv_3x3(x, kernel, implementation="mosaic")
