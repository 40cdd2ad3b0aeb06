"""The autoregressive family: what its runs over text and over pixels share.

Presets are in the experiments. jax is imported by the phases, not by this module.
"""

import dataclasses
import functools
import sys

import numpy as np
from tqdm import tqdm

from experiments import run
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.nn.config import TransformerConfig


class Run(run.Run):
    """A run whose network predicts one token after the other.

    Its kinds also give:
      model: the sizes of the network, with a vocabulary.
    """

    @property
    def model(self) -> TransformerConfig:
        """The sizes of the network; its vocabulary is not 0."""
        raise NotImplementedError

    @functools.cached_property
    def network(self):
        """The network, as pure functions."""
        from gen_jax.nn.transformer import TokenNetwork

        return TokenNetwork(self.model)

    @property
    def choice(self) -> TokenChoice:
        """How each token is drawn: the fields that config.sample inherits."""
        names = [field.name for field in dataclasses.fields(TokenChoice)]
        return TokenChoice(**{name: getattr(self.config.sample, name) for name in names})

    def init_params(self, key):
        """Initial parameters."""
        return self.network.init(key)

    def template(self, record):
        """Shapes and dtypes of the parameters."""
        import jax

        from gen_jax import keys

        return jax.eval_shape(lambda: self.network.init(keys.root(0, "init")))

    def loss(self, params, batch, keys):
        """As `training.Loss`."""
        from gen_jax.models.autoregressive import losses as autoregressive

        return autoregressive.loss(self.network, params, batch, keys)

    def nats(
        self,
        params,
        tokens: np.ndarray,
        *,
        batch: int,
        counted: np.ndarray | None = None,
        label: np.ndarray | None = None,
    ) -> np.ndarray:
        """Minus the exact log-probability of sequences, over all devices of this host.

        Args:
          params: of the network.
          tokens: int32 [N, L].
          batch: sequences at a time.
          counted: int32 [N], how many of the first predicted tokens count; None for all.
          label: int32 [N], or None.

        Returns:
          float64 [N], sums over the tokens.
        """
        import jax

        from gen_jax import parallel

        mesh, number = parallel.local_mesh(), len(tokens)
        size = -(-min(batch, number) // mesh.size) * mesh.size
        counted = np.full(number, tokens.shape[1], np.int32) if counted is None else counted
        params = parallel.replicate(mesh, jax.device_get(params))
        values, hidden = [], not sys.stderr.isatty()
        for first in tqdm(range(0, number, size), "evaluating", unit="batch", disable=hidden):
            rows = np.minimum(np.arange(first, first + size), number - 1)
            part = tokens[rows], counted[rows], None if label is None else label[rows]
            part = self._nats(params, *parallel.split(mesh, part))
            values.append(jax.device_get(part)[: number - first])
        return np.concatenate(values).astype(np.float64)

    @functools.cached_property
    def _nats(self):
        import jax
        import jax.numpy as jnp

        from gen_jax.models.autoregressive import losses as autoregressive

        @jax.jit
        def nats(params, tokens, counted, label):
            values = autoregressive.log_prob(self.network, params, tokens, label)
            counts = jnp.arange(values.shape[1]) < counted[:, None]
            return -jnp.where(counts, values, 0).sum(-1)

        return nats
