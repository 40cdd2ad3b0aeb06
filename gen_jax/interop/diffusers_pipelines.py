"""Whole pipelines in the format of diffusers: model_index.json and a folder for each part.

`LDMPipeline` is latent diffusion without a condition (Rombach et al. 2022, 2112.10752): DDIM over
the latents of a `VQModel` or `AutoencoderKL`, which are divided by its `scaling_factor`, quantised
where there are codes, and decoded.
"""

import dataclasses
import json
import os
import pathlib
import reprlib
from typing import Any

from gen_jax.bounded import read_json
from gen_jax.interop import files
from gen_jax.interop.config_json import CONFIG, Refusals
from gen_jax.interop.diffusers import load_diffusers_unet, save_diffusers_unet
from gen_jax.interop.diffusers_autoencoder_options import read_layout
from gen_jax.interop.diffusers_autoencoders import (
    load_diffusers_kl,
    load_diffusers_vq,
    save_diffusers_kl,
    save_diffusers_vq,
)
from gen_jax.interop.diffusers_options import read_network, to_config, to_options
from gen_jax.interop.diffusers_schedulers import SCHEDULER, read_ddim, to_ddim_options
from gen_jax.models.diffusion.samplers import DiffusionSampler
from gen_jax.models.two_stage import TwoStageSampler

__all__ = ["load_diffusers_ldm", "save_diffusers_ldm"]

_INDEX = "model_index.json"
_AUTOENCODERS = {
    "VQModel": (load_diffusers_vq, save_diffusers_vq),
    "AutoencoderKL": (load_diffusers_kl, save_diffusers_kl),
}
_PARTS = {
    "vqvae": tuple(_AUTOENCODERS),
    "unet": ("UNet2DModel",),
    "scheduler": ("DDIMScheduler",),
}


def load_diffusers_ldm(
    directory: str | os.PathLike, *, steps: int = 50
) -> tuple[TwoStageSampler, dict[str, Any]]:
    """The sampler in a folder that diffusers' `LDMPipeline` wrote, and its parameters.

        sampler, params = load_diffusers_ldm("ldm-celebahq-256")
        images = sampling.generate(sampler, params, sampling.sample_keys(0, 0, 4))

    From the same noise the images are those of the pipeline, before it maps [-1, 1] to [0, 1] and
    cuts off what is beyond. Another solver for the same network is
    `TwoStageSampler(DiffusionSampler(sampler.prior.model, solver), sampler.autoencoder, True)`.

    Args:
      directory: holds model_index.json and the folders vqvae, unet and scheduler. Weights in
        float16 or bfloat16 become float32.
      steps: of DDIM with eta = 0, which the folder does not say; by default as in the pipeline.

    Returns:
      The sampler and its float32 parameters, {"prior": ..., "autoencoder": ...}. The UNet's
      `sample_size` is that of the latents, from which the size of the images follows.

    Raises:
      FileNotFoundError: there is no model_index.json, a part of the pipeline, or weights.
      ValueError: the folder is of another pipeline or has other parts, options cannot be expressed
        (each is named), the parts do not fit each other, so many steps do not fit, or weights are
        refused as in `load_diffusers_unet`.
    """
    directory = pathlib.Path(directory).expanduser()
    kind = _check_index(directory)["vqvae"]
    process, solver = read_ddim(directory / "scheduler", steps)
    _check_parts(directory, kind)
    prior, prior_params = load_diffusers_unet(directory / "unet", process)
    load, _ = _AUTOENCODERS[kind]
    autoencoder, params = load(directory / "vqvae")
    stride, (height, width, _) = autoencoder.network.config.stride, prior.shape
    shape = (stride * height, stride * width, autoencoder.shape[-1])
    autoencoder = dataclasses.replace(autoencoder, shape=shape)
    sampler = TwoStageSampler(DiffusionSampler(prior, solver), autoencoder, latents=True)
    return sampler, {"prior": prior_params, "autoencoder": params}


