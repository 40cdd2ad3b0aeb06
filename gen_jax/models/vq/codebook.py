"""Codebooks: nearest entries, moving averages, residual tables, and the restart of dead entries.

VQ-VAE (van den Oord et al. 2017, 1711.00937): equations 1 to 3, and appendix A.1 for the moving
averages. Residual quantisation: SoundStream (Zeghidour et al. 2021, 2107.03312, algorithm 1), and
its restart of entries that stand for nothing (section III-C; Jukebox, 2005.00341, section 4).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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
        shape = options.depth, options.codes, options.width
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
        """One code for each position, or R with more than one table."""
        depth = self.options.depth
        return (height, width) if depth == 1 else (height, width, depth)

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

        The loss is beta |z - sg(e)|^2, a mean over all values and summed over tables, where e is
        the entry for z; and |sg(z) - e|^2 as well where entries are trained by their gradient
        (1711.00937, eq. 3).
        """
        del keys
        options, codebook = self.options, params["codebook"]
        if options.update == "moving_average":
            codebook = jax.lax.stop_gradient(codebook)
        left = latents.astype(jnp.float32)
        codes, loss, value = [], jnp.float32(0), jnp.zeros_like(left)
        for table in codebook:
            code = _nearest(left, table)
            entry = table[code]
            stopped = jax.lax.stop_gradient(entry)
            loss += options.commitment * jnp.square(left - stopped).mean()
            if options.update == "gradient":
                loss += jnp.square(jax.lax.stop_gradient(left) - entry).mean()
            codes.append(code)
            value, left = value + stopped, left - stopped
        value = straight_through(latents.astype(jnp.float32), value)
        return Quantised(value, self._joined(codes), loss)

    def _joined(self, codes):
        return codes[0] if len(codes) == 1 else jnp.stack(codes, axis=-1)

    def lookup(
        self, params: dict[str, Any], code: Int32[Array, "B ..."]
    ) -> Float[Array, "B height width D"]:
        """The entries of a code, summed over tables."""
        codebook = params["codebook"]
        if self.options.depth == 1:
            return codebook[0][code]
        return sum(table[code[..., i]] for i, table in enumerate(codebook))

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
        counts = batch_counts(code, options.codes, options.depth)
        metrics = usage(counts)
        if options.update == "moving_average":
            sums = self._sums(before, latents, code)
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
            codebook, statistics = self._restart(before, codebook, statistics, dead, latents, keys)
            statistics["used"] = jnp.where(due, 0, statistics["used"])
            statistics["age"] += 1
        return {"codebook": _with_zeros(codebook)}, statistics, metrics

    def _sums(self, codebook, latents, code):
        """Sums [R, K, D] over the whole batch of the vectors that each entry stood for."""
        left, sums = latents.astype(jnp.float32), []
        code = code.reshape(*left.shape[:-1], -1)
        for i, table in enumerate(codebook):
            ours = code[..., i]
            sums.append(_segment_sum(left, ours, self.options.codes))
            left = left - table[ours]
        return parallel.sum(jnp.stack(sums))

    def _restart(self, before, codebook, statistics, dead, latents, keys):
        """Dead entries on vectors drawn from the batch, a different one for each if it has as many.

        `before` is the codebook that the batch was quantised with, and by which a vector is reduced
        to what the tables before an entry's own leave of it.
        """
        options = self.options
        left, restarted = _candidates(latents, keys, options.codes), []
        for i, table in enumerate(before):
            places = (jnp.cumsum(dead[i]) - 1) % left.shape[0]
            restarted.append(left[places])
            left = left - table[_nearest(left, table)]
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
