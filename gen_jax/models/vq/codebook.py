"""Codebooks: nearest entries, residual tables and scales, moving averages, restart of dead entries.

VQ-VAE (van den Oord et al. 2017, 1711.00937): equations 1 to 3, and appendix A.1 for the moving
averages. Residual quantisation: SoundStream (Zeghidour et al. 2021, 2107.03312, algorithm 1), and
its restart of entries that stand for nothing (section III-C; Jukebox, 2005.00341, section 4). Maps
from coarse to fine: VAR (Tian et al. 2024, 2404.02905, algorithms 1 and 2).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from jaxtyping import Array, Float, Int32, Key

import kernels
from gen_jax import parallel
from gen_jax.config import frozen
from gen_jax.models.vq.config import CodebookOptions
from gen_jax.models.vq.contract import Quantised, batch_counts, straight_through, usage

__all__ = ["Codebook"]


@frozen
class Codebook:
    """R tables of K entries; see `contract.Quantiser`.

    The first table quantises the latents, and each further one what those before have left. Entry 0
    of each further table is zero and stays so: a table can always leave things as they are, so that
    the error never grows with depth. Of entries at the same distance the first one is taken.

    With scales, each table quantises the means of as many blocks as its scale has positions, and an
    entry counts for the whole of its block. The codes of an image are those of all scales in turn,
    each row by row. Where we differ from VAR: blocks are copied, not interpolated and convolved,
    which keeps the law above, and every scale has a table of its own.

    Parameters: {"codebook": [R, K, D]}. Statistics: "counts" [R, K] and "sums" [R, K, D], the
    moving averages N and m, where entries follow them; "used" int32 [R, K], uses since the last
    restart, and "age" int32, the steps so far, where entries are restarted.

    Attributes:
      options: sizes and weights.
    """

    options: CodebookOptions

    discrete: ClassVar[bool] = True

    @property
    def inputs(self) -> int:
        """D."""
        return self.options.width

    @property
    def width(self) -> int:
        """D."""
        return self.options.width

    @property
    def codes(self) -> int:
        """K."""
        return self.options.codes

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Entries uniform in [-1 / K, 1 / K], as in the code of VQ-VAE."""
        options = self.options
        shape = options.tables, options.codes, options.width
        codebook = jax.random.uniform(key, shape, minval=-1, maxval=1) / options.codes
        return {"codebook": _with_zeros(codebook)}

    def init_statistics(self, params: dict[str, Any]) -> dict[str, Any]:
        """Averages of one use of each entry; nothing used so far."""
        codebook, statistics = params["codebook"], {}
        if self.options.update == "moving_average":
            statistics |= {"counts": jnp.ones(codebook.shape[:2]), "sums": codebook}
        if self.options.restart_every:
            used = jnp.zeros(codebook.shape[:2], jnp.int32)
            statistics |= {"used": used, "age": jnp.int32(0)}
        return statistics

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One code for each position, or R with more than one table; or those of all scales.

        Raises:
          ValueError: the latents do not have the size of the last scale.
        """
        self.options.check_size(height, width)
        if self.options.scales:
            return (sum(side**2 for side in self.options.scales),)
        depth = self.options.depth
        return (height, width) if depth == 1 else (height, width, depth)

    def maps(self, code: Int32[Any, "B ..."]) -> tuple[Int32[Any, "B _ _"], ...]:
        """The codes of each table; see `Quantiser`."""
        if not self.options.scales:
            tables = code[..., None] if self.options.depth == 1 else code
            return tuple(tables[..., i] for i in range(self.options.depth))
        found, first = [], 0
        for side in self.options.scales:
            found.append(code[:, first : first + side**2].reshape(-1, side, side))
            first += side**2
        return tuple(found)

    def centre(self, latents: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """The latents themselves, float32."""
        return latents.astype(jnp.float32)

    def quantise(
        self,
        params: dict[str, Any],
        latents: Float[Array, "B height width D"],
        keys: Key[Array, " B"] | None = None,
    ) -> Quantised:
        """The nearest entries, and their sum; there is no randomness.

        The loss is beta |z - sg(e)|^2, a mean over all values that a table reads and summed over
        tables, where e is the entry for z; and |sg(z) - e|^2 as well where entries are trained by
        their gradient (1711.00937, eq. 3).
        """
        del keys
        options, codebook = self.options, params["codebook"]
        if options.update == "moving_average":
            codebook = jax.lax.stop_gradient(codebook)
        left = latents.astype(jnp.float32)
        codes, loss, value = [], jnp.float32(0), jnp.zeros_like(left)
        for i, table in enumerate(codebook):
            read = self._read(left, i)
            code = _nearest(read, table)
            entry = table[code]
            stopped = jax.lax.stop_gradient(entry)
            loss += options.commitment * jnp.square(read - stopped).mean()
            if options.update == "gradient":
                loss += jnp.square(jax.lax.stop_gradient(read) - entry).mean()
            codes.append(code)
            whole = _spread(stopped, left.shape)
            value, left = value + whole, left - whole
        value = straight_through(latents.astype(jnp.float32), value)
        return Quantised(value, self._joined(codes), loss)

    def _read(self, left, i):
        """What table i reads of a map [B, h, w, D]: the map, or the means of its blocks."""
        if not self.options.scales:
            return left
        side = self.options.scales[i]
        return reduce(left, "b (s p) (t q) d -> b s t d", "mean", s=side, t=side)

    def _joined(self, codes):
        if self.options.scales:
            return jnp.concatenate([code.reshape(len(code), -1) for code in codes], axis=1)
        return codes[0] if len(codes) == 1 else jnp.stack(codes, axis=-1)

    def lookup(
        self, params: dict[str, Any], code: Int32[Array, "B ..."]
    ) -> Float[Array, "B height width D"]:
        """The entries of a code, summed over tables."""
        entries = [
            table[ours] for table, ours in zip(params["codebook"], self.maps(code), strict=True)
        ]
        return sum(_spread(entry, entries[-1].shape) for entry in entries)

    def update(
        self,
        params: dict[str, Any],
        descended: dict[str, Any],
        statistics: dict[str, Any],
        latents: Float[Array, "B height width D"],
        code: Int32[Array, "B ..."],
        keys: Key[Array, " B"],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Array]]:
        """One step of the moving averages (1711.00937, eq. 6 to 8), and the restart of entries.

        With n_k of the batch's vectors z nearest to entry k: N_k <- g N_k + (1 - g) n_k,
        m_k <- g m_k + (1 - g) sum of these z, and the entry is m_k over N_k with Laplace smoothing.
        """
        options, before = self.options, params["codebook"]
        codebook, statistics = descended["codebook"], dict(statistics)
        counts = batch_counts(self.maps(code), options.codes)
        metrics = usage(counts)
        reads = self._reads(before, latents, code)
        if options.update == "moving_average":
            sums = self._sums(reads, code)
            old, new = options.decay, 1 - options.decay
            statistics["counts"] = old * statistics["counts"] + new * counts
            statistics["sums"] = old * statistics["sums"] + new * sums
            smooth = _laplace(statistics["counts"], options.epsilon)
            codebook = statistics["sums"] / smooth[..., None]
        if options.restart_every:
            statistics["used"] += counts.astype(jnp.int32)
            due = statistics["age"] % options.restart_every == 0
            first = statistics["age"] == 0
            dead = due & ((statistics["used"] == 0) | first)
            codebook, statistics = self._restart(reads, codebook, statistics, dead, keys)
            statistics["used"] = jnp.where(due, 0, statistics["used"])
            statistics["age"] += 1
        return {"codebook": _with_zeros(codebook)}, statistics, metrics

    def _reads(self, codebook, latents, code):
        """What each table read of the latents when they were given this code."""
        left, reads = latents.astype(jnp.float32), []
        for i, (table, ours) in enumerate(zip(codebook, self.maps(code), strict=True)):
            reads.append(self._read(left, i))
            left = left - _spread(table[ours], left.shape)
        return reads

    def _sums(self, reads, code):
        """Sums [R, K, D] over the whole batch of the vectors that each entry stood for."""
        pairs = zip(reads, self.maps(code), strict=True)
        sums = [_segment_sum(read, ours, self.options.codes) for read, ours in pairs]
        return parallel.sum(jnp.stack(sums))

    def _restart(self, reads, codebook, statistics, dead, keys):
        """Dead entries on vectors drawn from the batch, a different one for each if it has as many.

        `reads` is what each table read of the latents.
        """
        restarted = []
        for read, ours in zip(reads, dead, strict=True):
            vectors = _candidates(read, keys, self.options.codes)
            restarted.append(vectors[(jnp.cumsum(ours) - 1) % len(vectors)])
        restarted = jnp.stack(restarted)
        codebook = jnp.where(dead[..., None], restarted, codebook)
        if "counts" in statistics:
            statistics["counts"] = jnp.where(dead, 1.0, statistics["counts"])
            statistics["sums"] = jnp.where(dead[..., None], restarted, statistics["sums"])
        return codebook, statistics


def _nearest(latents, table):
    """The nearest entry of each vector, int32 [B, ...]; it has no gradient."""
    flat, table = jax.lax.stop_gradient((latents.reshape(-1, latents.shape[-1]), table))
    return kernels.nearest_code(flat, table)[0].reshape(latents.shape[:-1])


def _spread(values, shape):
    """Each vector of a map [B, s, t, D] for the whole of its block of a map of this shape."""
    if values.shape == shape:
        return values
    p, q = shape[1] // values.shape[1], shape[2] // values.shape[2]
    return repeat(values, "b s t d -> b (s p) (t q) d", p=p, q=q)


def _with_zeros(codebook):
    """With entry 0 of every table after the first at zero."""
    return codebook.at[1:, 0].set(0.0)


def _laplace(counts, epsilon):
    total = counts.sum(axis=1, keepdims=True)
    return (counts + epsilon) / (total + counts.shape[1] * epsilon) * total


def _segment_sum(vectors, code, codes):
    return jax.ops.segment_sum(
        vectors.reshape(-1, vectors.shape[-1]), code.reshape(-1), num_segments=codes
    )


def _candidates(latents, keys, number):
    """Vectors [M, D] from positions of the whole batch, in a random order, M about `number`.

    Every example draws positions of its own and numbers to sort by from its key, so that the
    result is the same on any number of devices.
    """
    flat = latents.astype(jnp.float32).reshape(latents.shape[0], -1, latents.shape[-1])
    batch, positions, width = flat.shape
    devices = jax.lax.axis_size(parallel.AXIS)
    each = min(positions, -(-number // (batch * devices)))

    def draw(key, vectors):
        place_key, order_key = jax.random.split(key)
        places = jax.random.permutation(place_key, positions)[:each]
        return vectors[places], jax.random.uniform(order_key, (each,))

    drawn, order = jax.vmap(draw)(keys, flat)
    drawn, order = parallel.gather((drawn.reshape(-1, width), order.reshape(-1)))
    return drawn[jnp.argsort(order)]
