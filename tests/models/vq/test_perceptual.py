"""The perceptual term: its closed form for linear features, and the bands of a pyramid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import keys
from gen_jax.config import frozen
from gen_jax.models.vq import (
    FSQ,
    Autoencoder,
    AutoencoderOptions,
    FSQOptions,
    LaplacianPyramid,
    perceptual_distance,
    unit_channels,
)
from linear_coder import LinearCoder

X = np.random.default_rng(0).uniform(-1, 1, (3, 8, 12, 3)).astype(np.float32)
Y = np.random.default_rng(1).uniform(-1, 1, (3, 8, 12, 3)).astype(np.float32)


@frozen
class Sums:
    """The weighted sum of the channels, and of every second pixel twice the same."""

    weight: float

    def features(self, x):
        whole = self.weight * x.sum(axis=-1, keepdims=True)
        return [whole, 2 * whole[:, ::2, ::2]]


def test_the_distance_of_linear_features_is_its_closed_form():
    difference = 0.5 * (X - Y).sum(-1)
    expected = (difference**2).mean() + ((2 * difference[:, ::2, ::2]) ** 2).mean()
    x, y = jnp.asarray(X), jnp.asarray(Y)
    np.testing.assert_allclose(perceptual_distance(Sums(0.5), x, y), expected, rtol=1e-5)
    assert perceptual_distance(Sums(0.5), x, x) == 0
    gradient = jax.grad(lambda y: perceptual_distance(Sums(0.5), x, y))(y)
    by_hand = -2 * 0.5 * difference / difference.size
    by_hand[:, ::2, ::2] -= 2 * 4 * 0.5 * difference[:, ::2, ::2] / difference[:, ::2, ::2].size
    np.testing.assert_allclose(gradient, np.repeat(by_hand[..., None], 3, -1), atol=1e-6)


def test_it_joins_the_loss_with_its_weight():
    quantiser = FSQ(FSQOptions((4, 3)))
    network, batch = LinearCoder(2, 2), {"image": np.uint8(127.5 * (X + 1))}
    options = AutoencoderOptions(perceptual=0.3)
    model = Autoencoder(network, quantiser, options, (8, 12, 3), Sums(0.5))
    params = model.init(jax.random.key(0))
    parts = model.losses(params, batch, keys.stream(0, "train", 0, 3))
    x = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)
    distance = perceptual_distance(Sums(0.5), x, parts.images)
    np.testing.assert_allclose(parts.perceptual, distance, rtol=1e-5)
    np.testing.assert_allclose(parts.total, parts.reconstruction + 0.3 * distance, rtol=1e-5)
    _, metrics = model.loss(params, batch, keys.stream(0, "train", 0, 3))
    assert metrics.keys() == {"reconstruction", "perceptual"}


def _smooth(x):
    """By the kernel of the paper in NumPy."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    row = np.array([1, 4, 6, 4, 1]) / 16
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return np.einsum("bhwcij,i,j->bhwc", windows, row, row)


def test_the_bands_of_a_pyramid():
    pyramid = LaplacianPyramid(levels=2)
    maps = pyramid.features(jnp.asarray(X))
    assert [level.shape[1:3] for level in maps] == [(8, 12), (4, 6), (2, 3)]
    for band, x in zip(maps[:2], [X, _smooth(X)[:, ::2, ::2]], strict=True):
        np.testing.assert_allclose(band, x - _smooth(x), atol=1e-5)
    np.testing.assert_allclose(maps[2], _smooth(_smooth(X)[:, ::2, ::2])[:, ::2, ::2], atol=1e-5)
    # A constant has no bands, and is left whole.
    *bands, left = pyramid.features(jnp.full((1, 8, 8, 3), 0.7))
    assert max(float(jnp.abs(band).max()) for band in bands) < 1e-6
    np.testing.assert_allclose(left, 0.7, rtol=1e-6)


def test_features_of_unit_length():
    maps = unit_channels(jnp.asarray(X).at[0, 0, 0].set(0))
    lengths = np.linalg.norm(maps, axis=-1)
    np.testing.assert_allclose(lengths[1:], 1, rtol=1e-4)
    gradient = jax.grad(lambda x: unit_channels(x).sum())(jnp.zeros((1, 1, 1, 3)))
    assert np.isfinite(gradient).all()


def test_what_it_refuses():
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        LaplacianPyramid(levels=0)
    with pytest.raises(ValueError, match="perceptual must not be negative"):
        AutoencoderOptions(perceptual=-1.0)
