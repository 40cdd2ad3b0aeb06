"""Weights of diffusers: its names for our parameters, and the layouts that differ.

Kernels are transposed (channels last here, first there), and the query, key and value of an
attention layer are one matrix here, three there. A product over channels alone may be stored as a
convolution of size 1.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gen_jax.interop import files

__all__ = ["WEIGHTS", "Names", "last_level", "names", "read", "write"]

Names = Callable[[tuple[str, ...]], list[str]]
"""diffusers' names for one of our parameters by its path; three for a part of "qkv"."""

WEIGHTS = "diffusion_pytorch_model.safetensors"

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
# Products over channels alone that diffusers stores as convolutions of size 1.
_POINTWISE = re.compile(r"(conv_shortcut|quant_conv)\.weight$")


def read(directory: pathlib.Path, abstract_params: Mapping, names: Names) -> dict[str, Any]:
    """The parameters in a folder as a tree of float32 arrays.

    Args:
      directory: holds the weights.
      abstract_params: their shapes by path.
      names: see `Names`.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: the weights are pickled, sharded or damaged, or tensors are missing, unknown or of
        another shape.
    """
    tensors = _read_tensors(directory, files.count(abstract_params))
    expected = _export(abstract_params, names)
    tensors = {name: _squeeze(name, tensor, expected) for name, tensor in tensors.items()}
    files.check(directory / WEIGHTS, files.shapes(expected), files.shapes(tensors))
    return _import(abstract_params, tensors, names)


def write(
    directory: pathlib.Path,
    options: dict[str, Any],
    params: Mapping[str, Any],
    abstract_params: Mapping,
    names: Names,
) -> None:
    """Writes config.json and the weights, each whole; the arguments are as for `read`.

    Raises:
      ValueError: parameters are missing, unknown or of another shape, or the folder holds sharded
        weights, which diffusers would read instead.
    """
    index = files.index_name(WEIGHTS)
    if (directory / index).exists():
        raise ValueError(f"{directory} holds sharded weights ({index}); choose another folder")
    given = traverse_util.flatten_dict(params)
    files.check("params", files.shapes(abstract_params), files.shapes(given))
    files.write(directory, options, WEIGHTS, _export(given, names))


def _read_tensors(directory, parameters):
    path = directory / WEIGHTS
    if (index := directory / files.index_name(WEIGHTS)).exists():
        raise ValueError(
            f"{directory} holds sharded weights ({index.name}), which are not supported; "
            "save the model again as one file"
        )
    stored = files.read_tensors(files.find_weights(directory, WEIGHTS), parameters)
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


def _export(leaves, names):
    """Our parameters by path as diffusers' tensors by name."""
    tensors = {}
    for path, leaf in leaves.items():
        ours = names(path)
        for name, part in zip(ours, np.split(np.asarray(leaf), len(ours), axis=-1), strict=True):
            if path[-1] == "kernel":  # [..., in, out] -> [out, in, ...]
                part = np.moveaxis(part, (-1, -2), (0, 1))
            if _POINTWISE.search(name):
                part = part[:, :, None, None]
            if path[-1] == "codebook":  # the first table of one
                part = part[0]
            tensors[name] = part
    return tensors


def _import(abstract_params, tensors, names):
    """The inverse of `_export`, as a tree of float32 arrays."""
    leaves = {}
    for path, leaf in abstract_params.items():
        parts = [
            tensors[name][:, :, 0, 0] if _POINTWISE.search(name) else tensors[name]
            for name in names(path)
        ]
        if path[-1] == "kernel":
            parts = [np.moveaxis(part, (0, 1), (-1, -2)) for part in parts]
        leaves[path] = jnp.asarray(np.concatenate(parts, axis=-1).reshape(leaf.shape))
    return traverse_util.unflatten_dict(leaves)


def names(path: tuple[str, ...], last: int) -> list[str]:
    """diffusers' names for a parameter of a network of blocks; see `Names`.

    Args:
      path: of the parameter.
      last: the coarsest level.
    """
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


def last_level(leaves: Mapping) -> int:
    """The coarsest level of a network with these leaves."""
    return max(int(path[0].split("_")[1]) for path in leaves if path[0].startswith("down_"))
