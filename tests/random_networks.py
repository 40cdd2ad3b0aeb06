"""Networks whose parameters are far from what they begin with, shared by tests of laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork

LLAMA_FORM = {
    "position": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tied": False,
}


@functools.cache
def random_params(network, seed=1, deviation_of=lambda names: None):
    """Parameters with nothing at zero or one, so large that distributions are far from flat.

    Args:
      network: what has `init`, or the configuration of a `TokenNetwork`.
      seed: of the draws.
      deviation_of: of a leaf, from the names on its path; None for the common one.
    """
    if isinstance(network, TransformerConfig):
        network = TokenNetwork(network)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    generator = np.random.default_rng(seed)
    values = []
    for path, leaf in leaves:
        names = [entry.key for entry in path]
        mean, deviation = (2.5, 0.1) if names[-1] == "scale" else (0, 0.13)
        deviation = deviation_of(names) or deviation
        values.append(jnp.asarray(generator.normal(mean, deviation, leaf.shape), jnp.float32))
    return jax.tree.unflatten(tree, values)
