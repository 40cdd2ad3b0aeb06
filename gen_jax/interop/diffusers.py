"""UNets in the format of diffusers' `UNet2DModel`: config.json and one safetensors file.

The same network under other names: kernels are transposed (channels last here, first there), and
the query, key and value of an attention layer are one matrix here, three there. A network with
patches is written as one of folded images: the channels of a square of p x p pixels come in the
order (row, column, channel), and `"_patch": p` in config.json says so. Options of `UNet2DModel`
that `gen_jax.nn.unet.UNetNetwork` does not have are refused by name; an option that config.json
leaves out has the default of diffusers 0.42, not ours.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gen_jax.interop import files
from gen_jax.interop.diffusers_options import read_network, to_config, to_options
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork

__all__ = ["load_diffusers_unet", "save_diffusers_unet"]

_DDPM = DiffusionConfig()
_WEIGHTS = "diffusion_pytorch_model.safetensors"

_LAYERS = {
    "conv_in": "conv_in",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "class": "class_embedding",
    "middle_attention": "mid_block.attentions.0",
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_SUBLAYERS = {
    "norm_0": ["norm1"],
    "conv_0": ["conv1"],
    "time": ["time_emb_proj"],
    "norm_1": ["norm2"],
    "conv_1": ["conv2"],
    "shortcut": ["conv_shortcut"],
    "norm": ["group_norm"],
    "qkv": ["to_q", "to_k", "to_v"],
    "project": ["to_out.0"],
}
_ATTENTION = re.compile(r"\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight$")
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
    tensors = _read_tensors(directory)
    expected = _export(abstract_params)
    tensors = {name: _squeeze(name, tensor, expected) for name, tensor in tensors.items()}
    files.check(directory / _WEIGHTS, files.shapes(expected), files.shapes(tensors))
    return model, _import(abstract_params, tensors)


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
    index = files.index_name(_WEIGHTS)
    if (directory / index).exists():
        raise ValueError(f"{directory} holds sharded weights ({index}); choose another folder")
    given = traverse_util.flatten_dict(params)
    expected = files.abstract_params(UNetNetwork(config), height, width)
    files.check("params", files.shapes(expected), files.shapes(given))
    files.write(directory, options, _WEIGHTS, _export(given))


def _check_process(config, process):
    needed = config.channels * (2 if process.variance == "learned" else 1)
    if config.out_channels != needed:
        raise ValueError(
            f"the network predicts {config.out_channels} channels for images of {config.channels}, "
            f"where a process with variance={process.variance} needs {needed}"
        )


def _read_tensors(directory):
    path = directory / _WEIGHTS
    if (index := directory / files.index_name(_WEIGHTS)).exists():
        raise ValueError(
            f"{directory} holds sharded weights ({index.name}), which are not supported; "
            "save the model again as one file"
        )
    stored = files.read_tensors(files.find_weights(directory, _WEIGHTS))
    tensors = {}
    for name, tensor in stored.items():
        new = _OLD_ATTENTION.sub(lambda match: f"{match[1]}.{_NEW_NAMES[match[2]]}.", name)
        if new in tensors or (new != name and new in stored):
            raise ValueError(f"{path} has {new} under its old and its new name")
        tensors[new] = tensor
    return tensors


def _squeeze(name, tensor, expected):
    """An attention weight that was stored as a convolution of size 1, as a matrix."""
    if _ATTENTION.search(name) and name in expected and tensor.ndim > 2:
        rows, columns, *rest = tensor.shape
        if set(rest) == {1}:
            return tensor.reshape(rows, columns)
    return tensor


def _export(leaves):
    """Our parameters by path as diffusers' tensors by name."""
    last = _last_level(leaves)
    tensors = {}
    for path, leaf in leaves.items():
        names = _names(path, last)
        for name, part in zip(names, np.split(np.asarray(leaf), len(names), axis=-1), strict=True):
            if path[-1] == "kernel":  # [..., in, out] -> [out, in, ...]
                part = np.moveaxis(part, (-1, -2), (0, 1))
            if path[-2] == "shortcut" and path[-1] == "kernel":
                part = part[:, :, None, None]
            tensors[name] = part
    return tensors


def _import(abstract_params, tensors):
    """The inverse of `_export`, as a tree of float32 arrays."""
    last = _last_level(abstract_params)
    leaves = {}
    for path, leaf in abstract_params.items():
        parts = [tensors[name] for name in _names(path, last)]
        if path[-1] == "kernel":
            if path[-2] == "shortcut":
                parts = [part[:, :, 0, 0] for part in parts]
            parts = [np.moveaxis(part, (0, 1), (-1, -2)) for part in parts]
        leaves[path] = jnp.asarray(np.concatenate(parts, axis=-1).reshape(leaf.shape))
    return traverse_util.unflatten_dict(leaves)


def _names(path, last):
    """diffusers' names for one of our parameters; three for a part of "qkv"."""
    layer, *sublayer, leaf = path
    if place := re.fullmatch(r"(down|up)_(\d+)_(block|attention|conv)(?:_(\d+))?", layer):
        side, level, kind, index = place.groups()
        level = int(level) if side == "down" else last - int(level)
        if kind == "conv":
            prefix = f"{side}_blocks.{level}.{side}samplers.0.conv"
        else:
            module = {"block": "resnets", "attention": "attentions"}[kind]
            prefix = f"{side}_blocks.{level}.{module}.{index}"
    else:
        prefix = _LAYERS[layer]
    suffix = "bias" if leaf == "bias" else "weight"
    if not sublayer:
        return [f"{prefix}.{suffix}"]
    return [f"{prefix}.{name}.{suffix}" for name in _SUBLAYERS[sublayer[0]]]


def _last_level(leaves):
    return max(int(path[0].split("_")[1]) for path in leaves if path[0].startswith("down_"))
