"""mask_scores: exact distributions and noise; keep_most_confident: exact sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import kernels
from kernels import dispatch
from kernels.mask_scores.cases import example
from kernels.mask_scores.cases import kept_by_sorting as by_sorting
from kernels.threefry import gumbel

DRAWS = 20_000
B, L, V = 24, 10, 33
IMPLEMENTATIONS = tuple(dispatch.operations()["keep_most_confident"].implementations())


@functools.partial(jax.jit, static_argnames=("temperature", "noise"))
def _scores(logits, tokens, masked, keys, temperature, noise):
    return kernels.mask_scores(logits, tokens, masked, keys, temperature=temperature, noise=noise)


def scores(logits, tokens, masked, keys, temperature=1.0, noise=0.0):
    return tuple(np.asarray(x) for x in _scores(logits, tokens, masked, keys, temperature, noise))


@functools.partial(jax.jit, static_argnames="implementation")
def _keep(confidence, count, implementation):
    return kernels.keep_most_confident(confidence, count, implementation=implementation)


def keep(confidence, count, implementation=None):
    return np.asarray(_keep(confidence, count, implementation))


def case(excluded=0.3):
    logits, tokens, masked, keys = example(V, B, L, V, excluded)
    return np.array(logits), np.asarray(tokens), np.asarray(masked), keys


def many(logits, temperature=1.0, noise=0.0, seed=0):
    """DRAWS results at positions that are all masked; logits [L, V] of every row."""
    shape = (DRAWS, len(logits))
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    every = np.broadcast_to(logits, (DRAWS, *logits.shape))
    return scores(every, np.zeros(shape, np.int32), np.ones(shape, bool), keys, temperature, noise)


def softmax(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


LAWS = np.array(
    [[0.9, -0.4, 0.1, -np.inf, 1.2], [0.0, 0.5, -0.5, -1.0, -np.inf], [0.3, 0.3, 0.3, 0.3, 0.3]],
    np.float32,
)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
def test_draws_have_the_distribution_and_positions_are_independent(temperature):
    drawn, _, _ = many(LAWS, temperature)
    expected = softmax(LAWS, temperature)
    for position, p in enumerate(expected):
        observed = np.bincount(drawn[:, position], minlength=5)
        assert observed[p == 0].sum() == 0
        assert stats.chisquare(observed[p > 0], DRAWS * p[p > 0]).pvalue > 1e-4
        other = softmax(LAWS[position], 2 * temperature)
        if position < 2:  # the third is uniform at every temperature
            wrong = stats.chisquare(observed[p > 0], DRAWS * other[p > 0])
            assert wrong.pvalue < 1e-6
    for one, other in ((0, 1), (0, 2), (1, 2)):
        table = np.zeros((5, 5))
        np.add.at(table, (drawn[:, one], drawn[:, other]), 1)
        p = np.outer(expected[one], expected[other])
        assert stats.chisquare(table[p > 0], DRAWS * p[p > 0]).pvalue > 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_temperature_zero_takes_the_first_of_the_most_probable(noise):
    logits, tokens, masked, keys = case()
    logits = np.where(logits > 0, np.round(logits), logits)  # ties
    assert ((logits == logits.max(-1, keepdims=True)).sum(-1) > 1).any()
    drawn, _, _ = scores(logits, tokens, masked, keys if noise else None, 0, noise)
    np.testing.assert_array_equal(drawn, np.where(masked, logits.argmax(-1), tokens))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [0, 1.0, 3.0])
def test_log_probabilities_are_those_at_temperature_one(temperature, dtype):
    logits, tokens, masked, keys = case()
    logits = jnp.asarray(logits, dtype)
    drawn, log_prob, confidence = scores(logits, tokens, masked, keys, temperature)
    assert [x.dtype for x in (drawn, log_prob, confidence)] == [np.int32, np.float32, np.float32]
    expected = jax.nn.log_softmax(logits.astype(jnp.float32))
    places = np.where(masked, drawn, 0)
    expected = np.take_along_axis(np.asarray(expected), places[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob[masked], expected[masked], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(confidence[masked], log_prob[masked])
    assert np.isfinite(log_prob).all()  # nothing excluded is drawn


def test_log_probabilities_of_large_logits():
    logits, tokens, masked, keys = case(excluded=0.0)
    _, log_prob, _ = scores(logits, tokens, masked, keys, 0)
    _, moved, _ = scores(logits + np.float32(2.0**14), tokens, masked, keys, 0)
    np.testing.assert_allclose(moved, log_prob, atol=1e-2)  # the logits themselves are rounded
    _, sure, _ = scores(1e30 * logits, tokens, masked, keys, 0)
    assert (sure == 0).all()


@pytest.mark.parametrize("noise", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_is_known_is_left_alone(temperature, noise):
    logits, tokens, masked, keys = case()
    logits[~masked] = -np.inf  # whatever is there
    got = scores(logits, tokens, masked, keys, temperature, noise)
    for x, known in zip(got, (tokens, 0, np.inf), strict=True):
        np.testing.assert_array_equal(x[~masked], np.broadcast_to(known, x.shape)[~masked])
    assert all(np.isfinite(x[masked]).all() and (x[masked] < 1000).all() for x in got)


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_noise_is_standard_gumbel_and_independent_of_tokens_and_positions(noise):
    drawn, log_prob, confidence = many(LAWS, 1.0, noise, seed=1)
    added = (confidence - log_prob) / noise
    for position in range(3):
        column, token = added[:, position], drawn[:, position]
        assert stats.kstest(column, stats.gumbel_r.cdf).pvalue > 1e-4
        assert stats.kstest(1.1 * column, stats.gumbel_r.cdf).pvalue < 1e-6
        groups = [column[token == v] for v in np.unique(token)]
        assert len(groups) > 3
        assert stats.kruskal(*groups).pvalue > 1e-4
        assert stats.spearmanr(column, added[:, position - 1]).pvalue > 1e-4


def test_noise_does_not_move_tokens_and_counts_from_the_top():
    logits, tokens, masked, keys = case()
    quiet = scores(logits, tokens, masked, keys, 0.8)
    loud = scores(logits, tokens, masked, keys, 0.8, 3.0)
    np.testing.assert_array_equal(loud[0], quiet[0])
    np.testing.assert_array_equal(loud[1], quiet[1])
    places = jnp.uint32(0xFFFFFFFF) - jnp.arange(L, dtype=jnp.uint32)
    expected = quiet[1] + 3 * np.asarray(gumbel(keys, places))
    np.testing.assert_allclose(loud[2][masked], expected[masked], rtol=1e-5, atol=1e-6)


def test_one_kept_of_noise_one_is_a_draw_by_probability():
    logits = np.log(np.array([[2, 8], [4, 6], [3, 7], [1, 9], [5, 5]], np.float32) / 10)
    _, log_prob, confidence = many(logits, 0, 1.0, seed=2)
    kept = keep(confidence, 1)
    assert (kept.sum(1) == 1).all()
    p = np.exp(log_prob[0].astype(np.float64))
    np.testing.assert_allclose(p, [0.8, 0.6, 0.7, 0.9, 0.5], rtol=1e-6)
    assert stats.chisquare(kept.sum(0), DRAWS * p / p.sum()).pvalue > 1e-4
    # Two of five, without replacement: an unordered pair comes in either order.
    pairs = keep(confidence, 2)
    p /= p.sum()
    ones, others = np.triu_indices(5, 1)
    expected = p[ones] * p[others] * (1 / (1 - p[ones]) + 1 / (1 - p[others]))
    observed = (pairs[:, ones] & pairs[:, others]).sum(0)
    assert observed.sum() == DRAWS
    assert stats.chisquare(observed, DRAWS * expected).pvalue > 1e-4


def assert_same(got, expected):
    """Tokens to the bit; the order of a float sum is the compiler's, one for each shape."""
    np.testing.assert_array_equal(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_position_knows_neither_its_length_nor_its_batch(temperature):
    logits, tokens, masked, keys = case()
    whole = scores(logits, tokens, masked, keys, temperature, 1.5)
    for rows, length in ((B, 1), (1, L), (5, 4)):
        part = (x[:rows, :length] for x in (logits, tokens, masked))
        got = scores(*part, keys[:rows], temperature, 1.5)
        assert_same(got, [x[:rows, :length] for x in whole])
    got = scores(logits[::-1], tokens[::-1], masked[::-1], keys[::-1], temperature, 1.5)
    assert_same(got, [x[::-1] for x in whole])


def test_compiled_is_eager_and_noise_may_be_traced():
    logits, tokens, masked, keys = case()
    expected = scores(logits, tokens, masked, keys, 0.7, 1.5)
    eager = kernels.mask_scores(logits, tokens, masked, keys, temperature=0.7, noise=1.5)
    traced = jax.jit(functools.partial(kernels.mask_scores, temperature=0.7))
    for got in (eager, traced(logits, tokens, masked, keys, noise=1.5)):
        assert_same(got, expected)
    silent = traced(logits, tokens, masked, keys, noise=0.0)
    np.testing.assert_array_equal(silent[1][masked], silent[2][masked])


def test_without_noise_none_is_computed():
    def primitives(noise, keys):
        run = functools.partial(kernels.mask_scores, temperature=0, noise=noise)
        return str(jax.make_jaxpr(run)(*case()[:3], keys))

    keys = case()[3]
    assert "shift_left" in primitives(1.0, keys)
    assert "shift_left" not in primitives(0.0, keys)
    assert "shift_left" not in primitives(0, None)


VALUES = st.sampled_from([-np.inf, -3e38, -1.0, -1e-20, -0.0, 0.0, 1e-20, 1.0, 1.0000001, np.inf])
ROWS = st.lists(st.lists(VALUES, min_size=9, max_size=9), min_size=3, max_size=3)
COUNTS = st.lists(st.integers(-2, 11), min_size=3, max_size=3)


@settings(max_examples=100, deadline=None)
@given(ROWS, COUNTS)
def test_kept_sets_of_ties_and_infinities_are_those_of_sorting(rows, counts):
    confidence, count = np.array(rows, np.float32), np.array(counts, np.int32)
    expected = by_sorting(confidence, count)
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_array_equal(keep(confidence, count, implementation), expected)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_exactly_as_many_as_asked_for_are_kept(implementation):
    confidence = np.random.default_rng(0).normal(size=(64, 64)).round().astype(np.float32)
    count = np.arange(64, dtype=np.int32)
    kept = keep(confidence, count, implementation)
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept.sum(1), count)
    eager = kernels.keep_most_confident(confidence, count, implementation=implementation)
    np.testing.assert_array_equal(eager, kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_number_for_all_rows_and_numbers_out_of_range(implementation):
    confidence = np.array([[0, 2, 1, 2], [5, 5, 5, -np.inf]], np.float32)
    run = functools.partial(keep, implementation=implementation)
    np.testing.assert_array_equal(run(confidence, 2), [[0, 1, 0, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(run(confidence, jnp.int32(3)), [[0, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(run(confidence, np.array([-1, 2**31 - 1])), [[0] * 4, [1] * 4])


def test_few_positions_are_sorted_and_many_are_not():
    def sorts(shape, implementation=None):
        run = functools.partial(kernels.keep_most_confident, implementation=implementation)
        return "sort" in str(jax.make_jaxpr(run)(jnp.zeros(shape), 1))

    assert sorts((1, 64))
    assert not sorts((1, 65))
    assert not sorts((64, 8))
    assert not sorts((1, 64), "threshold")
    assert sorts((64, 8), "reference")


@pytest.mark.usefixtures("unchecked_types")
def test_what_mask_scores_refuses():
    logits, tokens, masked, keys = case()
    run = kernels.mask_scores
    for temperature in (-1.0, 1e-38, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="is neither 0 nor in"):
            run(logits, tokens, masked, keys, temperature=temperature)
    for noise in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"is not in \[0, inf\)"):
            run(logits, tokens, masked, keys, noise=noise)
    with pytest.raises(ValueError, match="not a scalar"):
        run(logits, tokens, masked, keys, noise=jnp.ones(B))
    for choice in (
        {},
        {"temperature": 0, "noise": 1.0},
        {"temperature": 0, "noise": jnp.zeros(())},
    ):
        with pytest.raises(ValueError, match="keys may be None only"):
            run(logits, tokens, masked, None, **choice)
    for wrong in ((logits[0], tokens, masked), (logits, tokens[1:], masked)):
        with pytest.raises(ValueError, match="are not"):
            run(*wrong, keys)
    with pytest.raises(ValueError, match="are not"):
        run(logits, tokens, masked[:, 1:], keys)
    with pytest.raises(ValueError, match="not bool"):
        run(logits, tokens, tokens, keys)
    with pytest.raises(ValueError, match="keys for 24 samples"):
        run(logits, tokens, masked, keys[1:])
    with pytest.raises(NotImplementedError, match=r"known: reference, gpu, tpu$"):
        run(logits, tokens, masked, keys, implementation="threshold")


@pytest.mark.parametrize(("length", "fits"), [(2**20, True), (2**20 + 1, False)])
def test_counters_of_tokens_and_of_noise_do_not_meet(length, fits):
    vocabulary = 2**12 - 1
    shapes = (
        jax.ShapeDtypeStruct((1, length, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), bool),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
    )
    run = functools.partial(kernels.mask_scores, noise=1.0)
    if fits:
        assert jax.eval_shape(run, *shapes)[0].shape == (1, length)
    else:
        with pytest.raises(ValueError, match="no counters"):
            jax.eval_shape(run, *shapes)


@pytest.mark.usefixtures("unchecked_types")
def test_what_keep_most_confident_refuses():
    confidence = jnp.zeros((2, 4))
    for wrong in (jnp.zeros(3, jnp.int32), jnp.zeros((2, 1), jnp.int32)):
        with pytest.raises(ValueError, match=r"are not \[B, L\] and \[B\]"):
            kernels.keep_most_confident(confidence, wrong)
    with pytest.raises(ValueError, match="are not"):
        kernels.keep_most_confident(confidence[0], 1)
    with pytest.raises(ValueError, match="not integers"):
        kernels.keep_most_confident(confidence, jnp.ones(2))
    with pytest.raises(NotImplementedError, match="known: reference, threshold"):
        kernels.keep_most_confident(confidence, 1, implementation="mosaic")
