"""A request for samples whose finished parts are kept; see `parts`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gen_jax import parallel, sampling, signals, trees
from gen_jax.condition import Condition
from gen_jax.parts import FOLDER, Parts
from gen_jax.sampling import Chunk, Sampler

__all__ = ["Drawing"]


class Drawing:
    """Draws samples of one request, each of them once.

    Sample i depends on the seed and i alone, so that parts which were drawn before, on this machine
    or on another, are the samples that would be drawn now: bit for bit, as all parts of a request
    have one shape.

    Args:
      sampler: the strategy.
      params: what it reads.
      seed: of the samples.
      cond: of all samples of the request.
      whole: how many those are.
      micro_batch: most samples at a time.
      parts: parts(known) are the kept parts of this request, given what more is known of it.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Any,
        seed: int,
        cond: Condition,
        whole: int,
        micro_batch: int,
        parts: Callable[[dict[str, Any]], Parts],
    ):
        mesh = parallel.local_mesh()
        self._mesh = mesh if mesh.size > 1 else None
        self._sampler, self._params, self._seed = sampler, params, seed
        self._cond = jax.tree.map(np.asarray, cond)
        self._whole, self._micro_batch = whole, micro_batch
        self.size = sampling.size_for(whole, micro_batch, mesh.size)
        self._parts = parts({"seed": seed, "shape": self.size, "params": trees.digest(params)})
        self._there = [tuple(map(int, name.split("-"))) for name in self._parts.names()]
        self._read: Chunk | None = None  # the last one that was not drawn

    def draw(self, first: int, last: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Samples `first` to `last` - 1, and figures of them.

        Between two micro-batches a signal stops it; what was drawn is kept.

        Raises:
          ValueError: the samples of the sampler are not one array.
        """
        chunks = sampling.generate_many(
            self._sampler,
            self._params,
            self._seed,
            last - first,
            cond=jax.tree.map(lambda leaf: leaf[first:last], self._cond),
            start=first,
            whole=self._whole,
            micro_batch=self._micro_batch,
            mesh=self._mesh,
            kept=self._kept,
        )
        drawn: list[Chunk] = []
        while sum(len(chunk.samples) for chunk in drawn) < last - first:
            with signals.finishing("the samples at work"):
                chunk = next(chunks)
                if chunk is not self._read:
                    self._keep(chunk)
            drawn.append(chunk)
        return np.concatenate([chunk.samples for chunk in drawn]), {
            "nfe": self._sampler.nfe,
            "samples": last - first,
            "sample_compile_seconds": sum(chunk.compile_seconds for chunk in drawn),
            "samples_per_second": (last - first) / sum(chunk.seconds for chunk in drawn),
        }

    def _keep(self, chunk):
        if not isinstance(chunk.samples, np.ndarray):
            raise ValueError("the samples of a run must be one array")
        first, last = chunk.start, chunk.start + len(chunk.samples)
        facts = {"seconds": chunk.seconds, "conditions": self._conditions(first, last)}
        self._parts.keep(_name(first, last), {"samples": chunk.samples}, facts)

    def _kept(self, first, count):
        """A chunk from one or several parts; None where some of it is in none."""
        samples, seconds, at, end = [], 0.0, first, first + count
        while at < end:
            place = next((place for place in self._there if place[0] <= at < place[1]), None)
            part = None if place is None else self._parts.read(_name(*place))
            if part is None:
                self._there = [other for other in self._there if other != place]
                return None
            arrays, facts = part
            until = min(end, place[1])
            inside = slice(at - place[0], until - place[0])
            if facts["conditions"][inside] != self._conditions(at, until):
                raise ValueError(
                    "parts of the samples were drawn under other conditions: has the data changed? "
                    f"Remove the folder {FOLDER} of the work directory"
                )
            samples.append(arrays["samples"][inside])
            seconds += facts["seconds"] * (until - at) / (place[1] - place[0])
            at = until
        self._read = Chunk(first, np.concatenate(samples), seconds, 0.0)
        return self._read

    def _conditions(self, first, last):
        """A digest of the condition of each sample; nothing where there is none."""
        if not jax.tree.leaves(self._cond):
            return []
        rows = range(first, last)
        return [trees.digest(jax.tree.map(lambda leaf, i=i: leaf[i], self._cond)) for i in rows]


def _name(first, last):
    return f"{first:012d}-{last:012d}"
