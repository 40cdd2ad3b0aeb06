"""The parallel decoder: all units at once (Gu et al. 2018, 1711.02281).

    p(x | c) = p(L | c) prod_i p(x_i | L, c)                                                    (1)

One evaluation reads L masks and predicts every position. What it can learn at best has the
marginals of the data: its cross-entropy per sequence tends to the sum of the marginal entropies,
which is above the entropy of the data by the total correlation of the positions (Huang et al. 2022,
2206.05975): the multi-modality problem, in nats.

How long a sequence is, a head predicts (equation 1); or all sequences have as many columns, and
what follows the first END is dropped. With the loss of all columns the columns learn marginals;
with the loss up to END alone, each learns its distribution given that no END came before.

A latent z that all positions share is the first repair (Kaiser et al. 2018; Shu et al. 2020,
1908.07181; Ma et al. 2019, 1909.02480):

    p(x | c) = E_{z ~ p(z | c)} prod_i p(x_i | z, c),
    -log p(x | c) <= E_{z ~ q(z | x, c)} [-log p(x | z, c)] + KL(q(z | x, c) || p(z | c)).      (2)

A Gaussian is drawn by reparametrisation; over few codes the expectation is a sum, and is exact.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from gen_jax.models.masked import losses as masked
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.losses import NetworkDenoiser
from gen_jax.models.masked.samplers import InOrder, MaskedState, Rounds
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.models.sequences import cross_entropy, ended, existing
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork, Transformer

Ending = Literal["length", "end", "end_masked"]


@dataclasses.dataclass(frozen=True)
class ParallelDecoder:
    """A network that is not causal, with what predicts lengths and draws latents.

    Parameters are a tree "network", and where they are needed "length" and "latent".

    Attributes:
      network: with an extra input for the mask.
      columns: L, the longest sequence.
      ending: "length" predicts the length, which is 1 to `columns`; "end" and "end_masked" fill all
        columns and drop what follows END, and learn from all columns or up to END.
      latent: what all positions share.
    """

    network: TokenNetwork | EncoderDecoder
    columns: int
    ending: Ending = "length"
    latent: LatentConfig = LatentConfig()

    def __post_init__(self):
        context = self.network.config.context
        if not 1 <= self.columns <= context:
            raise ValueError(f"columns must be in 1 .. {context}, the context, got {self.columns}")

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The network, which fills masks."""
        return NetworkDenoiser(self.network)

    @property
    def _posterior(self):
        return dataclasses.replace(
            self.network.config, layers=self.latent.layers, causal=False, tied=True
        )

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters."""
        config, latent = self.network.config, self.latent
        keys = jax.random.split(key, 5)
        params = {"network": self.network.init(keys[0])}
        if self.ending == "length":
            params["length"] = {
                "kernel": jnp.zeros((config.width, self.columns)),
                "table": jnp.zeros((config.context + 1, self.columns)),
            }
        if latent.kind != "none":
            # Means and codes begin with a random meaning, which the decoder learns; variances at 1.
            shape = (config.width, latent.size)
            kernel = jax.random.normal(keys[2], shape) * 2 / config.width**0.5
            if latent.kind == "gaussian":
                kernel = jnp.concatenate([kernel, jnp.zeros(shape)], axis=1)
            table = jax.random.normal(keys[3], (latent.size, self.columns, config.width))
            params["latent"] = {
                "posterior": TokenNetwork(self._posterior).init(keys[1]),
                "pool": jax.random.normal(keys[4], (self.columns, config.width)),
                "posterior_kernel": kernel,
                "prior_kernel": jnp.zeros_like(kernel),
                "prior_bias": jnp.zeros(kernel.shape[1]),
                "table": 0.2 * table,
            }
        return params

    def length_logits(self, params: dict, summary, source_length) -> jax.Array:
        """Of the lengths 1 to L, [B, L], from `summarise` and the length of the source.

        The table may have been trained for longer sequences; those are then left out.
        """
        kernel, table = (params["length"][name][:, : self.columns] for name in ("kernel", "table"))
        return summary @ kernel + table[source_length]

    def prior(self, params: dict, summary) -> jax.Array:
        """Parameters of p(z | c): [B, 2 Z], means and log-variances, or logits [B, K]."""
        return summary @ params["latent"]["prior_kernel"] + params["latent"]["prior_bias"]

    def posterior(self, params: dict, tokens, exists, context: dict, keys=None) -> jax.Array:
        """Parameters of q(z | x, c), as `prior` gives them."""
        options = {name: context[name] for name in ("memory", "memory_mask") if name in context}
        hidden = Transformer(self._posterior).apply(
            {"params": params["latent"]["posterior"]},
            tokens, mask=exists, keys=keys, method="hidden", **options,
        )  # fmt: skip
        # A plain mean would be the same for sequences that differ in order alone.
        hidden = hidden * params["latent"]["pool"][: tokens.shape[1]]
        prior = self.prior(params, self.summarise(params["network"], context, len(tokens)))
        return prior + _mean(hidden, exists) @ params["latent"]["posterior_kernel"]

    def summarise(self, params: dict, context: dict, batch: int) -> jax.Array:
        """[B, D]: the mean of the source that was read, or the class; 0 without either."""
        if "memory" in context:
            return _mean(context["memory"], context["memory_mask"])
        if "label" in context:
            return params["token"][self.denoiser.mask + 1 + context["label"]]
        return jnp.zeros((batch, self.network.config.width))


def _mean(hidden, exists):  # [B, L, D], bool [B, L] or None -> [B, D]
    if exists is None:
        return hidden.mean(axis=1)
    total = jnp.where(exists[..., None], hidden, 0).sum(axis=1)
    return total / jnp.maximum(exists.sum(axis=1), 1)[:, None]


def one_shot_loss(model: ParallelDecoder, params, batch: dict, keys, *, smoothing: float = 0.0):
    """Minus the log-likelihood (1), or the bound (2), in nats per token.

    Args:
      model: decides on lengths and latents.
      params: its parameters.
      batch: "tokens" int32 [B, L]; "length" int32 [B], which includes END where sequences have
        one, None where all columns are tokens; and what the network conditions on.
      keys: [B], for dropout and latents.
      smoothing: of labels, see `autoregressive.loss`.

    Returns:
      The mean; and "divergence" of the latent and "length_loss", in nats per sequence.
    """
    tokens, length = batch["tokens"], batch.get("length")
    parts = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    dropout = parts[:, 0] if model.network.config.dropout else None
    denoiser, inside = model.denoiser, existing(tokens, length)
    exists = inside if model.ending == "length" else jnp.ones_like(inside)
    counted = exists if model.ending == "end" else inside
    context = denoiser.condition(params["network"], batch, dropout)

    def sums(context, tokens, counted, exists, dropout):  # -> [B]
        blank = jnp.full_like(tokens, denoiser.mask)
        logits = denoiser.train(params["network"], blank, exists, context, dropout)
        return jnp.where(counted, cross_entropy(logits, tokens, smoothing), 0).sum(-1)

    metrics = {}
    if model.latent.kind == "none":
        values = sums(context, tokens, counted, exists, dropout)
    else:
        prior = model.prior(params, model.summarise(params["network"], context, len(tokens)))
        posterior = model.posterior(params, tokens, counted, context, dropout)
        table = params["latent"]["table"][:, : tokens.shape[1]]  # each position reads z its own way
        if model.latent.kind == "gaussian":
            z, divergence = _gaussian(posterior, prior, parts[:, 1])
            added = jnp.einsum("bz,zld->bld", z, table)
            values = sums(context | {"added": added}, tokens, counted, exists, dropout)
        else:
            codes = model.latent.size
            copies = lambda leaf: jnp.repeat(leaf, codes, axis=0)  # noqa: E731
            every = jax.tree.map(copies, (context, tokens, counted, exists, dropout))
            added = jnp.tile(table, (len(tokens), 1, 1))
            values = sums(every[0] | {"added": added}, *every[1:]).reshape(-1, codes)
            log_q, log_p = jax.nn.log_softmax(posterior), jax.nn.log_softmax(prior)
            values = (jnp.exp(log_q) * values).sum(-1)
            divergence = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
        metrics["divergence"] = divergence.mean()
        values = values + jnp.maximum(divergence, model.latent.free_nats)
    return _per_token(model, params, batch, context, values, counted, metrics)


def masked_loss(
    model: ParallelDecoder, params, batch: dict, keys, *, config: MaskConfig, smoothing: float = 0.0
):
    """`masked.loss`, with that of the length; arguments as of `one_shot_loss`.

    Raises:
      ValueError: the model has a latent, or its ending is "end_masked".
    """
    if model.latent.kind != "none":
        raise ValueError("a masked model has no latent: set latent.kind to none")
    if model.ending == "end_masked":
        raise ValueError("a masked model reads what is behind END: set ending to length or end")
    parts = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    dropout = parts[:, 0] if model.network.config.dropout else None
    context = model.denoiser.condition(params["network"], batch, dropout)
    inside = existing(batch["tokens"], batch.get("length"))
    if model.ending == "end":  # what is behind END is read, hidden and learned like the rest
        batch = {name: leaf for name, leaf in batch.items() if name != "length"}
    value, metrics = masked.loss(
        model.network, params["network"], batch, parts[:, 1],
        config=config, smoothing=smoothing, context=context,
    )  # fmt: skip
    if model.ending != "length":
        return value, metrics
    length_loss = _length_loss(model, params, batch, context).mean()
    return value + length_loss / inside.sum(-1).mean(), metrics | {"length_loss": length_loss}


def _per_token(model, params, batch, context, values, counted, metrics):
    """The mean of sums [B] over tokens, with the loss of the length."""
    if model.ending == "length":
        length_loss = _length_loss(model, params, batch, context)
        values = values + length_loss
        metrics = metrics | {"length_loss": length_loss.mean()}
    return values.sum() / jnp.maximum(counted.sum(), 1), metrics


def _length_loss(model, params, batch, context):  # -> [B]
    tokens = batch["tokens"]
    length = existing(tokens, batch.get("length")).sum(-1)
    summary = model.summarise(params["network"], context, len(tokens))
    logits = model.length_logits(params, summary, source_lengths(batch, len(tokens)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, length - 1)


def length_nats(model: ParallelDecoder, params, batch: dict) -> jax.Array:
    """Minus the log-probability of the lengths of a batch given its sources, [B], in nats."""
    context = model.denoiser.condition(params["network"], batch)
    return _length_loss(model, params, batch, context)


def source_lengths(batch: dict, number: int) -> jax.Array:
    """Int32 [B], how long each source is; 0 where there is none."""
    if "source" not in batch:
        return jnp.zeros(number, jnp.int32)
    whole = jnp.full(number, batch["source"].shape[1], jnp.int32)
    return batch.get("source_length", whole)


def _gaussian(posterior, prior, keys):
    """A draw [B, Z] of the posterior, and its divergence [B] from the prior."""
    mean, log_var = jnp.split(posterior, 2, axis=-1)
    prior_mean, prior_log_var = jnp.split(prior, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    ratio = (jnp.exp(log_var) + (mean - prior_mean) ** 2) / jnp.exp(prior_log_var)
    divergence = 0.5 * (ratio - 1 + prior_log_var - log_var).sum(-1)
    return mean + jnp.exp(0.5 * log_var) * noise, divergence


@dataclasses.dataclass(frozen=True)
class ParallelSampler:
    """Draws the latent, predicts the lengths, and fills the positions in rounds.

    With K lengths each sample is decoded at its K most probable lengths in parallel, and the one
    whose tokens have the highest mean log-probability is kept (Ghazvininejad et al. 2019, 3.3).

    The condition is what the network conditions on; it may have "length" int32 [B], which is then
    not predicted, and "tokens" int32 [B, L] of `masked.blanks`, which a predicted length holds.

    Attributes:
      model: trained by `one_shot_loss` or `masked_loss`.
      rounds: a sampler of `masked_samplers` over the model's denoiser and columns; `one_shot` for
        all at once.
      lengths: K.
      end: the token after which nothing counts, given tokens included, which fills what is behind
        the sequence. None where sequences do not end.
      latent_temperature: scales the noise of the latent; 0 takes the mean, or the likeliest code.
    """

    model: ParallelDecoder
    rounds: Rounds
    lengths: int = 1
    end: int | None = None
    latent_temperature: float = 1.0

    def __post_init__(self):
        if self.rounds.length != self.model.columns:
            raise ValueError(
                f"rounds over {self.rounds.length} positions for a model of {self.model.columns}"
            )
        if not 1 <= self.lengths <= self.model.columns:
            raise ValueError(
                f"lengths must be in 1 .. {self.model.columns}, the table, got {self.lengths}"
            )
        if self.lengths > 1 and self.model.ending != "length":
            raise ValueError("several lengths are for a model that predicts the length")

    @property
    def steps(self) -> int:
        """Rounds."""
        return self.rounds.steps

    @property
    def nfe(self) -> int:
        """Rounds, and one evaluation more for the latent."""
        return self.rounds.nfe + (self.model.latent.kind != "none")

    def prepare(self, params):
        """The network's parameters prepared, the others as they are."""
        return params | {"network": self.rounds.prepare(params["network"])}

    def init(self, params, keys, cond) -> MaskedState:
        """Reads the condition, draws latents, predicts lengths: the state of B x K sequences."""
        cond, model, network = cond or {}, self.model, self.model.network
        batch, several = len(keys), self.lengths
        source = {name: cond[name] for name in ("source", "source_length") if name in cond}
        read = network.encode_source(params["network"].params, source) if source else {}
        context = {"label": cond["label"]} if "label" in cond else {}
        summary = model.summarise(params["network"].params, read | context, batch)
        length = self._lengths(params, summary, source, cond, batch)
        copies = lambda leaf: jnp.repeat(leaf, several, axis=0)  # noqa: E731
        tokens = {"tokens": copies(cond["tokens"])} if "tokens" in cond else {}
        inner = tokens if length is None else tokens | {"length": length.reshape(-1)}
        if source:
            context |= network.encode_memory(params["network"], read)
        if model.latent.kind != "none":
            context["added"] = self._latent(params, summary, keys)
        context = jax.tree.map(copies, context)
        if several > 1:
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            keys = fold(keys, jnp.arange(several)).reshape(-1)
        return self.rounds.init(params["network"], keys, inner | {"context": context})

    def _lengths(self, params, summary, source, cond, batch):
        """Lengths [B, K], the most probable first; None where they are not predicted."""
        if "length" in cond:
            length = jnp.asarray(cond["length"], jnp.int32)[:, None]
            return jnp.broadcast_to(length, (batch, self.lengths))
        if self.model.ending != "length":
            return None
        logits = self.model.length_logits(params, summary, source_lengths(source, batch))
        least = self._given(cond, batch)  # a sequence has room for the tokens that are given
        lengths = jnp.arange(1, self.model.columns + 1)
        logits = jnp.where(lengths >= least[:, None], logits, -jnp.inf)
        best = jax.lax.top_k(logits, self.lengths)[1] + 1
        return jnp.maximum(best, least[:, None])

    def _given(self, cond, batch):
        """Positions [B] up to the last token that is given."""
        if "tokens" not in cond:
            return jnp.zeros(batch, jnp.int32)
        given = jnp.asarray(cond["tokens"]) != self.model.denoiser.mask
        return jnp.where(given, jnp.arange(1, self.model.columns + 1), 0).max(-1)

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """One round."""
        return self.rounds.step(params["network"], state, i)

    def finish(self, params, state: MaskedState) -> jax.Array:
        """The tokens of the best length, int32 [B, L], `end` (or 0) behind a sequence."""
        tokens = state.tokens
        if self.end is not None:
            tokens = ended(jnp.where(state.exists, tokens, self.end), self.end)
        if self.lengths == 1:
            return tokens
        mean = state.log_prob.sum(-1) / jnp.maximum(state.exists.sum(-1), 1)
        best = mean.reshape(-1, self.lengths).argmax(-1)
        tokens = tokens.reshape(-1, self.lengths, tokens.shape[-1])
        return jnp.take_along_axis(tokens, best[:, None, None], axis=1)[:, 0]

    def _latent(self, params, summary, keys):
        """What the latent adds to the inputs, [B, L, D]."""
        prior = self.model.prior(params, summary)
        table = params["latent"]["table"][:, : self.model.columns]
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31)
        if self.model.latent.kind == "gaussian":
            mean, log_var = jnp.split(prior, 2, axis=-1)
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
            z = mean + self.latent_temperature * jnp.exp(0.5 * log_var) * noise
            return jnp.einsum("bz,zld->bld", z, table)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, prior.shape[1:]))(keys)
        return table[(prior + self.latent_temperature * noise).argmax(-1)]


