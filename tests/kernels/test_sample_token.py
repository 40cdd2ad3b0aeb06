"""sample_token: sets by sorting, and exact distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import kernels
from kernels.sample_token.cases import FILTERS, rows
from kernels.sample_token.reference import nucleus_threshold

DRAWS = 20_000


@functools.partial(jax.jit, static_argnames=("names", "values", "implementation"))
def _sample(logits, keys, names, values, implementation):
    choice = dict(zip(names, values, strict=True))
    return kernels.sample_logits(logits, keys, implementation=implementation, **choice)


def sample(logits, keys, implementation=None, **choice):
    return np.asarray(_sample(logits, keys, tuple(choice), tuple(choice.values()), implementation))


@functools.partial(jax.jit, static_argnames=("names", "values"))
def _filtered(logits, names, values):
    return kernels.filter_logits(logits, **dict(zip(names, values, strict=True)))


def filtered(logits, **choice):
    return np.asarray(_filtered(logits, tuple(choice), tuple(choice.values())))


def by_sorting(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities [V] of one row after the filters, one after the other, by sorting."""
    z = np.asarray(logits, np.float32).astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(z)), -z))  # of equals the lower id first
    order = order[z[order] > -np.inf]
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        weights = np.exp(z[order] - z[order[0]])
        count = np.searchsorted(np.cumsum(weights) / weights.sum(), top_p) + 1
        order = order[z[order] >= z[order[count - 1]]]
    if min_p > 0:
        order = order[z[order] >= z[order[0]] + np.log(min_p)]
    kept = np.zeros(len(z))
    kept[order] = np.exp(z[order] - z[order[0]])
    return kept / kept.sum()


def p_value(drawn, probabilities):
    """Of Pearson's test; also that nothing else was drawn."""
    observed = np.bincount(drawn, minlength=len(probabilities))
    kept = probabilities > 0
    assert observed[~kept].sum() == 0
    assert kept.sum() > 1
    expected = probabilities[kept] * len(drawn)
    assert expected.min() > 5
    return stats.chisquare(observed[kept], expected).pvalue


@pytest.mark.parametrize("choice", [*FILTERS, {"top_k": 1}], ids=str)
def test_kept_sets_are_those_of_sorting(choice):
    logits = rows()
    got = filtered(logits, **choice)
    expected = np.array([by_sorting(row, **choice) for row in logits])
    np.testing.assert_array_equal(got > -np.inf, expected > 0)
    np.testing.assert_allclose(jax.nn.softmax(got), expected, atol=1e-6)
    scaled = logits / np.float32(choice.get("temperature", 1))
    np.testing.assert_allclose(got[expected > 0], scaled[expected > 0], rtol=1e-6)


def test_top_k_keeps_exactly_k_and_of_equals_the_lower_ids():
    logits = np.array([[1, 3, 1, 1, 2, 1], [0, 0, 0, 0, 0, 0]], np.float32)
    for k in range(1, 6):
        assert ((filtered(logits, top_k=k) > -np.inf).sum(axis=1) == k).all()
    kept = filtered(logits, top_k=4) > -np.inf
    np.testing.assert_array_equal(kept, np.array([[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]], bool))
    for k in (0, 6, 100):
        np.testing.assert_array_equal(filtered(logits, top_k=k), logits)


@jax.jit
def nucleus(logits, mass):
    return logits >= nucleus_threshold(logits, logits > -jnp.inf, mass)


@pytest.mark.parametrize("mass", [0.3, 0.99])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(mass):
    logits = rows(200)[:64]
    kept = np.asarray(nucleus(logits, jnp.float32(mass)))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    least = np.where(kept, p, np.inf).min(axis=1)
    assert ((p * kept).sum(axis=1) > mass - 1e-6).all()
    assert ((p * kept).sum(axis=1) - least < mass + 1e-6).all()
    assert (np.where(kept, 0, p).max(axis=1) < least).all()
    assert 1 < kept.sum(axis=1).max() < 200


def test_equal_tokens_at_the_edge_of_the_nucleus_stay_together():
    # In the shape and with the filters of a program that is there already.
    logits = np.full((192, 9), -np.inf, np.float32)
    logits[:, :5] = [2.0, 0.0, 0.0, 0.0, -1.0]  # two of the three zeros reach the mass
    kept = filtered(logits, top_p=0.8) > -np.inf
    np.testing.assert_array_equal(kept[0], [True] * 4 + [False] * 5)
    logits[:, :8] = [2.0] + [0.0] * 7  # but top_k parts them; four of its five reach the mass
    kept = filtered(logits, temperature=1.5, top_k=6, top_p=0.85) > -np.inf
    np.testing.assert_array_equal(kept[0], [True] * 6 + [False] * 3)


