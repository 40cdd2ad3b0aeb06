"""The convolutional autoencoder: its size, its shapes, and what its output may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.nn.autoencoder import AutoencoderNetwork
from gen_jax.nn.config import AutoencoderConfig

SIZES = AutoencoderConfig(
    widths=(4, 8), blocks=1, groups=4, attention=(1,), head_width=4, latent_channels=5, patch=2
)
NETWORK = AutoencoderNetwork(SIZES, inputs=6, width=3)
X = jax.random.normal(jax.random.key(0), (3, 8, 4, 3))


def count(config, inputs, width):
    network = AutoencoderNetwork(config, inputs, width)
    shapes = jax.eval_shape(lambda key: network.init(key, 64, 64), jax.random.key(0))
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}


def test_published_layouts_have_their_number_of_parameters():
    stable_diffusion = AutoencoderConfig(widths=(128, 256, 512, 512))
    assert sum(count(stable_diffusion, 8, 4).values()) == 83_653_863
    # The VQModel of CompVis/ldm-celebahq-256, with 8,192 codes of width 3.
    celeba = count(AutoencoderConfig(widths=(128, 256, 512)), 3, 3)
    assert sum(celeba.values()) + 8192 * 3 == 55_322_782


def test_a_map_goes_down_and_up_again():
    params = NETWORK.init(jax.random.key(0), 8, 4)
    z = jax.jit(NETWORK.encode)(params, X)
    assert z.shape == (3, 2, 1, 6)
    assert NETWORK.latent_shape(8, 4) == (2, 1, 3)
    assert params["encoder"]["conv_out"]["kernel"].shape[-1] == 10  # two for each of the latent's
    x = jax.jit(NETWORK.decode)(params, z[..., :3])
    assert x.shape == X.shape
    assert z.dtype == x.dtype == jnp.float32
    prepared = NETWORK.prepare(params)
    np.testing.assert_allclose(NETWORK.encode(prepared, X), z, atol=1e-5)


def test_every_parameter_has_a_gradient_and_samples_do_not_see_each_other():
    shapes = jax.eval_shape(lambda key: NETWORK.init(key, 8, 4), jax.random.key(0))
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(generator.normal(size=leaf.shape) / max(leaf.shape[-1], 4) ** 0.5)

    params = jax.tree.map(lambda leaf: draw(leaf).astype(jnp.float32), shapes)

    @jax.jit
    def gradients(params, x, weights):
        def energy(params, x):
            y = NETWORK.decode(params, NETWORK.encode(params, x)[..., :3])
            y = jnp.square(y).sum((1, 2, 3)) + jnp.square(NETWORK.encode(params, x)).sum((1, 2, 3))
            return (weights * y).sum()

        return jax.grad(energy, (0, 1))(params, x)

    of_params, _ = gradients(params, X, jnp.ones(3))
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    _, of_images = gradients(params, X, jnp.array([1.0, 0, 0]))
    assert np.abs(of_images[0]).max() > 0
    assert np.abs(of_images[1:]).max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "widths must be positive and not empty"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"groups": 3}, "must divide every width"),
        ({"attention": (2,)}, "attention names levels from 0 to 1"),
        ({"latent_channels": -1}, "latent_channels must not be negative"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **changes)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="images of 6 x 8 do not fit the autoencoder"):
        NETWORK.init(jax.random.key(0), 6, 8)
    params = jax.eval_shape(lambda key: NETWORK.init(key, 8, 4), jax.random.key(0))
    with pytest.raises(ValueError, match="takes 3 channels, the images have 1"):
        NETWORK.encode(params, X[..., :1])
