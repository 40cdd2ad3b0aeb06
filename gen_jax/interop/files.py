"""Folders with config.json and weights in safetensors, as diffusers and transformers write them."""

import functools
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from gen_jax import whole_file
from gen_jax.bounded import read_json
from gen_jax.interop.config_json import CONFIG

__all__ = [
    "abstract_params",
    "check",
    "count",
    "find_weights",
    "index_name",
    "listing",
    "read_tensors",
    "shapes",
    "write",
]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_TYPES = ("F32", "F16", "BF16")  # as safetensors calls float32, float16 and bfloat16
# Axes of a tensor; numbers on an axis, and those that a file may have beside what the network has.
_MOST_AXES, _MOST_NUMBERS = 8, 2**24
_SHOWN = 100  # characters of a name


def index_name(weights: str) -> str:
    """The file that lists the shards of a file of weights."""
    return f"{weights}.index.json"


def find_weights(directory: pathlib.Path, weights: str) -> pathlib.Path:
    """The one file of weights, or, where there is none but an index of shards, that index.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: there is both, or the weights are pickled.
    """
    path, index = directory / weights, directory / index_name(weights)
    if path.is_file() and index.exists():
        raise ValueError(f"{directory} holds both {weights} and {index.name}; remove one of them")
    if index.exists():
        return index
    if path.is_file():
        return path
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ValueError(
            f"{directory} has pickled weights only ({', '.join(pickled)}), which can run code when "
            f"they are read; convert them to {weights}"
        )
    raise FileNotFoundError(f"{directory} has no {weights}")


def read_tensors(
    path: pathlib.Path, parameters: int, ignored: re.Pattern | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a file or, given an index, of all its shards.

    Args:
      path: of `find_weights`.
      parameters: of the network; files with far more numbers are refused before they are read.
      ignored: names to leave out (searched), whatever their type.

    Returns:
      float32 arrays by name; float16 and bfloat16 are converted.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a file is damaged, the index does not fit the shards, a tensor has another type,
        or there are far too many numbers.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, parameters, ignored)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = [n for n in list(file.keys()) if ignored is None or not ignored.search(n)]
            _check_header(path, {name: file.get_slice(name) for name in names}, parameters)
            return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_header(path, slices, parameters):
    """Refuses tensors that the network cannot have, before any of them is read."""
    total = 0
    for name, tensor in slices.items():
        kind, shape = tensor.get_dtype(), tensor.get_shape()
        if kind not in _TYPES:
            raise ValueError(f"{path}: {name} is {kind} (supported: {', '.join(_TYPES)})")
        if len(shape) > _MOST_AXES or max(shape, default=0) > _MOST_NUMBERS:
            raise ValueError(f"{path}: {name} is of the shape {reprlib.repr(shape)}")
        total += math.prod(shape)
    _check_total(path, total, parameters)


def _check_total(path, total, parameters):
    if total > 2 * parameters + _MOST_NUMBERS:  # a table may be there twice, and names be wrong
        raise ValueError(f"{path} has {total} numbers, but the network has {parameters}")


def _read_shards(index, parameters, ignored):
    stored = read_json(index)
    places = stored.get("weight_map") if isinstance(stored, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is damaged: it has no weight_map")
    shards = set(map(str, places.values()))
    if wrong := [shard[:_SHOWN] for shard in shards if not _is_file_name(shard)]:
        raise ValueError(f"{index} names {listing(sorted(wrong))}, not files beside it")
    tensors, found = {}, {}
    for shard in sorted(shards):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent} has no {shard}, which {index.name} names")
        for name, tensor in read_tensors(index.parent / shard, parameters, ignored).items():
            if name in found:
                raise ValueError(f"{index.parent} has {name} in both {found[name]} and {shard}")
            tensors[name], found[name] = tensor, shard
        _check_total(index, count(tensors), parameters)
    places = {n: s for n, s in places.items() if ignored is None or not ignored.search(n)}
    if differing := sorted(n for n in places.keys() | found if places.get(n) != found.get(n)):
        raise ValueError(f"{index} does not fit its shards: {listing(differing)}")
    return tensors


def _is_file_name(value):
    return re.fullmatch(r"\w[\w.\-]*\.safetensors", value) is not None


def check(
    where: str | pathlib.Path, expected: Mapping[str, tuple], given: Mapping[str, tuple]
) -> None:
    """Compares shapes by name.

    Raises:
      ValueError: shapes are missing, unknown or differ; one line names them.
    """
    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"missing {listing(missing)}")
    if extra := [name for name in given if name not in expected]:
        problems.append(f"unknown {listing(extra)}")
    wrong = [
        f"{name} {list(given[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if wrong:
        problems.append(f"wrong shape: {listing(wrong)}")
    if problems:
        raise ValueError(f"{where} does not fit the network: {'; '.join(problems)}")


def listing(names: Iterable[str], shown: int = 8) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@functools.lru_cache(maxsize=16)
def abstract_params(network: Any, *sizes: int) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of `network.init(key, *sizes)` by path, as zeros that take no memory."""
    shapes = jax.eval_shape(lambda key: network.init(key, *sizes), jax.random.key(0))
    zero = np.zeros((), np.float32)
    return {
        path: np.broadcast_to(zero, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }


def count(leaves: Mapping) -> int:
    """How many numbers the leaves have."""
    return sum(math.prod(np.shape(leaf)) for leaf in leaves.values())


def shapes(leaves: Mapping) -> dict[str, tuple]:
    """Shapes by name; paths are joined with "/"."""
    return {
        name if isinstance(name, str) else "/".join(name): np.shape(leaf)
        for name, leaf in leaves.items()
    }


def write(
    directory: pathlib.Path, options: Mapping, weights: str, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes config.json and the weights as float32; a reader sees each file whole, old or new."""
    tensors = {n: np.ascontiguousarray(tensor, np.float32) for n, tensor in tensors.items()}
    with whole_file.replacing(directory / weights) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    write_json(directory / CONFIG, options)


def write_json(path: pathlib.Path, options: Mapping) -> None:
    """Writes a file of options into a folder that is made where there is none, whole."""
    whole_file.write(path, json.dumps(options, indent=2, sort_keys=True) + "\n")
