"""A pipeline of latent diffusion in the format of diffusers, as small as can be."""

import json

import jax
import numpy as np

from gen_jax import interop
from gen_jax.models.vq import AutoencoderOptions, CodebookOptions, make_autoencoder
from gen_jax.nn.config import AutoencoderConfig, UNetConfig
from gen_jax.nn.unet import UNetNetwork

__all__ = ["SCHEDULER", "write_json", "write_pipeline"]

INDEX = {
    "_class_name": "LDMPipeline",
    "vqvae": ["diffusers", "VQModel"],
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
# The process of latent diffusion, with an option that the first versions of diffusers wrote.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "timestep_values": None,
    "trained_betas": None,
}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pipeline(path):
    """Writes a pipeline of images of 8 x 8 pixels to a folder."""
    sizes = UNetConfig(widths=(4,), blocks=1, attention=(), groups=2, dropout=0.0)
    unet = UNetNetwork(sizes)
    params = _constant(lambda key: unet.init(key, 4, 4))
    interop.save_diffusers_unet(path / "unet", sizes, params, sample_size=4)
    model = make_autoencoder(
        AutoencoderConfig(widths=(4, 4), blocks=1, groups=2, latent_channels=3),
        CodebookOptions(codes=5, width=3, update="gradient", restart_every=0),
        AutoencoderOptions(),
        (16, 16, 3),
    )
    interop.save_diffusers_vq(path / "vqvae", model, _constant(model.init))
    write_json(path / "model_index.json", INDEX)
    write_json(path / "scheduler/scheduler_config.json", SCHEDULER)


def _constant(init):
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
