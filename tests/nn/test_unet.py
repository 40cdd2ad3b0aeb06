"""The UNet: its size, its inputs, and what its output may depend on."""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.nn.config import UNetConfig
from gen_jax.nn.layers import Dropout, sinusoidal_embedding
from gen_jax.nn.unet import UNetNetwork

SMALL = UNetNetwork(UNetConfig(widths=(8, 16), blocks=1, attention=(4,), groups=4, dropout=0.5))


def variant(**changes):
    return UNetNetwork(dataclasses.replace(SMALL.config, **changes))


# Few networks with few programs, which tests share: compiling takes nearly all the time here.
FOLDED = variant(patch=2, head_width=4, out_channels=6, classes=5)
DEEP = variant(blocks=2, widths=(8, 12), attention=())
FLAT = variant(widths=(8,), attention=())
X = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
T = jnp.array([0, 10, 999])
LABEL = jnp.array([0, 4, -1])
ONES = jnp.ones(3)

apply = jax.jit(lambda network, *arguments: network(*arguments), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(network, params, x, label, weights):
    """The outputs, and the gradients by parameters and images of their weighted squared sum."""

    def energy(params, x):
        y = network(params, x, T, label)
        return (weights[:, None, None, None] * jnp.square(y)).sum(), y

    return jax.grad(energy, (0, 1), has_aux=True)(params, x)[::-1]


@functools.cache
def random_params(network, size=8):
    """Parameters of order 1 / sqrt(fan in), with nothing left at zero or one."""
    shapes = jax.eval_shape(lambda key: network.init(key, size, size), jax.random.key(0))
    generator = np.random.default_rng(2)

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape)
        if leaf.ndim == 1:
            noise = 0.1 * noise + (path[-1].key == "scale")
        else:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_the_paper_network_has_its_35_7_million_parameters():
    network = UNetNetwork(UNetConfig())
    shapes = jax.eval_shape(lambda key: network.init(key, 32, 32), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307


def test_a_fresh_network_predicts_zero():
    params = FLAT.init(jax.random.key(0), 8, 8)
    assert np.abs(params["conv_in"]["kernel"]).max() > 0
    assert (apply(FLAT, params, X, T) == 0).all()


@pytest.mark.parametrize(("network", "label"), [(FOLDED, LABEL), (DEEP, None)])
def test_every_parameter_has_a_gradient_and_samples_do_not_see_each_other(network, label):
    params = random_params(network)
    y, (of_params, _) = outputs_and_gradients(network, params, X, label, ONES)
    assert y.shape == (3, 8, 8, network.config.out_channels)
    assert y.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    first = jnp.array([1.0, 0.0, 0.0])
    _, (_, of_images) = outputs_and_gradients(network, params, X, label, first)
    assert np.abs(of_images[0]).max() > 0
    assert np.abs(of_images[1:]).max() == 0


def test_no_label_is_the_last_row_of_the_table():
    params = random_params(FOLDED)
    labelled, without = (
        outputs_and_gradients(FOLDED, params, X, label, ONES)[0] for label in (LABEL, LABEL * 0 - 1)
    )
    np.testing.assert_allclose(apply(FOLDED, params, X, T), without, atol=1e-5)
    np.testing.assert_array_equal(labelled[2], without[2])
    assert (np.abs(labelled - without).max(axis=(1, 2, 3))[:2] > 1e-3).all()


def test_dropout_depends_only_on_the_key_of_the_sample():
    params, keys = random_params(FOLDED), jax.random.split(jax.random.key(5), 3)
    whole = apply(FOLDED, params, X, T, LABEL, keys)
    alone = apply(FOLDED, params, X[1:2], T[1:2], LABEL[1:2], keys[1:2])
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    without = outputs_and_gradients(FOLDED, params, X, LABEL, ONES)[0]
    assert np.abs(whole - without).max() > 1e-2
    assert np.abs(whole - apply(FOLDED, params, X, T, LABEL, keys[::-1])).max() > 1e-2


def test_dropout_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 20_000)
    y = jax.jit(lambda keys: Dropout(0.3).apply({}, jnp.ones((20_000, 4)), keys))(keys)
    assert set(np.unique(y).round(5)) == {0.0, np.float32(1 / 0.7).round(5)}
    np.testing.assert_allclose(y.mean(axis=0), 1, atol=4 * np.sqrt(0.3 / 0.7 / 20_000))


