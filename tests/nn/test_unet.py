"""The UNet: its size, its inputs, and what its output may depend on."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.nn.config import UNetConfig
from gen_jax.nn.layers import sinusoidal_embedding
from gen_jax.nn.unet import Denoiser, UNet

pytestmark = pytest.mark.usefixtures("quick_compile")

# A bound method would compile anew in every test; equal networks share this one's programs.
apply = jax.jit(lambda network, *arguments: network(*arguments), static_argnums=0)
SMALL = UNetConfig(widths=(8, 16), blocks=1, attention=(4,), groups=4, dropout=0.5)
X = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
T = jnp.array([0, 10, 999])


def random_params(config, size=8):
    """Parameters with nothing left at zero."""
    params = Denoiser(config).init(jax.random.key(1), size, size)
    leaves, tree = jax.tree.flatten(params)
    generator = np.random.default_rng(2)
    noisy = [leaf + 0.1 * generator.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, noisy)


def test_the_paper_network_has_its_35_7_million_parameters():
    shapes = jax.eval_shape(
        lambda: UNet(UNetConfig()).init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,))
        )
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307


def test_a_fresh_network_predicts_zero():
    params = Denoiser(SMALL).init(jax.random.key(0), 8, 8)
    assert (apply(Denoiser(SMALL), params, X, T) == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 2, "head_width": 4, "out_channels": 6, "classes": 5},
        {"blocks": 2, "widths": (8, 8, 12), "attention": ()},
    ],
)
def test_every_parameter_has_a_gradient(change):
    config = dataclasses.replace(SMALL, **change)
    network, params = Denoiser(config), random_params(config)
    label = jnp.array([0, 4, -1]) if config.classes else None

    @jax.jit
    def energy(params):
        y = network(params, X, T, label)
        assert y.shape == (3, 8, 8, config.out_channels)
        assert y.dtype == jnp.float32
        return jnp.square(y).sum()

    gradients = jax.jit(jax.grad(energy))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_samples_do_not_see_each_other():
    network, params = Denoiser(SMALL), random_params(SMALL)
    jacobian = jax.jacobian(lambda x: apply(network, params, x, T)[0].sum())(X)
    assert np.abs(jacobian[0]).max() > 0
    assert np.abs(jacobian[1:]).max() == 0


def test_no_label_is_the_last_row_of_the_table():
    config = dataclasses.replace(SMALL, classes=5)
    network, params = Denoiser(config), random_params(config)
    unlabelled = apply(network, params, X, T)
    np.testing.assert_array_equal(apply(network, params, X, T, jnp.full(3, -1)), unlabelled)
    assert np.abs(apply(network, params, X, T, jnp.zeros(3, jnp.int32)) - unlabelled).max() > 1e-3


def test_dropout_hangs_on_the_key_of_the_sample_alone():
    network, params = Denoiser(SMALL), random_params(SMALL)
    keys = jax.random.split(jax.random.key(5), 3)
    whole = apply(network, params, X, T, None, keys)
    alone = apply(network, params, X[1:2], T[1:2], None, keys[1:2])
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    assert np.abs(whole - apply(network, params, X, T)).max() > 1e-2
    assert np.abs(whole - apply(network, params, X, T, None, keys[::-1])).max() > 1e-2


def test_dropout_keeps_the_mean():
    from gen_jax.nn.layers import Dropout

    keys = jax.random.split(jax.random.key(0), 20_000)
    y = Dropout(0.3).apply({}, jnp.ones((20_000, 4)), keys)
    assert set(np.unique(y).round(5)) == {0.0, np.float32(1 / 0.7).round(5)}
    np.testing.assert_allclose(y.mean(axis=0), 1, atol=4 * np.sqrt(0.3 / 0.7 / 20_000))


def test_bfloat16_is_close_to_float32():
    params = random_params(SMALL)
    exact = apply(Denoiser(SMALL), params, X, T)
    rough = apply(Denoiser(dataclasses.replace(SMALL, dtype="bfloat16")), params, X, T)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


def test_embedding_has_the_papers_frequencies():
    t, width = np.array([0.0, 1.0, 250.0]), 8
    rows = [[np.sin(s * 10 ** (-4 * k / 3)) for k in range(4)] for s in t]
    columns = [[np.cos(s * 10 ** (-4 * k / 3)) for k in range(4)] for s in t]
    expected = np.concatenate([rows, columns], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.array(t), width), expected, atol=2e-5)


def test_what_it_refuses():
    network, params = Denoiser(SMALL), random_params(SMALL)
    with pytest.raises(ValueError, match="3 channels"):
        apply(network, params, X[..., :1], T)
    with pytest.raises(ValueError, match="multiples of 2"):
        apply(network, params, X[:, :7, :7], T)
    with pytest.raises(ValueError, match="without classes"):
        apply(network, params, X, T, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="must divide every width"):
        UNetConfig(widths=(8, 12), groups=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_parameters_are_the_same_network(dtype):
    config = dataclasses.replace(SMALL, widths=(4, 128), dtype=dtype)
    network, params = Denoiser(config), random_params(config)
    prepared = jax.jit(network.prepare)(params)
    expected, got = apply(network, params, X, T), apply(network, prepared, X, T)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=(1e-5 if dtype == "float32" else 0) * scale)
    names = {"/".join(path) for path in flax.traverse_util.flatten_dict(prepared.params)}
    assert names == {"/".join(path) for path in flax.traverse_util.flatten_dict(params)}
