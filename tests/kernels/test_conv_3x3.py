"""conv_3x3: Winograd's algorithm, prepared weights and where they are read, and the gradients."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import kernels
from kernels.conv_3x3 import sliced, winograd
from kernels.conv_3x3.cases import convolution_by_shifts, example


def test_slices_of_a_batch_do_not_change_it(monkeypatch):
    def run(x, kernel):
        return kernels.conv_3x3(x, kernel, implementation="winograd")

    x, kernel = example(8, 8, 8, 4, 4)
    whole = jax.jit(run)(x, kernel)
    monkeypatch.setattr(winograd, "_TILES", 8)  # two images of 4 tiles
    for batch in (1, 6, 7, 8):
        part = jax.jit(lambda x, kernel: run(x, kernel))(x[:batch], kernel)
        np.testing.assert_allclose(part, whole[:batch], atol=5e-6)


@pytest.mark.parametrize(("images", "taken"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, None)])
def test_the_gradient_of_the_weights_does_not_change_with_slices(monkeypatch, images, taken):
    x, cotangent = example(6, 4, 6, 3, 5)[0], example(6, 4, 6, 5, 3, seed=1)[0]
    monkeypatch.setattr(sliced, "_FLOATS", images * x[0].size)
    text = str(jax.make_jaxpr(lambda *both: sliced._by_kernel(*both))(x, cotangent))
    assert ("dynamic_slice" in text) == (taken is not None)
    assert taken is None or f"slice_sizes=({taken}, 4, 6, 3)" in text
    reference = functools.partial(kernels.conv_3x3, implementation="reference")
    _, pull = jax.vjp(lambda kernel: reference(x, kernel), jnp.zeros((3, 3, 3, 5)))
    np.testing.assert_allclose(sliced._by_kernel(x, cotangent), *pull(cotangent), atol=2e-5)


def test_the_gradient_on_a_cpu_has_a_gradient():
    x, kernel = example(2, 4, 4, 2, 3)
    run = functools.partial(kernels.conv_3x3, implementation="sliced")
    jax.test_util.check_grads(run, (x, kernel), order=2, modes=["rev"])


def test_a_program_for_one_platform_has_the_gradient_of_that_platform():
    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sin(kernels.conv_3x3(x, kernel)).sum())(kernel)

    traced = jax.jit(gradient).trace(*example(2, 8, 8, 4, 4))
    for platform, convolutions in (("cpu", 1), ("cuda", 2), ("tpu", 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform


def test_prepared_weights_are_the_same_convolution():
    x, kernel = example(2, 8, 8, 128, 128)
    prepared = kernels.prepare_conv_3x3(kernel)
    if jax.default_backend() != "cpu":
        assert prepared is None
        return
    assert prepared.shape == (36, 128, 128)
    run = jax.jit(kernels.conv_3x3)
    y = run(x, kernel, prepared)
    np.testing.assert_allclose(y, run(x, kernel), atol=3e-5)
    # On a CPU the prepared weights are what is read.
    np.testing.assert_array_equal(run(x, jnp.zeros_like(kernel), prepared), y)


def test_unprepared_or_small_convolutions_are_direct():
    for channels, prepare in ((128, False), (16, True)):
        x, kernel = example(1, 8, 8, channels, channels)
        prepared = kernels.prepare_conv_3x3(kernel) if prepare else None
        assert prepared is None
        text = jax.jit(kernels.conv_3x3).lower(x, kernel, prepared).as_text()
        assert text.count("stablehlo.convolution") == 1


def test_other_platforms_take_the_weights_as_they_are():
    traced = jax.jit(kernels.conv_3x3).trace(*example(2, 8, 8, 16, 16, read=True))
    for platform, convolutions in (("cpu", 0), ("cuda", 1), ("rocm", 1), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform


def test_rounding_is_about_that_of_the_direct_sum():
    x, kernel = example(2, 32, 32, 256, 8)
    exact = convolution_by_shifts(x, kernel)
    errors = {
        name: np.sqrt(np.square(run(x, kernel, implementation=name) - exact).mean())
        for name in ("reference", "winograd")
        for run in [jax.jit(kernels.conv_3x3, static_argnames="implementation")]
    }
    assert exact.std() == pytest.approx(1, rel=0.1)
    assert errors["winograd"] < 1.5e-6
    assert errors["winograd"] < 8 * errors["reference"]


def test_small_maps_are_one_product_even_when_prepared():
    for batch, products in ((2, 1), (1, 0)):  # the matrix of a single map is large for one product
        arguments = example(batch, 2, 2, 512, 512, read=True)
        text = jax.jit(kernels.conv_3x3).lower(*arguments).as_text()
        assert text.count("stablehlo.convolution") == 0
        assert ("contracting_dims = [1] x [0]" in text) == products


def test_what_it_refuses():
    run = functools.partial(kernels.conv_3x3, implementation="winograd")
    with pytest.raises(NotImplementedError, match="dense needs maps of at most 2 x 2, not 1 x 4"):
        kernels.conv_3x3(*example(1, 1, 4, 2, 2), implementation="dense")
    with pytest.raises(NotImplementedError, match="needs float32, not bfloat16"):
        run(*example(1, 4, 4, 2, 2, dtype="bfloat16"))
    with pytest.raises(NotImplementedError, match="known: reference, dense, sliced, winograd"):
        kernels.conv_3x3(*example(1, 4, 4, 2, 2), implementation="mosaic")
