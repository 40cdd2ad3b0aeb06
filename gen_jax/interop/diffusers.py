"""UNets in the format of diffusers' `UNet2DModel`: config.json and one safetensors file.

The same network under other names: kernels are transposed (channels last here, first there), and
the query, key and value of an attention layer are one matrix here, three there. A network with
patches is written as one of folded images: the channels of a square of p x p pixels come in the
order (row, column, channel), and `"_patch": p` in config.json says so. Options of `UNet2DModel`
that `gen_jax.nn.unet.UNetNetwork` does not have are refused by name; an option that config.json
leaves out has the default of diffusers 0.42, not ours.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gen_jax.interop import diffusers_tensors, files
from gen_jax.interop.diffusers_options import read_network, to_config, to_options
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork

__all__ = ["load_diffusers_unet", "save_diffusers_unet"]

_DDPM = DiffusionConfig()


def load_diffusers_unet(
    directory: str | os.PathLike, process: DiffusionConfig = _DDPM
) -> tuple[DiffusionModel, dict]:
    """The model of images in a folder that diffusers' `UNet2DModel` wrote.

    Args:
      directory: holds config.json and diffusion_pytorch_model.safetensors, or a folder "unet"
        that does (a pipeline). Weights in float16 or bfloat16 become float32.
      process: the process that the network was trained for, which the folder does not say; by
        default that of DDPM.

    Returns:
      The model and its float32 parameters. A network of N classes without one for "no class", as
      diffusers trains them, needs labels and cannot be guided: its process hides no labels. Images
      have the file's `sample_size`, at which attention sits where it does in diffusers; a file
      without one has no attention there, and images then have the smallest size that fits. The
      network takes other sizes too, but places attention by height.

    Raises:
      FileNotFoundError: there is no config.json, or there are no weights.
      ValueError: the options cannot be expressed (each is named), the network does not fit the
        process, the weights are pickled, sharded or damaged, or tensors are missing, unknown or of
        another shape.
    """
    directory, config, sample_size = read_network(directory)
    _check_process(config, process)
    if not config.null_class:
        process = dataclasses.replace(process, label_dropout=0.0)
    network = UNetNetwork(config)
    model = DiffusionModel(network, process, (*sample_size, config.channels))
    abstract_params = files.abstract_params(network, *sample_size)
    return model, diffusers_tensors.read(directory, abstract_params, _names_of(abstract_params))


def save_diffusers_unet(
    directory: str | os.PathLike,
    config: UNetConfig,
    params: Mapping[str, Any],
    *,
    sample_size: int | tuple[int, int],
) -> None:
    """Writes a network so that `diffusers.UNet2DModel.from_pretrained` loads it.

    A reader sees each file whole, the old one or the new one. The last class of a network with a
    `null_class` is "no class". `config.dtype` is not stored.

    Args:
      directory: created when it does not exist; config.json and the weights in it are replaced.
      config: the sizes of the network.
      params: its parameters, stored as float32.
      sample_size: height and width of the images, before they are folded into patches. diffusers
        places attention by level: heights in `config.attention` become the levels which have them
        at this size.

    Raises:
      ValueError: diffusers cannot express the configuration, the size does not fit the network,
        parameters are missing, unknown or of another shape, or the folder holds sharded weights,
        which diffusers would read instead.
    """
    directory = pathlib.Path(directory).expanduser()
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if min(height, width) < 1 or height % config.stride or width % config.stride:
        raise ValueError(
            f"sample_size={sample_size} does not fit the network "
            f"(supported: multiples of {config.stride})"
        )
    options = to_options(config, height, width)
    to_config(options)  # refuses by name what would not come back
    expected = files.abstract_params(UNetNetwork(config), height, width)
    diffusers_tensors.write(directory, options, params, expected, _names_of(expected))


def _check_process(config, process):
    needed = config.channels * (2 if process.variance == "learned" else 1)
    if config.out_channels != needed:
        raise ValueError(
            f"the network predicts {config.out_channels} channels for images of {config.channels}, "
            f"where a process with variance={process.variance} needs {needed}"
        )


def _names_of(leaves: Mapping) -> diffusers_tensors.Names:
    """diffusers' names for each parameter of a UNet with these leaves."""
    return functools.partial(diffusers_tensors.names, last=diffusers_tensors.last_level(leaves))
