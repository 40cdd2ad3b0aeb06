"""Pipelines of diffusers: refusals, and agreement with the peer."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import interop, sampling
from gen_jax.condition import Condition
from gen_jax.interop.diffusers_options import to_config
from gen_jax.interop.diffusers_schedulers import read_ddim
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.models.diffusion import (
    DDIM,
    Ancestral,
    DiffusionConfig,
    DiffusionModel,
    DiffusionSampler,
)
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.models.vq import (
    AutoencoderOptions,
    CodebookOptions,
    FSQOptions,
    GaussianOptions,
    make_autoencoder,
)
from gen_jax.nn.config import AutoencoderConfig, TransformerConfig, UNetConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from latent_pipeline import SCHEDULER, write_json, write_pipeline
from random_networks import random_params

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROCESS = DiffusionConfig(
    schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, variance="fixed_small"
)


UNET = UNetConfig(widths=(4,), blocks=1, attention=(), groups=2, dropout=0.0)
CODER = AutoencoderConfig(widths=(4, 4), blocks=1, groups=2)
SOLVER = DDIM(5, clip=False)
KL = GaussianOptions(width=3)
CODES = CodebookOptions(codes=5, width=3, update="gradient", restart_every=0)


def edit(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of the smallest networks."""
    path = tmp_path_factory.mktemp("pipeline")
    write_pipeline(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_pipeline_is_a_sampler_in_two_stages(folder):
    sampler, params = interop.load_diffusers_ldm(folder, steps=2)
    assert sampler.prior.solver == DDIM(2, clip=False)
    assert sampler.prior.model.process == PROCESS
    # The size of the images follows from that of the latents.
    assert sampler.prior.model.shape == (4, 4, 3)
    assert sampler.autoencoder.shape == (8, 8, 3)
    assert (sampler.latents, sampler.steps, sampler.nfe) == (True, 2, 3)
    sampler.check(params, Condition())
    assert params["autoencoder"]["deviation"] == 0.5


@pytest.mark.parametrize(
    ("changes", "steps", "solver"),
    [
        ({}, 50, DDIM(50, clip=False)),
        ({"clip_sample": True}, 7, DDIM(7)),
        ({"steps_offset": 1}, 7, DDIM(7, clip=False, offset=1)),
        ({"set_alpha_to_one": False}, 7, DDIM(7, clip=False, end="first")),
        ({"timestep_spacing": "trailing"}, 8, DDIM(8, "trailing", clip=False)),
        # diffusers reads the offset with "leading" alone.
        (
            {"timestep_spacing": "trailing", "steps_offset": 1},
            8,
            DDIM(8, "trailing", clip=False),
        ),
        ({"clip_sample_range": 2.0, "sample_max_value": 2.0}, 5, DDIM(5, clip=False)),
        ({"timesteps": 1000, "tensor_format": "pt"}, 5, DDIM(5, clip=False)),
    ],
)
def test_the_solver_is_that_of_the_scheduler(tmp_path, changes, steps, solver):
    write_json(tmp_path / "scheduler_config.json", SCHEDULER | changes)
    assert read_ddim(tmp_path, steps) == (PROCESS, solver)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "is not of a DDIMScheduler: _class_name='PNDMSch"),
        ({"beta_schedule": "sigmoid"}, r'beta_schedule="sigmoid" \(supported: "linear" or "scal'),
        ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] \(supported: null\)"),
        ({"prediction_type": "flow"}, r'prediction_type="flow" \(supported: "epsilon" or'),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr=true \(supported: false\)"),
        ({"variance_type": "fixed_small"}, r'variance_type="fixed_small" \(unknown\)'),
        ({"skip_prk_steps": True}, r"skip_prk_steps=true \(unknown\)"),
        ({"thresholding": True}, r"thresholding=true \(supported: false\)"),
        ({"clip_sample": None}, r"clip_sample=null \(supported: true or false\)"),
        ({"clip_sample": True, "clip_sample_range": 2}, r"clip_sample_range=2 \(supported: 1\)"),
        ({"set_alpha_to_one": 1}, r"set_alpha_to_one=1 \(supported: true or false\)"),
        ({"steps_offset": -1}, r"steps_offset=-1 \(supported: an integer that is not negative"),
        ({"steps_offset": 200}, "offset 200 must be below the stride of 6 steps, 166"),
        ({"timestep_spacing": "linspace"}, r'timestep_spacing="linspace" \(supported: "leading"'),
        ({"timestep_spacing": "trailing"}, '"leading", or "trailing", where 6 steps divide 1000'),
        ({"timesteps": 100}, r"timesteps=100 \(supported: null or 1000\)"),
        ({"timestep_values": [1]}, r"timestep_values=\[1\] \(supported: null\)"),
        ({"num_train_timesteps": 5}, "6 sampling steps do not fit in 5 time steps"),
        ({"num_train_timesteps": "5"}, 'num_train_timesteps="5"'),
    ],
)
def test_a_scheduler_that_cannot_be_expressed_is_refused_by_name(tmp_path, changes, message):
    write_json(tmp_path / "scheduler_config.json", SCHEDULER | changes)
    with pytest.raises(ValueError, match=message) as raised:
        read_ddim(tmp_path, 6)
    assert "\n" not in str(raised.value)


