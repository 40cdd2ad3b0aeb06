"""The discriminator of patches: sizes, what a logit sees, and agreement with PyTorch's layers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.nn import discriminator
from gen_jax.nn.config import DiscriminatorConfig
from gen_jax.nn.discriminator import PatchDiscriminator

SIZES = DiscriminatorConfig(width=2, layers=2, groups=2)


def drawn(network, height, width, channels=3):
    """Parameters with nothing left at zero or one."""
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), height, width, channels))
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * generator.normal(size=leaf.shape), jnp.float32), shapes
    )


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34)])
def test_a_logit_sees_a_patch_but_for_the_statistics(layers, patch, monkeypatch):
    monkeypatch.setattr(discriminator, "GroupNorm", lambda *sizes, **options: lambda x: x)
    network = PatchDiscriminator(dataclasses.replace(SIZES, layers=layers))
    params, x = drawn(network, 48, 48, 1), jnp.zeros((1, 48, 48, 1))
    gradient = jax.jit(jax.grad(lambda x: network(params, x)[0, 4, 4]))(x)[0, ..., 0]
    seen = np.abs(gradient) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_images_are_judged_alone():
    network = PatchDiscriminator(SIZES)
    params = drawn(network, 16, 12)
    x = jax.random.normal(jax.random.key(1), (3, 16, 12, 3))
    logits = jax.jit(network)(params, x)
    assert logits.shape == (3, *SIZES.logits_shape(16, 12)) == (3, 2, 1)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[1:2], jax.jit(network)(params, x[1:2]), rtol=1e-5, atol=1e-6)


def test_the_published_size():
    network = PatchDiscriminator(DiscriminatorConfig())
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), 256, 256, 6))
    # pix2pix has 2,768,705 for pairs of images; there three convolutions have no bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_768_705 + 128 + 256 + 512
    assert DiscriminatorConfig().logits_shape(256, 256) == (30, 30)


@pytest.mark.oracle
def test_it_agrees_with_the_layers_of_pix2pix():
    torch = pytest.importorskip("torch")
    nn, config = torch.nn, DiscriminatorConfig(width=4, layers=4, groups=4)
    widths = [3, 4, 8, 16, 32, 32]
    layers = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 2 if i < 4 else 1
        layers.append(nn.Conv2d(before, after, kernel_size=4, stride=stride, padding=1))
        if i:
            layers.append(nn.GroupNorm(4, after))
        layers.append(nn.LeakyReLU(0.2))
    theirs = nn.Sequential(*layers, nn.Conv2d(32, 1, kernel_size=4, stride=1, padding=1))
    network = PatchDiscriminator(config)
    params = drawn(network, 64, 48)
    names = [name for i in range(5) for name in (f"conv_{i}", f"norm_{i}") if name in params]
    counted = [layer for layer in theirs if not isinstance(layer, nn.LeakyReLU)]
    with torch.no_grad():
        for name, layer in zip([*names, "logits"], counted, strict=True):
            ours = {key: np.array(leaf) for key, leaf in params[name].items()}
            weight = ours["kernel"].transpose(3, 2, 0, 1) if "kernel" in ours else ours["scale"]
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            layer.bias.copy_(torch.from_numpy(ours["bias"]))
        x = np.random.default_rng(1).normal(size=(2, 64, 48, 3)).astype(np.float32)
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))[:, 0].numpy()
    np.testing.assert_allclose(jax.jit(network)(params, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"groups": 3}, r"groups \(3\) must divide twice the width \(2\)"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **changes)


def test_images_that_are_too_small():
    network = PatchDiscriminator(SIZES)
    for size in ((8, 16), (16, 11)):
        with pytest.raises(ValueError, match="needs 12 pixels a side: take fewer layers"):
            network.init(jax.random.key(0), *size, 3)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), 16, 16, 3))
    with pytest.raises(ValueError, match="images of 8 x 8 are too small for a discriminator"):
        network(params, jnp.zeros((1, 8, 8, 3)))
