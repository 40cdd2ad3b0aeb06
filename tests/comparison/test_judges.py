"""What judges know of the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gates import MASKED

from gen_jax import evaluation
from gen_jax.comparison import judges
from gen_jax.models.masked import (
    AbsorbingDiffusion,
    MaskGIT,
    OrderedGroups,
    log_prob_in_order,
)
from random_networks import random_params

ROWS = np.random.default_rng(0).integers(0, 5, (32, 12)).astype(np.int32)


def nats(sampler, params):
    """Minus the log-probability of some rows in the rounds of a sampler."""
    rows = {"tokens": ROWS, "index": np.arange(len(ROWS), dtype=np.int32)}
    return evaluation.map_rows(functools.partial(judges._nats_in_rounds, sampler), params, rows, 32)


def test_the_code_length_of_one_round_is_exact(one_device):
    params = random_params(MASKED.network.config)
    exact = -log_prob_in_order(MASKED, params, ROWS, np.arange(12), (12,))
    np.testing.assert_allclose(nats(MaskGIT(MASKED, 12, 1), params), exact, rtol=1e-5)


@pytest.mark.parametrize("kind", [OrderedGroups, AbsorbingDiffusion])
def test_every_token_counts_once_in_the_rounds(kind, one_device):
    """A network that knows nothing pays ln 5 for each of twelve tokens, whatever the rounds."""
    params = jax.tree.map(jnp.zeros_like, random_params(MASKED.network.config))
    np.testing.assert_allclose(nats(kind(MASKED, 12, 5), params), 12 * np.log(5), rtol=1e-5)