def test_no_number_of_steps(folder):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        interop.load_diffusers_ldm(folder, steps=0)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "DDPMPipeline"}, "is not of an LDMPipeline: _class_n"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "PNDMScheduler"]},
            r'scheduler=\["diffusers", "PNDMScheduler"\] \(supported: \["diffusers", "DDIMSch',
        ),
        ("model_index.json", {"vqvae": None}, r"vqvae=null \(supported: "),
        ("unet/config.json", {"sample_size": None}, r"sample_size=null \(supported: an integer"),
        ("unet/config.json", {"sample_size": [4, 4]}, r"sample_size=\[4, 4\] \(supported: "),
        ("unet/config.json", {"num_class_embeds": 3}, r"num_class_embeds=3 \(supported: null: th"),
        ("unet/config.json", {"in_channels": 4}, "latents of 4 channels, but .* latents of 3"),
        ("vqvae/config.json", {"vq_embed_dim": 2}, "latents of 3 channels, but .* latents of 2"),
        ("unet/config.json", {"out_channels": 6}, "predicts 6 channels for images of 3"),
        ("unet/config.json", {"act_fn": "relu"}, 'act_fn="relu"'),
        ("vqvae/config.json", {"_class_name": "AutoencoderKL"}, "is not of a VQModel"),
        (
            "model_index.json",
            {"vqvae": ["diffusers", "AutoencoderKL"]},
            "is not of a AutoencoderKL: _class_name='VQModel'",
        ),
        ("vqvae/config.json", {"norm_type": "spatial"}, 'norm_type="spatial"'),
        ("unet/config.json", {"layers_per_block": 2}, "does not fit the network: missing"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(copy, file, changes, message):
    edit(copy / file, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        interop.load_diffusers_ldm(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model_index.json", "has no model_index.json"),
        ("scheduler/scheduler_config.json", "scheduler has no scheduler_config.json"),
        ("unet/config.json", "unet has neither config.json"),
        ("vqvae/config.json", "vqvae has no config.json"),
        (f"vqvae/{WEIGHTS}", f"vqvae has no {WEIGHTS}"),
    ],
)
def test_a_part_that_is_missing(copy, file, message):
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        interop.load_diffusers_ldm(copy)


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "scheduler/scheduler_config.json", f"unet/{WEIGHTS}", f"vqvae/{WEIGHTS}"],
)
def test_a_damaged_file_is_named(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged") as raised:
        interop.load_diffusers_ldm(copy)
    assert "\n" not in str(raised.value)


def diffusion(process=PROCESS, solver=SOLVER, unet=UNET, quantiser=KL, shape=(4, 4, 3)):
    """Latent diffusion of the smallest networks, and random parameters."""
    prior = DiffusionSampler(DiffusionModel(UNetNetwork(unet), process, shape), solver)
    height, width, _ = shape
    images = (2 * height, 2 * width, 3)
    autoencoder = make_autoencoder(CODER, quantiser, AutoencoderOptions(), images)
    params = {
        "prior": random_params(prior.model),
        "autoencoder": random_params(autoencoder) | {"deviation": jnp.float32(0.5)},
    }
    return TwoStageSampler(prior, autoencoder, latents=True), params


@pytest.mark.parametrize("quantiser", [KL, CODES])
def test_a_pipeline_that_is_written_comes_back(tmp_path, quantiser):
    """With its steps, which are not in the file."""
    solver = DDIM(4, "trailing", clip=False, end="first")
    process = DiffusionConfig(schedule="cosine", prediction="v", variance="fixed_small")
    sampler, params = diffusion(process, solver, quantiser=quantiser)
    interop.save_diffusers_ldm(tmp_path, sampler, params)
    again, loaded = interop.load_diffusers_ldm(tmp_path, steps=4)
    assert again.prior.solver == solver
    keys = sampling.sample_keys(0, 0, 2)
    one, other = sampling.generate(sampler, params, keys), sampling.generate(again, loaded, keys)
    np.testing.assert_allclose(other, one, atol=1e-5)
    assert one.std() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": DDIM(5, clip=False, eta=0.5)}, "neither eta nor guidance"),
        ({"solver": Ancestral(clip=False)}, "an LDMPipeline draws with ddim, not ddpm"),
        ({"solver": DDIM(5, "linspace", clip=False)}, 'timestep_spacing="linspace"'),
        ({"shape": (4, 8, 3)}, "square latents, and a UNet without classes"),
        ({"quantiser": FSQOptions(levels=(3, 3, 3))}, "diffusers has no quantiser 'fsq'"),
        ({"unet": dataclasses.replace(UNET, classes=2)}, "a UNet without classes"),
    ],
)
def test_what_a_pipeline_cannot_be_is_refused(tmp_path, changes, message):
    sampler, params = diffusion(**changes)
    with pytest.raises(ValueError, match=message) as raised:
        interop.save_diffusers_ldm(tmp_path / "folder", sampler, params)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "folder").exists()


