"""Counts of operations are those of closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from gen_jax import operations

X, W = np.ones((4, 6), np.float32), np.ones((6, 5), np.float32)
IMAGE, KERNEL = np.ones((2, 8, 6, 3), np.float32), np.ones((3, 3, 3, 7), np.float32)
ONE = 2 * 4 * 6 * 5
DIRECT = 2 * 9 * 3 * 7 * 2 * 8 * 6


def product(x, w):
    return jnp.tanh(x @ w)


def add(total, x, w):
    return total + product(x, w).sum()


def until_nine(x, w):
    return jax.lax.while_loop(lambda total: total < 9, lambda total: add(total, x, w), 0.0)


def conv(x, kernel, **options):
    return kernels.conv_3x3(x, kernel, **options)


@pytest.mark.parametrize(
    ("f", "arguments", "expected"),
    [
        (lambda x: jnp.sin(x).sum(), (X,), 0),
        (product, (X, W), ONE),
        (jax.jit(product), (X, W), ONE),
        (jax.checkpoint(product), (X, W), ONE),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (X[None], W[None]), ONE),
        (jax.grad(lambda x, w: product(x, w).sum(), (0, 1)), (X, W), 3 * ONE),
        (lambda x, w: jax.lax.scan(lambda c, _: (add(c, x, w), 0), 0.0, length=9), (X, W), 9 * ONE),
        (lambda x, w: jax.lax.fori_loop(2, 5, lambda i, c: add(c, x, w), 0.0), (X, W), 3 * ONE),
        (
            lambda x, w: jax.lax.while_loop(lambda c: c < 9, lambda c: add(c, x, w), 0.0),
            (X, W),
            ONE,
        ),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w * 2), (X, W), ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: 0.0, lambda: (x @ w).sum()), (X, W), ONE),
        (conv, (IMAGE, KERNEL), DIRECT),
        (jax.grad(lambda x, k: conv(x, k).sum(), (0, 1)), (IMAGE, KERNEL), 3 * DIRECT),
    ],
)
def test_counts(f, arguments, expected):
    assert operations.count(f, *arguments) == expected


@pytest.mark.parametrize("implementation", ["reference", "sliced"])
def test_gradients_of_a_convolution_are_counted_alike(implementation):
    def total(x, kernel):
        return conv(x, kernel, implementation=implementation).sum()

    program = jax.value_and_grad(total, (0, 1))
    assert operations.count(program, IMAGE, KERNEL) == 3 * DIRECT
    large = np.ones((6, 64, 64, 32), np.float32), np.ones((3, 3, 32, 1), np.float32)
    assert operations.count(program, *large) == 3 * 2 * 9 * 32 * 6 * 64 * 64  # in slices


def test_groups_strides_and_dilations():
    def run(x, kernel, **options):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    x, kernel = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 2, 6), np.float32)
    grouped = {"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 2}
    count = operations.count(lambda x, kernel: run(x, kernel, **grouped), x, kernel)
    assert count == 2 * 9 * 2 * 6 * 4 * 4
    kernel = np.ones((2, 2, 4, 6), np.float32)
    dilated = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)}
    count = operations.count(lambda x, kernel: run(x, kernel, **dilated), x, kernel)
    assert count == 2 * 4 * 4 * 6 * 16 * 16 // 4