def save_diffusers_ldm(
    directory: str | os.PathLike, sampler: TwoStageSampler, params: dict[str, Any]
) -> None:
    """Writes latent diffusion so that `diffusers.LDMPipeline.from_pretrained` loads it.

    The folder does not say how many steps there are: 20 of ours are `num_inference_steps=20` of the
    pipeline. Networks with patches are written as those of folded images; see
    `save_diffusers_unet`. A reader sees each file whole; model_index.json is the last.

    Args:
      directory: created when it does not exist; model_index.json and the files of its parts are
        replaced.
      sampler: with a prior over latents, a UNet without labels and DDIM.
      params: {"prior": ..., "autoencoder": ...}, stored as float32.

    Raises:
      ValueError: diffusers cannot express the prior, its solver or the autoencoder, which is found
        before anything is written; or parameters are refused as in `save_diffusers_unet`.
    """
    directory, prior = pathlib.Path(directory).expanduser(), sampler.prior
    if not (sampler.latents and isinstance(prior, DiffusionSampler)):
        raise ValueError("an LDMPipeline draws latents by diffusion, not codes")
    model, autoencoder = prior.model, sampler.autoencoder
    network, (height, width, _) = model.network.config, model.shape
    if model.classes or model.process.variance == "learned" or height != width:
        raise ValueError(
            "an LDMPipeline has square latents, and a UNet without classes and variances"
        )
    scheduler = to_ddim_options(model.process, prior.solver)
    to_config(to_options(network, height, width))  # refuses by name what would not come back
    kind = "VQModel" if autoencoder.quantiser.discrete else "AutoencoderKL"
    _, save = _AUTOENCODERS[kind]
    save(directory / "vqvae", autoencoder, params["autoencoder"])
    save_diffusers_unet(directory / "unet", network, params["prior"], sample_size=height)
    files.write_json(directory / "scheduler" / SCHEDULER, scheduler)
    kinds = {part: names[0] for part, names in _PARTS.items()} | {"vqvae": kind}
    index = {part: ["diffusers", name] for part, name in kinds.items()}
    files.write_json(directory / _INDEX, {"_class_name": "LDMPipeline"} | index)


def _check_index(directory):
    """The classes of the parts, by name; refuses another pipeline, and parts of other classes."""
    path = directory / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {_INDEX}")
    stored = read_json(path)
    name = stored.get("_class_name") if isinstance(stored, dict) else None
    if name != "LDMPipeline":
        raise ValueError(f"{path} is not of an LDMPipeline: _class_name={reprlib.repr(name)}")
    refusals = Refusals(dict.fromkeys(_PARTS) | stored)
    for part, kinds in _PARTS.items():
        supported = [["diffusers", kind] for kind in kinds]
        refusals.unless(
            part,
            lambda value, supported=supported: value in supported,
            " or ".join(map(json.dumps, supported)),
        )
    if refusals.problems:
        raise ValueError(f"{path} has parts that are not supported: {'; '.join(refusals.problems)}")
    return {part: stored[part][1] for part in _PARTS}


def _check_parts(directory, kind):
    """Refuses networks that the pipeline cannot put together, before any weights are read."""
    folder, unet, _ = read_network(directory / "unet")
    _, layout = read_layout(directory / "vqvae", kind)
    options = {"sample_size": None, "num_class_embeds": None} | read_json(folder / CONFIG)
    refusals = Refusals(options)
    refusals.unless("sample_size", lambda value: type(value) is int, "an integer, of the latents")
    refusals.unless("num_class_embeds", lambda value: value is None, "null: there are no labels")
    if refusals.problems:
        raise ValueError(f"{folder} is not of an LDMPipeline: {'; '.join(refusals.problems)}")
    if unet.channels != layout.quantiser.width:
        raise ValueError(
            f"{directory}: the UNet draws latents of {unet.channels} channels, but the {kind} "
            f"decodes latents of {layout.quantiser.width}"
        )