def one_shot(model: ParallelDecoder, temperature: float = 1.0) -> InOrder:
    """All positions at once, each drawn from its own distribution; 0 takes the likeliest."""
    return InOrder(model.denoiser, model.columns, 1, temperature=temperature)


def log_prob(model: ParallelDecoder, params, tokens, cond: dict | None = None) -> jax.Array:
    """Exact log-probability [B] of tokens [B, L] under (1), or (2) summed over all codes, in nats.

    For sequences of all columns and their END, without the probability of a predicted length.

    Raises:
      ValueError: the latent is Gaussian; its sum is not finite.
    """
    if model.latent.kind == "gaussian":
        raise ValueError("the likelihood of a Gaussian latent has no closed form; use the bound")
    cond, denoiser = cond or {}, model.denoiser
    prepared = denoiser.prepare(params["network"])
    exists = jnp.ones(tokens.shape, bool)
    blank = jnp.full_like(tokens, denoiser.mask)

    read = denoiser.encode(prepared, cond)

    def given(added):
        return -cross_entropy(denoiser(prepared, blank, exists, read | added), tokens).sum(-1)

    if model.latent.kind == "none":
        return given({})
    context = denoiser.condition(params["network"], cond)
    summary = model.summarise(params["network"], context, len(tokens))
    prior = jax.nn.log_softmax(model.prior(params, summary))
    table = params["latent"]["table"][:, : tokens.shape[1]]  # [K, L, D]
    copies = lambda code: jnp.broadcast_to(code, (len(tokens), *code.shape))  # noqa: E731
    values = jax.lax.map(lambda code: given({"added": copies(code)}), table)
    return jax.nn.logsumexp(values + prior.T, axis=0)
