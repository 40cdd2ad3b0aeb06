"""The autoencoder: shapes, gradients, training with its quantiser's statistics, and refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gen_jax import keys, parallel, training
from gen_jax.config import TrainConfig
from gen_jax.models.vq import (
    FSQ,
    Autoencoder,
    AutoencoderOptions,
    AutoencoderTrainable,
    Codebook,
    CodebookOptions,
    FSQOptions,
    Gaussian,
    GaussianOptions,
    kl_divergence,
)
from gen_jax.nn.autoencoder import AutoencoderNetwork
from gen_jax.nn.config import AutoencoderConfig
from gen_jax.workdir import Workdir
from linear_coder import LinearCoder

QUANTISERS = {
    "codebook": Codebook(CodebookOptions(codes=6, width=4, restart_every=2)),
    "gradient": Codebook(CodebookOptions(codes=6, width=4, update="gradient", restart_every=0)),
    "residual": Codebook(CodebookOptions(codes=6, width=4, depth=2)),
    "fsq": FSQ(FSQOptions((4, 3))),
    "kl": Gaussian(GaussianOptions(width=4, weight=0.1)),
}
SIZES = AutoencoderConfig(widths=(8, 8), blocks=1, groups=4, attention=(1,))


def autoencoder(name, loss="mse", **sizes):
    """With the convolutional network of these sizes, or without any with the linear one."""
    quantiser = QUANTISERS[name]
    network = LinearCoder(quantiser.inputs, quantiser.width)
    if sizes:
        config = dataclasses.replace(SIZES, **sizes)
        network = AutoencoderNetwork(config, quantiser.inputs, quantiser.width)
    return Autoencoder(network, quantiser, AutoencoderOptions(loss=loss), (8, 12, 3))


def images(number=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 8, 12, 3), np.uint8)


def noisy(params, seed=0):
    """With nothing left at zero, so that every branch is open."""
    leaves, structure = jax.tree.flatten(params)
    draws = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, draws, strict=True)]
    return jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("name", QUANTISERS)
def test_an_image_is_encoded_and_decoded(name):
    convolutional = {"blocks": 1} if name in ("residual", "kl") else {}
    model = autoencoder(name, **convolutional)
    params = noisy(model.init(jax.random.key(0)))
    x = jnp.asarray(images(), jnp.float32) / 127.5 - 1
    quantised = jax.jit(model.encode)(params, x)
    assert quantised.value.shape == (8, *model.latent_shape) == (8, 4, 6, model.quantiser.width)
    decoded = jax.jit(model.decode)(params, quantised.value)
    assert decoded.shape == x.shape
    assert decoded.dtype == jnp.float32
    if model.quantiser.discrete:
        assert quantised.code.shape == (8, *model.code_shape)
        again = jax.jit(model.decode_code)(params, quantised.code)
        np.testing.assert_allclose(again, decoded, atol=1e-5)
    prepared = model.prepare(params)
    np.testing.assert_allclose(model.decode(prepared, quantised.value), decoded, atol=1e-5)


def test_the_loss_is_the_error_and_the_quantisers_own():
    key = keys.stream(0, "train", 0, 8)
    batch = {"image": images()}
    for name in ("codebook", "kl"):
        for kind in ("mse", "l1"):
            model = autoencoder(name, loss=kind)
            params = noisy(model.init(jax.random.key(0)))
            parts = model.losses(params, batch, key)
            difference = np.asarray(parts.images) - (images() / 127.5 - 1)
            error = np.abs(difference) if kind == "l1" else difference**2
            own = parts.quantised.loss
            if name == "kl":
                mean, log_variance = jnp.split(parts.latents, 2, -1)
                own = 0.1 * kl_divergence(mean, log_variance).mean() / (8 * 12 * 3)
            np.testing.assert_allclose(parts.reconstruction, error.mean(), rtol=1e-5)
            np.testing.assert_allclose(parts.total, error.mean() + own, rtol=1e-5)
            total, metrics = model.loss(params, batch, key)
            np.testing.assert_allclose(total, parts.total, rtol=1e-6)
            assert metrics.keys() == {"reconstruction"}


def test_dropout_of_encoder_and_decoder_differs():
    model = autoencoder("fsq", dropout=0.5)
    params = noisy(model.init(jax.random.key(0)))
    batch, ours = {"image": images()}, keys.stream(0, "train", 0, 8)
    first, again = (model.losses(params, batch, ours).total for _ in range(2))
    assert first == again
    assert first != model.losses(params, batch, ours[::-1]).total


def fit(path, model, devices=1, steps=4, **changes):
    config = TrainConfig(
        steps=steps, batch=8, warmup=0, learning_rate=1e-2, log_every=1, checkpoint_every=2, ema=0.5
    )
    config = dataclasses.replace(config, **changes)
    mesh = Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))

    def batch(step):
        return {"image": images(seed=step)}

    trainable = AutoencoderTrainable(model, config)
    return training.fit(config, trainable, batch, Workdir(path), mesh=mesh, progress=False)


@pytest.mark.parametrize("name", ["codebook", "residual", "fsq", "kl"])
def test_training_is_the_same_on_any_number_of_devices_and_in_slices(tmp_path, name):
    model = autoencoder(name)
    results = [
        fit(tmp_path / str(i), model, devices, **changes)
        for i, (devices, changes) in enumerate([(1, {}), (8, {}), (2, {"accumulate": 2})])
    ]
    for other in results[1:]:
        close = functools.partial(np.testing.assert_allclose, atol=2e-3)
        jax.tree.map(close, results[0].state.state, other.state.state)


@pytest.mark.usefixtures("optimised")
def test_a_codebook_resumes_bit_for_bit(tmp_path):
    model = autoencoder("codebook")
    whole = fit(tmp_path / "whole", model)
    fit(tmp_path / "cut", model, steps=2)
    again = fit(tmp_path / "cut", model)
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)


@pytest.mark.parametrize("name", ["codebook", "gradient"])
def test_training_lowers_the_error_and_moves_the_codebook(tmp_path, name):
    model = autoencoder(name)
    fresh = model.init(keys.root(0, "init"))["quantiser"]["codebook"]
    trained = fit(tmp_path, model, steps=40, checkpoint_every=40, ema=0.0)
    assert np.abs(trained.state.state["params"]["quantiser"]["codebook"] - fresh).max() > 1e-2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["reconstruction"] < first["reconstruction"]
    assert 1 <= last["perplexity"] <= 6
    assert 0 < last["used"] <= 1


def test_what_it_refuses():
    with pytest.raises(ValueError, match="images of 8 x 12 do not fit the autoencoder"):
        autoencoder("fsq", widths=(8, 8, 8, 8))
    with pytest.raises(ValueError, match="takes 1 channels, the images have 3"):
        autoencoder("fsq", channels=1)
    model = autoencoder("codebook")
    params = model.init(jax.random.key(0))
    code = jnp.zeros((2, 4, 6), jnp.int32)
    for bad, message in (
        (code[:, :3], r"the code of an image has the shape \[4, 6\], got \[3, 6\]"),
        (code.at[0, 0, 0].set(6), "codes must be in 0 to 5, got 0 to 6"),
        (code.at[0, 0, 0].set(-1), "codes must be in 0 to 5, got -1 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode_code(params, bad)
    with pytest.raises(ValueError, match="the decoder takes 4 channels, got 3"):
        autoencoder("codebook", blocks=1).decode(params, jnp.zeros((1, 4, 6, 3)))
    with pytest.raises(ValueError, match="must be integers from 0 to 255"):
        model.loss(params, {"image": images() / 255.0}, keys.stream(0, "train", 0, 8))


def test_images_that_are_not_finite_are_not_encoded():
    with pytest.raises(ValueError, match="images to be encoded hold values that are not finite"):
        autoencoder("codebook").encode({}, np.full((1, 8, 12, 3), np.nan, np.float32))
