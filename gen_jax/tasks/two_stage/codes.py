"""The codes of a data set, encoded once and kept in a file that is mapped into memory."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gen_jax import checkpoint, evaluation, whole_file
from gen_jax.data import Images
from gen_jax.data.exact import Enumerated
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.vq import Autoencoder

__all__ = ["check", "distribution", "encoded", "kept"]

_BATCH = 256


def encoded(model: Autoencoder, params: Any, images: np.ndarray, latents: bool) -> np.ndarray:
    """The code sequences int32 [N, L] of images uint8, or their latents float32 [N, h, w, D].

    Latents are those before they are quantised, or the mean of a continuous one, over their
    deviation.
    """
    f = functools.partial(_encode, model, latents)
    return evaluation.map_rows(f, params, {"image": images}, _BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(model, latents, params, rows):
    x = to_signal(rows["image"])
    if not latents:
        return model.encode(params, x).code.reshape(len(x), -1)
    values = model.network.encode(params["network"], x, None)
    return model.quantiser.centre(values) / params["deviation"]


def distribution(codes: np.ndarray, vocabulary: int) -> Enumerated:
    """Of the code sequences [N, L] of equally likely images, which may share theirs."""
    distinct, counts = np.unique(codes.astype(np.int32), axis=0, return_counts=True)
    return Enumerated(distinct, counts / len(codes), vocabulary)


def kept(
    folder: pathlib.Path,
    name: str,
    images: Images,
    identity: str,
    encode: Callable[[np.ndarray], np.ndarray],
    mirrored: bool,
) -> np.ndarray:
    """The codes of a data set, from a file of the folder, which is written where it is not there.

    Args:
      folder: of the files.
      name: of what is encoded, such as "train".
      images: the data set.
      identity: the digest of the autoencoder, and of what is kept of its output.
      encode: images uint8 to codes.
      mirrored: whether the images mirrored left to right follow.

    Returns:
      An array [N, ...] or [2 N, ...], mapped into memory, read only.

    Raises:
      ValueError: the file is damaged.
    """
    data = hashlib.blake2b(np.ascontiguousarray(images.images).tobytes(), digest_size=16)
    key = f"{name}-{identity[:12]}-{data.hexdigest()[:12]}{'-mirrored' if mirrored else ''}"
    path, record = folder / f"{key}.npy", folder / f"{key}.json"
    if not (path.exists() and record.exists()):
        whole = images.images
        if mirrored:
            whole = np.concatenate([whole, whole[:, :, ::-1]])
        _write(path, record, encode(whole))
    return _read(path, record)


def check(folder: pathlib.Path) -> None:
    """Raises a ValueError where a file of codes in a folder is damaged; the first is named."""
    for record in sorted(folder.glob("*.json")):
        if record.with_suffix(".npy").exists():
            _read(record.with_suffix(".npy"), record)


def _read(path, record):
    problem = f"{path} is damaged: remove it, and it is written again"
    try:
        codes = np.load(path, mmap_mode="r")
        stored = json.loads(record.read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(problem) from error
    if stored != checkpoint.digest(codes):
        raise ValueError(problem)
    return codes


def _write(path, record, codes):
    """Both files whole, the codes first."""
    with whole_file.replacing(path) as file:
        np.save(file, codes)
    whole_file.write(record, json.dumps({"digest": checkpoint.digest(codes)}))