def test_codes_are_no_pipeline(tmp_path):
    autoencoder = make_autoencoder(CODER, CODES, AutoencoderOptions(), (8, 8, 3))
    sizes = TransformerConfig(vocabulary=5, context=16, layers=1, width=4, heads=1, extra_inputs=1)
    prior = AutoregressiveSampler(AutoregressiveModel(TokenNetwork(sizes)), 0, 16)
    sampler = TwoStageSampler(prior, autoencoder)
    with pytest.raises(ValueError, match="draws latents by diffusion, not codes"):
        interop.save_diffusers_ldm(tmp_path / "folder", sampler, {})
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


def pipeline(peers, unet, vqvae, scheduler):
    """A pipeline of random weights, with codes as far apart as its latents."""
    import torch

    torch.manual_seed(0)
    one_level = {"block_out_channels": (8,), "norm_num_groups": 2, "layers_per_block": 1}
    unet = peers.UNet2DModel(**one_level | unet)
    vqvae = peers.VQModel(**one_level | vqvae)
    with torch.no_grad():
        vqvae.quantize.embedding.weight.normal_(std=1 / vqvae.config.scaling_factor)
    options = {key: value for key, value in (SCHEDULER | scheduler).items() if key[0] != "_"}
    options.pop("timestep_values")
    pipe = peers.LDMPipeline(vqvae.eval(), unet.eval(), peers.DDIMScheduler(**options))
    return pipe


def drawn_by_both(monkeypatch, sampler, params, theirs):
    """Two images of our sampler and of the pipeline, from the same noise, about in [0, 1]."""
    import torch

    keys = sampling.sample_keys(0, 0, 2)
    noise = np.moveaxis(np.array(sampler.init(params, keys, Condition()).x), -1, 1).copy()
    module = type(theirs).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    theirs.set_progress_bar_config(disable=True)
    images = theirs(batch_size=2, num_inference_steps=sampler.steps, output_type="np").images
    return np.asarray(sampling.generate(sampler, params, keys)) / 2 + 0.5, images


TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
ATTENTION = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
PLAIN = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("steps", "unet", "vqvae", "scheduler"),
    [
        (5, ATTENTION | {"sample_size": 8}, TWO_LEVELS, {}),
        (
            10,
            PLAIN | {"sample_size": 4, "in_channels": 2, "out_channels": 2},
            {"latent_channels": 5, "vq_embed_dim": 2, "scaling_factor": 2.0},
            {"steps_offset": 1, "set_alpha_to_one": False},
        ),
        (
            4,
            PLAIN | {"sample_size": 4},
            {"sample_size": 4, "scaling_factor": 1.0},
            {
                "timestep_spacing": "trailing",
                "clip_sample": True,
                "prediction_type": "v_prediction",
                "beta_schedule": "squaredcos_cap_v2",
            },
        ),
    ],
)
def test_images_of_the_same_noise_agree(
    peers, tmp_path, monkeypatch, steps, unet, vqvae, scheduler
):
    theirs = pipeline(peers, unet, vqvae, scheduler)
    theirs.save_pretrained(tmp_path)
    sampler, params = interop.load_diffusers_ldm(tmp_path, steps=steps)
    ours, images = drawn_by_both(monkeypatch, sampler, params, theirs)
    assert ours.shape == (2, *sampler.autoencoder.shape)
    np.testing.assert_allclose(ours.clip(0, 1), images, atol=1e-4)
    assert ((ours > 0) & (ours < 1)).mean() > 0.9  # most are not cut off
    assert images.std() > 0.05


@pytest.mark.oracle
@pytest.mark.parametrize("quantiser", [KL, CODES])
def test_the_peer_draws_our_images(peers, tmp_path, monkeypatch, quantiser):
    process = DiffusionConfig(schedule="cosine", prediction="v", variance="fixed_small")
    solver = DDIM(5, "trailing", clip=False)
    sampler, params = diffusion(process, solver, quantiser=quantiser)
    interop.save_diffusers_ldm(tmp_path, sampler, params)
    theirs = peers.LDMPipeline.from_pretrained(tmp_path)
    ours, images = drawn_by_both(monkeypatch, sampler, params, theirs)
    np.testing.assert_allclose(ours.clip(0, 1), images, atol=1e-4)
    assert images.std() > 0.01


# The sizes in config.json of the UNet of CompVis/ldm-celebahq-256.
CELEBAHQ_UNET = {
    "sample_size": 64,
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "attention_head_dim": 32,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "norm_num_groups": 32,
}


@pytest.mark.oracle
def test_the_network_of_latent_diffusion_has_the_parameters_of_the_peer(peers):
    import torch

    config, (height, width) = to_config(CELEBAHQ_UNET)
    shapes = jax.eval_shape(
        lambda key: UNetNetwork(config).init(key, height, width), jax.random.key(0)
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    with torch.device("meta"):
        theirs = peers.UNet2DModel(**CELEBAHQ_UNET)
    assert ours == sum(parameter.numel() for parameter in theirs.parameters()) == 274_056_163