def test_greedy():
    logits, keys = rows(), jax.random.split(jax.random.key(5), 192)
    best = logits.argmax(axis=1)
    for choice in ({"temperature": 0}, {"temperature": 0, "top_k": 5}, {"top_k": 1}):
        np.testing.assert_array_equal(sample(logits, keys, **choice), best, str(choice))
    logits, keys = logits[:64], keys[:64]  # without ties
    for choice in ({"top_k": 8, "top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        np.testing.assert_array_equal(sample(logits, keys, **choice), best[:64], str(choice))


def test_a_small_temperature_is_greedy():
    logits, keys = rows()[:64], jax.random.split(jax.random.key(5), 64)
    drawn = sample(10 * logits, keys, temperature=1e-6)
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))
    with pytest.raises(ValueError, match="out of range: temperature 1e-38"):
        sample(logits, keys, temperature=1e-38)


@pytest.mark.parametrize("choice", FILTERS, ids=str)
def test_draws_have_the_filtered_distribution(choice):
    logits = np.array([0.9, -0.4, 0.1, -1.2, -np.inf, 1.6, 0.6, -0.1, -0.9], np.float32)
    keys = jax.random.split(jax.random.key(7), DRAWS)
    drawn = sample(np.tile(logits, (DRAWS, 1)), keys, **choice)
    assert p_value(drawn, by_sorting(logits, **choice)) > 1e-4


def test_noise_in_half_precision_would_not_pass():
    logits = (0.1 * np.random.default_rng(1).normal(size=160)).astype(np.float32)
    keys = jax.random.split(jax.random.key(8), DRAWS)
    probabilities = by_sorting(logits)

    @jax.jit
    def mutant(keys):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (160,), jnp.bfloat16))(keys)
        return jnp.argmax(logits[None] + noise.astype(jnp.float32), axis=-1)

    assert p_value(np.asarray(mutant(keys)), probabilities) < 1e-6
    assert p_value(sample(np.tile(logits, (DRAWS, 1)), keys), probabilities) > 1e-4


def test_different_filters_would_not_pass():
    logits = np.array([0.9, -0.4, 0.1, -1.2, 1.6, 0.6, -0.1, -0.9], np.float32)
    keys = jax.random.split(jax.random.key(7), DRAWS)
    drawn = sample(np.tile(logits, (DRAWS, 1)), keys, temperature=1.1)
    assert p_value(drawn, by_sorting(logits)) < 1e-6


@pytest.mark.parametrize("choice", [{}, FILTERS[4], FILTERS[-1]], ids=str)
def test_a_row_does_not_know_its_batch(choice):
    logits, keys = rows(), jax.random.split(jax.random.key(9), 192)
    whole = sample(logits, keys, **choice)
    for size in (1, 7):
        np.testing.assert_array_equal(sample(logits[:size], keys[:size], **choice), whole[:size])
    np.testing.assert_array_equal(sample(logits[::-1], keys[::-1], **choice), whole[::-1])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("choice", [{}, {"temperature": 0.7, "top_k": 4}])
def test_logits_of_half_precision_are_taken_to_float32(dtype, choice):
    logits, keys = jnp.asarray(rows(300), dtype), jax.random.split(jax.random.key(10), 192)
    expected = sample(logits.astype(jnp.float32), keys, **choice)
    np.testing.assert_array_equal(sample(logits, keys, **choice), expected)
    assert filtered(logits, **choice).dtype == np.float32


@pytest.mark.parametrize("choice", [{"temperature": 0}, *FILTERS[:3], FILTERS[-1]], ids=str)
def test_sample_token_is_sample_logits_of_the_product(choice):
    hidden, head, keys = hidden_and_head()
    drawn = jax.jit(functools.partial(kernels.sample_token, **choice))(hidden, head, keys)
    np.testing.assert_array_equal(drawn, sample(hidden @ head, keys, **choice))
    assert len(set(np.asarray(drawn).tolist())) == 9


def hidden_and_head():
    generator = np.random.default_rng(11)
    hidden = generator.normal(size=(192, 16)).astype(np.float32)
    head = (generator.normal(size=(16, 9)) / 3).astype(np.float32)
    return hidden, head, jax.random.split(jax.random.key(13), 192)


def test_a_head_in_half_precision():
    hidden, head, keys = hidden_and_head()
    rough = jax.jit(kernels.sample_token)(hidden, jnp.asarray(head, jnp.bfloat16), keys)
    assert (rough == sample(hidden @ head, keys)).mean() > 0.9  # close, and the same noise


def test_what_it_refuses():
    logits, keys = jnp.zeros((2, 4)), jax.random.split(jax.random.key(0), 2)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
    ):
        with pytest.raises(ValueError, match="out of range"):
            kernels.sample_logits(logits, keys, **wrong)
    with pytest.raises(NotImplementedError, match="known: reference, gpu, indices"):
        kernels.sample_logits(logits, keys, top_k=2, implementation="mosaic")
    for choice in ({}, {"top_k": 4}, {"top_k": 2, "temperature": 0}):
        with pytest.raises(NotImplementedError, match=r"indices needs .*; available: reference$"):
            kernels.sample_logits(logits, keys, implementation="indices", **choice)
