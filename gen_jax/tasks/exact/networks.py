"""The networks of the exact comparison: one for each family of strategies and each set.

The sets have the same shape, so that the networks of a family are trained side by side: their
parameters are stacked along a first axis, and they share nothing but the step.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from gen_jax import sampling
from gen_jax.keys import fold_in_each
from gen_jax.metrics import repair
from gen_jax.models.autoregressive import AutoregressiveModel
from gen_jax.models.contract import Model
from gen_jax.models.masked import MaskedModel, log_prob_in_order
from gen_jax.models.parallel import LatentConfig, ParallelModel
from gen_jax.models.sequences import cross_entropy, valid_mask
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.tasks.exact.config import ExactConfig

__all__ = ["Networks", "StackedModel", "make_models"]


def make_models(config: ExactConfig, vocabulary: int) -> dict[str, Model]:
    """The models by family, each over sequences of config.length tokens."""
    sizes = dataclasses.replace(
        config.model, vocabulary=vocabulary, context=config.length, extra_inputs=1
    )
    causal = TokenNetwork(dataclasses.replace(sizes, causal=True))
    network = TokenNetwork(dataclasses.replace(sizes, causal=False))
    latent = LatentConfig("categorical", config.codes)
    return {
        "one_shot": ParallelModel(network, config.length, "eos"),
        "latent": ParallelModel(network, config.length, "eos", latent),
        "ar": AutoregressiveModel(causal),
        "masked": MaskedModel(network),
    }


@dataclasses.dataclass(frozen=True)
class StackedModel:
    """Several models of one kind side by side; parameters and batches have an axis for them.

    Attributes:
      model: of one of them.
      number: S, how many there are.
    """

    model: Model
    number: int

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters, [S, ...] each."""
        return jax.vmap(self.model.init)(jax.random.split(key, self.number))

    def loss(
        self, params: Any, batch: dict[str, Int[Array, "B S L"]], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean of their losses, and each of them as "loss_0", "loss_1" and so on."""
        several = jax.vmap(fold_in_each, (None, 0))(keys, jnp.arange(self.number))
        tokens = batch["tokens"].swapaxes(0, 1)  # [S, B, L]

        def one(params, tokens, keys):
            return self.model.loss(params, {"tokens": tokens}, keys)[0]

        values = jax.vmap(one)(params, tokens, several)
        return values.mean(), {f"loss_{i}": value for i, value in enumerate(values)}


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """The trained networks of one set.

    Attributes:
      models: by family.
      params: by family.
      length: L.
    """

    models: Mapping[str, Model]
    params: Mapping[str, Any]
    length: int

    def log_prob(self, family: str, tokens: Int[np.ndarray, "B L"]) -> Float[np.ndarray, " B"]:
        """Log-probability of sequences under the one-shot decoder, with a latent or without, or
        under the causal network, in nats."""
        values = _log_prob(self.models[family], self.params[family], tokens)
        return np.asarray(values, np.float64)

    def log_prob_in_order(
        self, tokens: Int[np.ndarray, "B L"], order: Int[np.ndarray, "..."], sizes: Any
    ) -> Float[np.ndarray, " B"]:
        """As `masked.log_prob_in_order`, under the masked network."""
        sizes = tuple(map(int, sizes))
        values = _in_order(self.models["masked"], sizes, self.params["masked"], tokens, order)
        return np.asarray(values, np.float64)

    def law_of_repair(
        self, tokens: Int[np.ndarray, "B L"], rule: str, rounds: int
    ) -> Float[np.ndarray, " B"]:
        """The law after rounds of repair by the masked network, from its own one-shot draft.

        Args:
          tokens: all sequences, in lexicographic order.
          rule: of `repair.kernel_of_conditionals`.
          rounds: how many.
        """
        model, params = self.models["masked"], self.params["masked"]
        law = np.exp(self.log_prob_in_order(tokens, np.arange(self.length), [self.length]))
        own = np.exp(np.asarray(_leave_one_out(model, params, tokens), np.float64))
        kernel = repair.kernel_of_conditionals(own, model.vocabulary, rule)
        return law @ np.linalg.matrix_power(kernel, rounds)

    def sample(self, strategy: Any, number: int, seed: int) -> Int[np.ndarray, "number L"]:
        """Samples of a strategy with the masked network."""
        keys = sampling.sample_keys(seed, 0, number)
        sampler = strategy.make(self.models["masked"], self.length)
        return np.asarray(sampling.generate(sampler, self.params["masked"], keys))


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(model, params, tokens):
    return model.log_prob(params, {"tokens": tokens})


@functools.partial(jax.jit, static_argnums=0)
def _leave_one_out(model, params, tokens):
    """Log-probability [L, B] of each token given all others."""
    prepared, valid = model.prepare(params), valid_mask(tokens)

    def place(i):
        logits = model(prepared, tokens.at[:, i].set(model.mask), valid, {})[:, i]
        return -cross_entropy(logits, tokens[:, i])

    return jax.lax.map(place, jnp.arange(tokens.shape[1]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_order(model, sizes, params, tokens, order):
    return log_prob_in_order(model, params, tokens, order, sizes)
