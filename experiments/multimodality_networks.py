"""The networks of `multimodality`: one for each family of strategies and each set.

The sets have the same shape, so that the networks of a family are trained side by side: their
parameters are stacked along a first axis, and nothing but the step is shared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax import keys as key_streams
from gen_jax import parallel, sampling, training
from gen_jax.metrics import repair
from gen_jax.models import sequences
from gen_jax.models.autoregressive import losses as autoregressive
from gen_jax.models.masked import losses as masked
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.losses import NetworkDenoiser
from gen_jax.models.parallel import losses as nonautoregressive
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.models.parallel.losses import ParallelDecoder
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.workdir import Workdir

FAMILIES = ("one_shot", "latent", "ar", "masked")


class Networks:
    """Trains the networks, or goes on with those of the work directory.

    Args:
      config: of the experiment.
      sets: `Enumerated` distributions of one length and vocabulary, by name.
      workdir: each family gets a directory in it.
    """

    def __init__(self, config, sets: dict, workdir: Workdir):
        self.config, self.sets = config, sets
        first = next(iter(sets.values()))
        self.length = first.length
        model = dataclasses.replace(
            config.model, vocabulary=first.vocabulary, context=first.length, extra_inputs=1
        )
        self.causal = TokenNetwork(dataclasses.replace(model, causal=True))
        self.network = TokenNetwork(dataclasses.replace(model, causal=False))
        self.decoders = {
            "one_shot": ParallelDecoder(self.network, self.length, "end"),
            "latent": ParallelDecoder(
                self.network, self.length, "end", LatentConfig("categorical", config.codes)
            ),
        }
        self.params = {family: self._train(family, workdir.path / family) for family in FAMILIES}

    def of(self, name: str) -> "NetworksOfSet":
        """Those of one set."""
        place = list(self.sets).index(name)
        params = jax.tree.map(lambda leaf: leaf[place], self.params)
        return NetworksOfSet(self, params)

    def _model(self, family):
        if family in self.decoders:
            return self.decoders[family]
        return self.causal if family == "ar" else self.network

    def _loss(self, family):
        model = self._model(family)
        if family == "ar":
            return functools.partial(autoregressive.loss, model)
        if family == "masked":
            return functools.partial(masked.loss, model, config=MaskConfig())
        return functools.partial(nonautoregressive.one_shot_loss, model)

    def _train(self, family, path):
        """The averaged parameters, [sets, ...]."""
        loss, number, config = self._loss(family), len(self.sets), self.config.train

        def losses(params, batch, keys):
            fold = jax.vmap(jax.random.fold_in, (0, None))
            several = jax.vmap(lambda i: fold(keys, i))(jnp.arange(number))
            tokens = batch["tokens"].swapaxes(0, 1)  # [sets, B, L]
            one = lambda params, tokens, keys: loss(params, {"tokens": tokens}, keys)[0]  # noqa: E731
            values = jax.vmap(one)(params, tokens, several)
            return values.mean(), {f"loss_{i}": value for i, value in enumerate(values)}

        def batch(step):
            sets = (dist.batch(config.seed, step, config.batch) for dist in self.sets.values())
            return {"tokens": np.stack([one["tokens"] for one in sets], axis=1)}

        roots = jax.random.split(key_streams.root(config.seed, "init"), number)
        params = jax.vmap(self._model(family).init)(roots)
        path.mkdir(exist_ok=True)
        trained = training.fit(
            config, losses, params, batch, Workdir(path), mesh=parallel.data_mesh()
        )
        return jax.tree.map(jnp.asarray, jax.device_get(trained.state.ema))


@dataclasses.dataclass(frozen=True, eq=False)
class NetworksOfSet:
    """The networks of one set.

    Attributes:
      networks: of all sets.
      params: by family.
    """

    networks: Networks
    params: dict

    def log_prob(self, family: str, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of tokens int32 [B, L] under the one-shot decoder, with a latent or
        without, or under the causal network; float64 [B], in nats."""
        params = self.params[family]
        return np.asarray(_log_prob(self.networks._model(family), params, tokens), np.float64)

    def log_prob_in_order(self, tokens: np.ndarray, order: np.ndarray, sizes) -> np.ndarray:
        """As `masked.log_prob_in_order`, under the masked network; float64 [B]."""
        denoiser, params = NetworkDenoiser(self.networks.network), self.params["masked"]
        values = _in_order(denoiser, tuple(map(int, sizes)), params, tokens, order)
        return np.asarray(values, np.float64)

    def law_of_repair(self, tokens: np.ndarray, rule: str, rounds: int) -> np.ndarray:
        """The law after rounds of repair by the masked network, from its own one-shot draft.

        Args:
          tokens: int32 [M, L], all sequences, in lexicographic order.
          rule: of `repair.kernel_of_conditionals`.
          rounds: how many.

        Returns:
          float64 [M].
        """
        length = self.networks.length
        everything = np.arange(length)
        law = np.exp(self.log_prob_in_order(tokens, everything, [length]))
        denoiser, params = NetworkDenoiser(self.networks.network), self.params["masked"]
        own = np.exp(np.asarray(_leave_one_out(denoiser, params, tokens), np.float64))
        kernel = repair.kernel_of_conditionals(own, denoiser.vocabulary, rule)
        return law @ np.linalg.matrix_power(kernel, rounds)

    def sample(self, strategy, number: int, seed: int) -> np.ndarray:
        """Samples int32 [number, L] of a strategy with the masked network."""
        denoiser, length = NetworkDenoiser(self.networks.network), self.networks.length
        keys = sampling.sample_keys(seed, 0, number)
        sampler = strategy.make(denoiser, length)
        return np.asarray(sampling.generate(sampler, self.params["masked"], keys))


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(model, params, tokens):
    if isinstance(model, ParallelDecoder):
        return nonautoregressive.log_prob(model, params, tokens)
    return autoregressive.log_prob(model, params, tokens).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _leave_one_out(denoiser, params, tokens):
    """Log-probability [L, B] of each token given all others."""
    prepared, exists = denoiser.prepare(params), sequences.existing(tokens)

    def place(i):
        logits = denoiser(prepared, tokens.at[:, i].set(denoiser.mask), exists, {})[:, i]
        return -sequences.cross_entropy(logits, tokens[:, i])

    return jax.lax.map(place, jnp.arange(tokens.shape[1]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_order(denoiser, sizes, params, tokens, order):
    return masked.log_prob_in_order(denoiser, params, tokens, order, sizes)
