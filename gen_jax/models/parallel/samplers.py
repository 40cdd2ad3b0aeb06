"""Sampling of parallel decoders: latent, length, and the positions all at once or in rounds.

B batch, L length of the sampler, D width, K lengths of each sample.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.keys import fold_in_each, of_items
from gen_jax.models import contract
from gen_jax.models.masked.iterative import IterativeSampler, MaskedState
from gen_jax.models.masked.losses import MaskedModel
from gen_jax.models.masked.samplers import OrderedGroups
from gen_jax.models.options import check_not_negative
from gen_jax.models.parallel.latent import sample_gaussian
from gen_jax.models.parallel.losses import ParallelModel, source_lengths
from gen_jax.models.sequences import fill_after_eos
from kernels.threefry import gumbel_each

__all__ = ["ParallelSampler", "one_shot"]


@frozen
class ParallelSampler:
    """Draws the latent, predicts the lengths, and fills the positions in rounds.

    With K lengths each sample is decoded at its K most probable lengths in parallel, and the one
    whose tokens have the highest mean log-probability is kept (Ghazvininejad et al. 2019, section
    3.3). A length that the condition has is not predicted; a length that is predicted has room for
    the tokens that are given.

    Attributes:
      model: one-shot or masked.
      inner: a sampler in rounds over the model's denoiser; `one_shot` for all positions at once.
        Its length L is the longest sequence that is drawn, at most the model's.
      lengths: K, 1 to L.
      eos: the token after which nothing counts, given tokens included, which fills what is behind
        the sequence. None where sequences do not end.
      latent_temperature: scales the noise of the latent, at least 0; 0 takes the mean, or the
        likeliest code.
    """

    model: ParallelModel
    inner: IterativeSampler
    lengths: int = 1
    eos: int | None = None
    latent_temperature: float = 1.0

    def __post_init__(self):
        longest, length = self.model.max_length, self.inner.length
        if length > longest:
            raise ValueError(f"rounds over {length} positions for a model of at most {longest}")
        ours, other = self.model.network, self.inner.model
        if isinstance(other, MaskedModel) and other.network.config != ours.config:
            raise ValueError("inner is a sampler of another network: make it of model.denoiser")
        if not 1 <= self.lengths <= length:
            raise ValueError(f"lengths must be in 1 .. {length}, the positions, got {self.lengths}")
        if self.lengths > 1 and self.model.ending != "length":
            raise ValueError("several lengths are for a model that predicts the length")
        vocabulary = self.model.denoiser.vocabulary
        if self.eos is not None and not 0 <= self.eos < vocabulary:
            raise ValueError(f"eos must be in 0 .. {vocabulary - 1}, got {self.eos}")
        check_not_negative("latent_temperature", self.latent_temperature)

    @property
    def steps(self) -> int:
        """One trip of the loop per round."""
        return self.inner.steps

    @property
    def nfe(self) -> int:
        """Those of the rounds, and one evaluation more for the latent."""
        return self.inner.nfe + (self.model.latent.kind != "none")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those of the rounds; the length only where the model has one."""
        ours = self.inner.conditions
        if self.model.ending == "length":
            return ours
        return tuple(name for name in ours if name != "length")

    def check(self, params: Any, cond: Condition) -> None:
        """Refuses parameters and values of the condition that do not fit.

        Raises:
          ValueError: the parameters are not the model's, or `inner` refuses.
        """
        contract.check_params(self.model, params)
        self.inner.check(params["network"], cond)

    def prepare(self, params: Any) -> Any:
        """The network's parameters prepared, the others as they are."""
        return params | {"network": self.inner.prepare(params["network"])}

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> MaskedState:
        """Encodes the condition, draws latents, predicts lengths: the state of B x K sequences."""
        network, fields = params["network"], cond.fields()
        names = ("source", "source_length")
        source = {name: fields[name] for name in names if name in fields}
        encoded = self.model.network.encode_source(network.params, source) if source else {}
        context = {"label": cond.label} if cond.label is not None else {}
        summary = self.model.summarise(network.params, encoded | context, len(keys))
        length = self._lengths(params, summary, source, cond, len(keys))
        if source:
            context |= self.model.network.encode_memory(network, encoded)
        if self.model.latent.kind != "none":
            context["added"] = self._latent_inputs(params, summary, keys)
        given, is_given, context = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, self.lengths, axis=0),
            (cond.given, cond.is_given, context),
        )
        if self.lengths > 1:
            several = jax.vmap(of_items, (0, None))(keys, jnp.arange(self.lengths))
            keys = several.reshape(-1)
        return self.inner.start(network, keys, given, is_given, length, context)

    def _lengths(self, params, summary, source, cond, batch):
        """Lengths [B K], of a sample the most probable first; None where they are not predicted."""
        if cond.length is not None:
            return jnp.repeat(jnp.asarray(cond.length, jnp.int32), self.lengths)
        if self.model.ending != "length":
            return None
        logits = self.model.length_logits(params, summary, source_lengths(source, batch))
        logits = logits[:, : self.inner.length]
        least = self._room(cond, batch)  # a sequence has room for the tokens that are given
        lengths = jnp.arange(1, self.inner.length + 1)[None]
        logits = jnp.where(lengths >= least[:, None], logits, -jnp.inf)
        best = jax.lax.top_k(logits, self.lengths)[1] + 1
        return jnp.maximum(best, least[:, None]).reshape(-1)

    def _room(self, cond, batch):
        """Positions [B] up to the last token that is given."""
        if cond.is_given is None:
            return jnp.zeros(batch, jnp.int32)
        place = jnp.arange(1, self.inner.length + 1)[None]
        return jnp.where(cond.is_given, place, 0).max(-1)

    def _latent_inputs(self, params, summary, keys):
        """What the latent adds to the inputs, [B, L, D]."""
        prior = self.model.prior(params, summary)
        table = params["latent"]["table"][:, : self.inner.length]
        keys = fold_in_each(keys, 2**31)
        if self.model.latent.kind == "gaussian":
            z = sample_gaussian(prior, keys, self.latent_temperature)
            return jnp.einsum("bz,zld->bld", z, table)
        noise = gumbel_each(keys, prior.shape[1:])
        return table[(prior + self.latent_temperature * noise).argmax(-1)]

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """One round."""
        return self.inner.step(params["network"], state, i)

    def finish(self, params: Any, state: MaskedState) -> Int[Array, "rows L"]:
        """The tokens of the best length, int32 [B, L], `eos` (or 0) behind a sequence."""
        tokens = state.tokens
        if self.eos is not None:
            tokens = fill_after_eos(jnp.where(state.valid, tokens, self.eos), self.eos)
        if self.lengths == 1:
            return tokens
        mean = state.log_prob.sum(-1) / jnp.maximum(state.valid.sum(-1), 1)
        best = mean.reshape(-1, self.lengths).argmax(-1)
        tokens = tokens.reshape(-1, self.lengths, tokens.shape[-1])
        return jnp.take_along_axis(tokens, best[:, None, None], axis=1)[:, 0]


def one_shot(
    model: ParallelModel, temperature: float = 1.0, length: int | None = None
) -> OrderedGroups:
    """All positions at once, each drawn from its own distribution.

    Args:
      model: decides on network and mask.
      temperature: divides the logits; 0 takes the likeliest tokens.
      length: of the sampler; None for the model's.
    """
    length = model.max_length if length is None else length
    return OrderedGroups(model.denoiser, length, 1, temperature=temperature)
