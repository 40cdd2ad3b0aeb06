"""Figures of many rows of data, a batch at a time over all devices of this host."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gen_jax import parallel

__all__ = ["log_prob", "map_rows", "slices"]


def map_rows(f: Callable[[Any, Any], Any], params: Any, rows: Any, batch: int) -> Any:
    """f(params, rows) of all rows.

    Args:
      f: jitted; maps a tree of arrays [B, ...] to a tree of arrays [B, ...], each row by itself. It
        sees batches of one shape, the last of which is padded with copies of the last row.
      params: what `f` takes first; copied to every device.
      rows: a tree of NumPy arrays [N, ...], N at least 1.
      batch: rows at a time; rounded up to a multiple of the devices.

    Returns:
      A tree of NumPy arrays [N, ...].
    """
    mesh, number = parallel.local_mesh(), len(jax.tree.leaves(rows)[0])
    size = -(-min(batch, number) // mesh.size) * mesh.size
    params, parts = parallel.replicate(mesh, jax.device_get(params)), []
    for rows_of_batch in slices(number, size):
        first = rows_of_batch.start
        chosen = np.minimum(np.arange(first, first + size), number - 1)
        some = parallel.split(mesh, jax.tree.map(lambda leaf, c=chosen: leaf[c], rows))
        part = jax.device_get(f(params, some))
        parts.append(jax.tree.map(lambda leaf, n=number - first: leaf[:n], part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def slices(number: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` of `number` rows, with a bar on a terminal."""
    hidden = not sys.stderr.isatty()
    for first in tqdm(range(0, number, size), "evaluating", unit="batch", disable=hidden):
        yield slice(first, first + size)


def log_prob(model: Any, params: Any, rows: Any, batch: int) -> np.ndarray:
    """The exact log-probability [N] of each row by a model that has `log_prob`, in nats.

    The arguments are those of `map_rows`.
    """
    return map_rows(functools.partial(_log_prob, model), params, rows, batch)


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(model, params, rows):
    return model.log_prob(params, rows)
