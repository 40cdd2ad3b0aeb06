"""Figures of many rows of data, a batch at a time over all devices of this host."""

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gen_jax import hosts, parallel, signals, trees
from gen_jax.parts import Parts

__all__ = ["in_parts", "kept_figures", "log_prob", "map_batches", "map_rows"]


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
    keeper = _KEEPER.get()

    def map_batch(chosen):
        some = parallel.split(mesh, jax.tree.map(lambda leaf: leaf[chosen], rows))
        return jax.device_get(f(params, some))

    def batches(of):
        """The results of these batches of rows, those past the end as the last row."""
        for first in of:
            chosen = np.minimum(np.arange(first, first + size), number - 1)
            yield _made_or_kept(map_batch, chosen, rows)

    params = jax.device_get(params)
    if keeper is not None:
        keeper.begin(f, params)
    params, starts = parallel.replicate(mesh, params), range(0, number, size)
    if keeper is None or jax.process_count() == 1:
        results = list(batches(_shown(starts)))
    else:
        results = [_of_all_hosts(batches, starts)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *results)


def map_batches(f: Callable[[Any, Any], Any], params: Any, rows: Any, batch: int) -> list[Any]:
    """f(params, batch) of batches of rows whose result is of all of them, say a mean, in order.

    Args:
      f: jitted; maps a tree of arrays [B, ...] to a tree of arrays.
      params: what `f` takes first.
      rows: a tree of NumPy arrays [N, ...], N at least 1.
      batch: most rows at a time.

    Returns:
      Trees of NumPy arrays; what each is of are the next `batch` rows, or the last ones.
    """
    number, keeper = len(jax.tree.leaves(rows)[0]), _KEEPER.get()

    def map_batch(chosen):
        return jax.device_get(f(params, jax.tree.map(lambda leaf: leaf[chosen], rows)))

    if keeper is not None:
        keeper.begin(f, params)
    results = []
    for first in _shown(range(0, number, batch)):
        chosen = np.arange(first, min(first + batch, number))
        results.append(_made_or_kept(map_batch, chosen, rows))
    return results


def _made_or_kept(map_batch, chosen, rows):
    """The results of a batch, which are kept within `in_parts`."""
    keeper = _KEEPER.get()
    return map_batch(chosen) if keeper is None else keeper.kept(map_batch, chosen, rows)


def kept_figures(make: Callable[[], dict[str, Any]], of: Any) -> dict[str, Any]:
    """make(), figures in JSON values, which another run reads where this one was killed after it.

    Args:
      make: takes long, and has no batches.
      of: a tree of all arrays and texts that the figures depend on beside the configuration.
    """
    keeper = _KEEPER.get()
    return make() if keeper is None else keeper.figures(make, of)


def _of_all_hosts(batches, starts):
    """The results of all batches, of which each host makes an equal share."""
    count, index = jax.process_count(), jax.process_index()
    share = -(-len(starts) // count)
    mine = [starts[min(i, len(starts) - 1)] for i in range(index * share, (index + 1) * share)]
    ours = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches(_shown(mine)))
    return jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), hosts.gather("all rows are measured", ours)
    )


class _Keeper:
    """Keeps the results of batches, and figures, and reads those that are there."""

    def __init__(self, parts):
        self._parts, self._calls = parts, 0

    def begin(self, f, params):
        """Begins with another function of rows; the calls of an evaluation are always the same."""
        self._calls += 1
        self._params, self._f = params, f
        self._made_of = trees.digest(params)

    def kept(self, map_batch, chosen, rows):
        """The results of a batch, made or read."""
        batch = jax.tree.map(lambda leaf: leaf[chosen], rows)
        facts = {"params": self._made_of, "rows": trees.digest(batch)}
        name = f"{self._calls:03d}-{chosen[0]:012d}"
        part = self._parts.read(name)
        if part is not None and part[1] == facts:
            structure = jax.tree.structure(jax.eval_shape(self._f, self._params, batch))
            return jax.tree.unflatten(structure, [part[0][key] for key in sorted(part[0])])
        with signals.finishing("the rows at work"):
            result = map_batch(chosen)
            leaves = enumerate(jax.tree.leaves(result))
            self._parts.keep(name, {f"leaf{i:03d}": leaf for i, leaf in leaves}, facts)
        return result

    def figures(self, make, of):
        """Figures, made or read."""
        self._calls += 1
        name, digest = f"{self._calls:03d}", trees.digest(of)
        part = self._parts.read(name)
        if part is not None and part[1].get("of") == digest:
            return part[1]["figures"]
        figures = make()
        self._parts.keep(name, {}, {"of": digest, "figures": figures})
        return figures


_KEEPER: contextvars.ContextVar[_Keeper | None] = contextvars.ContextVar("keeper", default=None)


@contextlib.contextmanager
def in_parts(parts: Parts) -> Iterator[None]:
    """Keeps what the functions here have finished in the block, so that another run goes on there.

    All hosts come here together: the rows of `map_rows` are shared among them.
    """
    token = _KEEPER.set(_Keeper(parts))
    try:
        yield
    finally:
        _KEEPER.reset(token)


def _shown(batches):
    return tqdm(batches, "evaluating", unit="batch", disable=not sys.stderr.isatty())


def log_prob(model: Any, params: Any, rows: Any, batch: int) -> np.ndarray:
    """The exact log-probability [N] of each row by a model that has `log_prob`, in nats.

    The arguments are those of `map_rows`.
    """
    return map_rows(functools.partial(_log_prob, model), params, rows, batch)


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(model, params, rows):
    return model.log_prob(params, rows)
