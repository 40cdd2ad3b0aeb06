"""Autoencoders of diffusers: round trips, refusals, and agreement with the peer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.interop import (
    load_diffusers_kl,
    load_diffusers_vq,
    save_diffusers_kl,
    save_diffusers_vq,
)
from gen_jax.models.vq import (
    FSQ,
    Autoencoder,
    AutoencoderOptions,
    Codebook,
    CodebookOptions,
    FSQOptions,
    Gaussian,
    GaussianOptions,
)
from gen_jax.nn.autoencoder import AutoencoderNetwork
from gen_jax.nn.config import AutoencoderConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = AutoencoderConfig(widths=(4, 8), blocks=1, groups=4, attention=(1,))
GRADIENT = CodebookOptions(codes=7, width=3, update="gradient", restart_every=0)


def autoencoder(quantiser, **sizes):
    network = AutoencoderNetwork(
        dataclasses.replace(SIZES, **sizes), quantiser.inputs, quantiser.width
    )
    return Autoencoder(network, quantiser, AutoencoderOptions(), (8, 12, 3))


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            0.3 * generator.normal(size=leaf.shape) + (leaf.ndim == 1), jnp.float32
        ),
        shapes,
    )


VQ = autoencoder(Codebook(GRADIENT), latent_channels=5)
KL = autoencoder(Gaussian(GaussianOptions(width=2)), patch=2, middle_attention=False)


@pytest.mark.parametrize(
    ("model", "save", "load"),
    [(VQ, save_diffusers_vq, load_diffusers_vq), (KL, save_diffusers_kl, load_diffusers_kl)],
)
def test_what_was_written_comes_back(tmp_path, model, save, load):
    params = random_params(model) | {"deviation": jnp.float32(2)}
    save(tmp_path, model, params)
    again, values = load(tmp_path)
    sizes = dataclasses.replace(model.network.config, latent_channels=0)
    assert dataclasses.replace(again.network.config, latent_channels=0) == sizes
    assert again.shape == model.shape
    jax.tree.map(np.testing.assert_array_equal, values, params)
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] == 0.5


def edit(path, **changes):
    file = path / "config.json"
    options = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, r'act_fn="relu" \(supported: "silu" or "swish"\)'),
        ({"norm_type": "spatial"}, r'norm_type="spatial" \(supported: "group"\)'),
        ({"lookup_from_codebook": True}, "lookup_from_codebook=true"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types="),
        ({"down_block_types": [["DownEncoderBlock2D"], 1]}, "down_block_types="),
        ({"sample_size": [8]}, "sample_size="),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types=.*attention at the levels"),
        ({"block_out_channels": [4, 6]}, "norm_num_groups=4"),
        ({"num_vq_embeddings": 1}, r"num_vq_embeddings=1 \(supported: at least 2\)"),
        ({"num_vq_embeddings": 10**12}, "num_vq_embeddings=1000000000000"),
        ({"sample_size": 7}, r"sample_size=7 \(supported: a multiple of 2\)"),
        ({"out_channels": 6}, r"out_channels=6 \(supported: in_channels, 3\)"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"double_z": True}, r"double_z=true \(unknown\)"),
        ({"_class_name": "AutoencoderKL"}, "is not of a VQModel: _class_name='AutoencoderKL'"),
        ({"layers_per_block": 2}, "does not fit the network: missing"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, changes, message):
    save_diffusers_vq(tmp_path, VQ, random_params(VQ))
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_diffusers_vq(tmp_path)


def test_a_latent_without_its_projections_is_refused(tmp_path):
    save_diffusers_kl(tmp_path, KL, random_params(KL))
    for changes, message in (
        ({"use_quant_conv": False}, "use_quant_conv=false"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"latents_mean": [0.0, 1.0]}, "latents_mean="),
    ):
        save_diffusers_kl(tmp_path, KL, random_params(KL))
        edit(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_diffusers_kl(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (autoencoder(Codebook(dataclasses.replace(GRADIENT, depth=2))), "one table of codes, no"),
        (autoencoder(FSQ(FSQOptions((4, 4)))), "diffusers has no quantiser 'fsq'"),
        (autoencoder(Codebook(GRADIENT), dropout=0.1), "one head and no dropout"),
        (KL, "this is a AutoencoderKL, not a VQModel"),
    ],
)
def test_what_diffusers_cannot_express_is_not_written(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        save_diffusers_vq(tmp_path / "new", model, random_params(model))
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def peers():
    return pytest.importorskip("diffusers")


def randomise(model):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


TYPES = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "sample_size": 8,
}
THREE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "sample_size": 16,
}


def images(size):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


def channels_first(x):
    import torch

    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        TYPES,
        TYPES | {"vq_embed_dim": 5, "mid_block_add_attention": False},
        THREE | {"num_vq_embeddings": 32, "latent_channels": 6},
    ],
)
def test_encode_quantise_and_decode_agree(peers, tmp_path, options):
    model = randomise(peers.VQModel(**options))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_vq(tmp_path)
    x = images(options["sample_size"])
    latents = jax.jit(ours.network.encode)(params["network"], x)
    theirs = model.encode(channels_first(x)).latents
    np.testing.assert_allclose(latents, channels_last(theirs), atol=1e-4)
    # From the same latents, so that rounding does not choose another code.
    value, _, (_, _, code) = model.quantize(channels_first(latents))
    quantised = ours.quantiser.quantise(params["quantiser"], latents)
    np.testing.assert_array_equal(quantised.code.reshape(-1), code.numpy())
    np.testing.assert_allclose(quantised.value, channels_last(value), atol=1e-6)
    decoded = jax.jit(ours.decode)(params, quantised.value)
    theirs = model.decode(channels_first(latents)).sample
    np.testing.assert_allclose(decoded, channels_last(theirs), atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("options", [TYPES, THREE | {"latent_channels": 2}])
def test_a_continuous_latent_agrees(peers, tmp_path, options):
    model = randomise(peers.AutoencoderKL(**options))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_kl(tmp_path)
    x = images(options["sample_size"])
    latents = jax.jit(ours.network.encode)(params["network"], x)
    theirs = model.encode(channels_first(x)).latent_dist
    quantised = ours.quantiser.quantise({}, latents)
    np.testing.assert_allclose(quantised.value, channels_last(theirs.mean), atol=1e-4)
    width = ours.quantiser.width
    np.testing.assert_allclose(latents[..., width:], channels_last(theirs.logvar), atol=1e-4)
    kl = quantised.loss / ours.quantiser.options.weight
    np.testing.assert_allclose(kl, theirs.kl().mean().item(), rtol=1e-4)
    decoded = jax.jit(ours.decode)(params, quantised.value)
    sample = model.decode(channels_first(quantised.value)).sample
    np.testing.assert_allclose(decoded, channels_last(sample), atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(("model", "name"), [(VQ, "VQModel"), (KL, "AutoencoderKL")])
def test_what_is_written_here_loads_there(peers, tmp_path, model, name):
    params = random_params(model)
    (save_diffusers_vq if name == "VQModel" else save_diffusers_kl)(tmp_path, model, params)
    _, report = getattr(peers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
