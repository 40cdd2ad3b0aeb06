"""Autoencoders in the format of diffusers' `VQModel` and `AutoencoderKL`.

The same networks under other names; see `diffusers_tensors`. What we call `project` is there a
convolution of size 1, `quant_conv` and `post_quant_conv`. diffusers' `VQModel.encode` gives what
our encoder gives to the quantiser, and its `decode` quantises that first. The `scaling_factor` of
config.json is one over the deviation of the latents.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gen_jax.interop import diffusers_tensors, files
from gen_jax.interop.diffusers_autoencoder_options import read_layout, to_layout, to_options
from gen_jax.models.vq import Autoencoder, AutoencoderOptions, make_autoencoder

__all__ = [
    "load_diffusers_kl",
    "load_diffusers_vq",
    "save_diffusers_kl",
    "save_diffusers_vq",
]


def load_diffusers_vq(directory: str | os.PathLike) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder in a folder that diffusers' `VQModel` wrote.

    Args:
      directory: holds config.json and diffusion_pytorch_model.safetensors. Weights in float16 or
        bfloat16 become float32.

    Returns:
      The model, with a `Codebook` that further training moves by its gradient, and its float32
      parameters. Images have the file's `sample_size`.

    Raises:
      FileNotFoundError: there is no config.json, or there are no weights.
      ValueError: the options cannot be expressed (each is named), the weights are pickled, sharded
        or damaged, or tensors are missing, unknown or of another shape.
    """
    return _load(directory, "VQModel")


def load_diffusers_kl(directory: str | os.PathLike) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder in a folder that diffusers' `AutoencoderKL` wrote; see `load_diffusers_vq`.

    Returns:
      The model, with a `Gaussian` latent, and its float32 parameters.
    """
    return _load(directory, "AutoencoderKL")


def save_diffusers_vq(
    directory: str | os.PathLike, model: Autoencoder, params: Mapping[str, Any]
) -> None:
    """Writes an autoencoder so that `diffusers.VQModel.from_pretrained` loads it.

    A reader sees each file whole, the old one or the new one. Moving averages of a codebook, and
    `dtype`, are not stored.

    Args:
      directory: created when it does not exist; config.json and the weights in it are replaced.
      model: with a `Codebook` of one table.
      params: its parameters, stored as float32.

    Raises:
      ValueError: diffusers cannot express the model, parameters are missing, unknown or of another
        shape, or the folder holds sharded weights, which diffusers would read instead.
    """
    _save(directory, model, params, "VQModel")


def save_diffusers_kl(
    directory: str | os.PathLike, model: Autoencoder, params: Mapping[str, Any]
) -> None:
    """Writes an autoencoder with a `Gaussian` latent so that `diffusers.AutoencoderKL` loads it.

    The arguments and what it raises are those of `save_diffusers_vq`.
    """
    _save(directory, model, params, "AutoencoderKL")


def _load(directory, kind):
    """The model and its parameters."""
    folder, layout = read_layout(directory, kind)
    shape = (*layout.size, layout.network.channels)
    model = make_autoencoder(layout.network, layout.quantiser, AutoencoderOptions(), shape)
    params = diffusers_tensors.read(folder, _abstract_params(model), _names(model))
    quantiser, deviation = params.get("quantiser", {}), jnp.float32(1 / layout.scale)
    return model, params | {"quantiser": quantiser, "deviation": deviation}


def _save(directory, model, params, kind):
    size, scale = model.shape[:2], 1 / float(params["deviation"])
    options = to_options(model.network.config, model.quantiser.options, size, scale)
    if options["_class_name"] != kind:
        raise ValueError(f"this is a {options['_class_name']}, not a {kind}")
    to_layout(options, kind)  # refuses by name what would not come back
    path = pathlib.Path(directory).expanduser()
    tensors = {name: tree for name, tree in params.items() if name != "deviation"}
    diffusers_tensors.write(path, options, tensors, _abstract_params(model), _names(model))


def _abstract_params(model):
    """Shapes of what is in the file of weights."""
    leaves = files.abstract_params(model)
    return {path: leaf for path, leaf in leaves.items() if path[0] != "deviation"}


def _names(model):
    """diffusers' names for each parameter of an autoencoder."""
    last = len(model.network.config.widths) - 1

    def names(path):
        if path[0] == "quantiser":
            return ["quantize.embedding.weight"]
        side, *rest = path[1:]
        if rest[0] == "project":
            module = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[side]
            return [f"{module}.{'bias' if rest[-1] == 'bias' else 'weight'}"]
        return [f"{side}.{name}" for name in diffusers_tensors.names(tuple(rest), last)]

    return names
