"""Two stages: the laws of samplers, what the decoder is given, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.models.diffusion import DDIM, DiffusionConfig, DiffusionModel, DiffusionSampler
from gen_jax.models.masked import MaskedModel, MaskGIT
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.models.vq import (
    Autoencoder,
    AutoencoderOptions,
    Codebook,
    CodebookOptions,
    Gaussian,
    GaussianOptions,
)
from gen_jax.nn.config import TransformerConfig, UNetConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from gen_jax.testing import check_sampler
from linear_coder import LinearCoder

CODES = Codebook(CodebookOptions(codes=5, width=3, depth=2))


def autoencoder(quantiser=CODES):
    network = LinearCoder(quantiser.inputs, quantiser.width)
    model = Autoencoder(network, quantiser, AutoencoderOptions(), (4, 4, 3))
    params = model.init(jax.random.key(0)) | {"deviation": jnp.float32(3)}
    if "codebook" in params["quantiser"]:
        table = jax.random.normal(jax.random.key(1), params["quantiser"]["codebook"].shape)
        params["quantiser"] = {"codebook": table}
    return model, params


def network(causal, length):
    extra = {"extra_inputs": 1, "causal": causal}
    return TokenNetwork(
        TransformerConfig(vocabulary=5, context=length, layers=1, width=8, heads=2, **extra)
    )


def sampler_of(kind):
    """A sampler over 8 codes, or over latents, and random parameters of both stages."""
    model, params = autoencoder()
    if kind == "ar":
        prior = AutoregressiveSampler(AutoregressiveModel(network(True, 8)), 0, 8)
    elif kind == "masked":
        prior = MaskGIT(MaskedModel(network(False, 8)), 8, 3)
    else:
        sizes = {"widths": (4,), "blocks": 1, "attention": (), "groups": 2, "dropout": 0.0}
        unet = UNetNetwork(UNetConfig(channels=3, out_channels=3, **sizes))
        process = DiffusionConfig(schedule="cosine", prediction="v")
        solver = DDIM(steps=3, spacing="trailing", clip=False)
        prior = DiffusionSampler(DiffusionModel(unet, process, (2, 2, 3)), solver)
    fresh = prior.model.init(jax.random.key(2))
    noise = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), fresh)
    moved = jax.tree.map(lambda leaf, more: leaf + 0.2 * more, fresh, noise)
    return TwoStageSampler(prior, model, kind == "diffusion"), {
        "prior": moved,
        "autoencoder": params,
    }


def test_the_laws_of_samplers():
    sampler, params = sampler_of("masked")
    assert sampler.nfe == sampler.prior.nfe + 1
    assert sampler.steps == sampler.prior.steps
    images = check_sampler(sampler, params, tolerance=2e-4)
    assert images.shape == (6, 4, 4, 3)
    assert len(np.unique(images.round(4), axis=0)) > 1


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_images_are_the_decoded_draws_of_the_prior(kind):
    sampler, params = sampler_of(kind)
    keys = sampling.sample_keys(0, 0, 4)
    images = sampling.generate(sampler, params, keys)
    drawn = sampling.generate(sampler.prior, params["prior"], keys)
    np.testing.assert_allclose(images, sampler.decode(params, drawn), atol=1e-5)
    model, own = sampler.autoencoder, params["autoencoder"]
    if kind == "diffusion":  # scaled back, and on the codes of the autoencoder
        expected = model.quantiser.quantise(own["quantiser"], 3 * drawn).value
    else:
        expected = model.lookup(own, drawn.reshape(4, 2, 2, 2))
    np.testing.assert_allclose(images, model.decode(own, expected), atol=1e-5)


def test_a_continuous_latent_is_decoded_as_it_is():
    model, params = autoencoder(Gaussian(GaussianOptions(width=2)))
    sampler, _ = sampler_of("diffusion")
    sampler = TwoStageSampler(sampler.prior, model, latents=True)
    drawn = jax.random.normal(jax.random.key(0), (3, 2, 2, 2))
    images = sampler.decode({"prior": None, "autoencoder": params}, drawn)
    np.testing.assert_allclose(images, model.decode(params, 3 * drawn), rtol=1e-5)
    with pytest.raises(ValueError, match="a continuous latent has no codes"):
        TwoStageSampler(sampler_of("ar")[0].prior, model)


def test_a_stream_shows_images_on_the_way():
    sampler, params = sampler_of("masked")
    keys, shown = sampling.sample_keys(0, 0, 2), []
    prepared = sampler.prepare(params)
    for state in sampling.stream(sampler, params, keys):
        shown.append(np.asarray(sampler.finish(prepared, state)))
    assert len(shown) == 3
    assert all(np.isfinite(image).all() for image in shown)
    np.testing.assert_allclose(shown[-1], sampling.generate(sampler, params, keys), atol=1e-5)


def test_what_it_refuses():
    sampler, params = sampler_of("ar")
    keys = sampling.sample_keys(0, 0, 2)
    for bad, message in (
        (params["prior"], 'two stages take {"prior": ..., "autoencoder": ...} as parameters'),
        (params | {"autoencoder": params["prior"]}, "parameters do not fit the Autoencoder"),
        (params | {"prior": params["autoencoder"]}, "parameters do not fit the Autoregressive"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.generate(sampler, bad, keys)
    with pytest.raises(ValueError, match="label"):
        sampling.generate(sampler, params, keys, Condition(label=np.array([0, 5])))