def test_bfloat16_is_close_to_float32():
    params = random_params(DEEP)
    exact = outputs_and_gradients(DEEP, params, X, None, ONES)[0]
    rough = apply(variant(**dataclasses.asdict(DEEP.config) | {"dtype": "bfloat16"}), params, X, T)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


def test_embedding_has_the_papers_frequencies():
    t, width = np.array([0.0, 1.0, 250.0]), 8
    rows = [[np.sin(s * 10 ** (-4 * k / 3)) for k in range(4)] for s in t]
    columns = [[np.cos(s * 10 ** (-4 * k / 3)) for k in range(4)] for s in t]
    expected = np.concatenate([rows, columns], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.array(t), width), expected, atol=2e-5)
    for width in (2, 5):
        with pytest.raises(ValueError, match="must be even and at least 4"):
            sinusoidal_embedding(t, width)


def test_what_it_refuses():
    params, lower = random_params(SMALL), jax.eval_shape
    with pytest.raises(ValueError, match="3 channels"):
        lower(SMALL, params, X[..., :1], T)
    with pytest.raises(ValueError, match="multiples of 2"):
        lower(SMALL, params, X[:, :7, :7], T)
    with pytest.raises(ValueError, match="without classes"):
        lower(SMALL, params, X, T, LABEL)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"widths": (8, 12), "groups": 8}, "must divide every width"),
        ({"widths": ()}, "widths must be positive and not empty"),
        ({"widths": [8, 16]}, "widths must be a tuple"),
        ({"widths": (2, 16), "groups": 2}, "must be even and at least 4"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"blocks": 1.5}, "blocks must be a whole number"),
        ({"attention": (0,)}, "attention is at heights of at least 1"),
        ({"head_width": 3}, "must divide every width"),
        ({"classes": -1}, "classes must not be negative"),
        ({"norm_epsilon": float("inf")}, "norm_epsilon must be finite"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16'"),
    ],
)
def test_configurations_that_cannot_be(wrong, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SMALL.config, **wrong)
    with pytest.raises(ValueError, match="config must be of type UNetConfig"):
        UNetNetwork(wrong)


# From 64 channels on, 3 x 3 convolutions in float32 are in Winograd's form.
@pytest.mark.parametrize(("dtype", "width"), [("float32", 128), ("bfloat16", 8)])
def test_prepared_parameters_are_the_same_network(dtype, width):
    network = variant(widths=(width,), attention=(), dtype=dtype)
    params = random_params(network)
    prepared = jax.jit(network.prepare)(params)
    expected, got = apply(network, params, X, T), apply(network, prepared, X, T)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=(1e-5 if dtype == "float32" else 0) * scale)
    names = {"/".join(path) for path in flax.traverse_util.flatten_dict(prepared.params)}
    assert names == {"/".join(path) for path in flax.traverse_util.flatten_dict(params)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions_with_strides_or_in_half_precision_are_not_transformed(dtype):
    network = variant(widths=(128, 4), dtype=dtype)
    shapes = jax.eval_shape(lambda key: network.init(key, 8, 8), jax.random.key(0))
    prepared = jax.eval_shape(network.prepare, shapes).prepared
    transformed = {path[0] for path in flax.traverse_util.flatten_dict(prepared)}
    assert "down_0_conv" not in transformed
    winograd = dtype == "float32" and jax.default_backend() == "cpu"
    assert ("down_0_block_0" in transformed) == winograd
