"""Muon against optax's, and the law of its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from gen_jax.muon import muon, orthogonalise


def matrix(rows, columns, condition, seed=0):
    """A matrix whose singular values fall from 1 to 1 / condition."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    return jnp.asarray((left * np.geomspace(1, 1 / condition, len(right))) @ right, jnp.float32)


def axes(tree):
    def of(leaf):
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(of, tree)


@pytest.mark.parametrize("condition", [1, 30, 1e3, 1e9])
def test_it_is_the_iteration_of_optax(condition):
    """Tall, wide, square, and kernels of convolutions, some with the same smaller side."""
    tree = {
        "tall": matrix(96, 8, condition),
        "wide": matrix(8, 40, condition, 1),
        "square": matrix(24, 24, condition, 2),
        "kernel": 1e-6 * matrix(9 * 5, 24, condition, 3).reshape(3, 3, 5, 24),
    }
    theirs = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=axes, eps=0.0
    )
    expected, _ = theirs.update(tree, theirs.init(tree))
    for name, ours in orthogonalise(tree).items():
        assert ours.shape == tree[name].shape
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=5e-3 * scale)


def test_singular_values_are_about_one():
    result = orthogonalise([matrix(64, 32, 100), matrix(32, 64, 100, 1)])
    for leaf in result:
        singular = np.linalg.svd(leaf, compute_uv=False)
        assert 0.65 < singular.min() < singular.max() < 1.25


def test_what_has_no_gradient_stays():
    tree = {"zeros": jnp.zeros((6, 4)), "kernel": jnp.zeros((3, 3, 2, 4))}
    assert all(not leaf.any() for leaf in orthogonalise(tree).values())
    for scale in (1e-20, 1e-22, 1e-30, 1e-44):
        assert not orthogonalise([jnp.full((6, 4), scale)])[0].any()
    rank_one = orthogonalise([jnp.outer(jnp.arange(6.0), jnp.ones(4))])[0]
    np.testing.assert_allclose(np.linalg.svd(rank_one, compute_uv=False)[1:], 0, atol=1e-3)


def test_its_steps_are_those_of_optax():
    """All but exactly: optax corrects the bias of its momentum, which tells in the first steps."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(3), "kernel": jnp.ones((3, 3, 2, 2))}

    def numbers(tree):
        return jax.tree.map(lambda leaf: axes(leaf) if leaf.ndim in (2, 4) else None, tree)

    rate = optax.linear_schedule(0.1, 0.05, 10)
    ours = muon(rate, beta1=0.8, beta2=0.95, weight_decay=0.5)
    theirs = optax.contrib.muon(
        rate,
        weight_decay=0.5,
        adam_b1=0.8,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )
    states = ours.init(params), theirs.init(params)
    updates = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(40):
        gradients = {
            name: np.float32(rng.normal(0.3, 1, leaf.shape)) for name, leaf in params.items()
        }
        update, first = updates[0](gradients, states[0], params)
        expected, second = updates[1](gradients, states[1], params)
        states = first, second
        for name, tolerance in (("b", 1e-6), ("w", 0.1), ("kernel", 0.1)):
            if step in (0, 39):
                exact = step == 0 or name == "b"
                size = np.abs(expected[name]).max()
                bound = (1e-4 if exact else tolerance) * size
                np.testing.assert_allclose(update[name], expected[name], atol=bound)
