import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data import MarkovSource


def chain(seed=0, vocabulary=3):
    """A chain that does not begin at its stationary distribution, with impossible transitions."""
    generator = np.random.default_rng(seed)
    transition = generator.random((vocabulary, vocabulary))
    transition[0, 1] = 0
    initial = generator.random(vocabulary)
    initial[-1] = 0
    return MarkovSource(initial / initial.sum(), transition / transition.sum(1, keepdims=True))


def everything(vocabulary, length):
    return np.array(list(itertools.product(range(vocabulary), repeat=length)))


@pytest.mark.parametrize("source", [chain(), MarkovSource.random(3, 0)])
def test_entropy_and_probabilities_agree_with_enumeration(source):
    sequences = everything(3, 4)
    log_prob = source.log_prob(sequences)
    assert log_prob.shape == (81,)
    assert log_prob.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1, rtol=1e-12)
    possible = log_prob[np.isfinite(log_prob)]
    np.testing.assert_allclose(source.entropy(4), -np.exp(possible) @ possible, rtol=1e-12)
    for tokens, value in zip(sequences, log_prob, strict=True):
        product = source.initial[tokens[0]]
        for previous, following in itertools.pairwise(tokens):
            product *= source.transition[previous, following]
        np.testing.assert_allclose(np.exp(value), product, rtol=1e-12)


@pytest.mark.parametrize("source", [chain(), MarkovSource.random(20, 0)])
def test_samples_have_the_entropy_of_the_source(source):
    surprise = -source.log_prob(source.batch(0, 0, 20_000, length=6)["tokens"])
    error = surprise.std() / np.sqrt(len(surprise))
    assert np.isfinite(surprise).all()
    assert abs(surprise.mean() - source.entropy(6)) < 4 * error


def test_samples_have_the_frequencies_of_the_source():
    source = chain()
    tokens = source.batch(0, 0, 40_000, length=3)["tokens"]
    counts = np.bincount(tokens @ [9, 3, 1], minlength=27)
    expected = 40_000 * np.exp(source.log_prob(everything(3, 3)))
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi_square < seen.sum() - 1 + 4 * np.sqrt(2 * seen.sum())


@settings(max_examples=30, deadline=None)
@given(vocabulary=st.integers(1, 30), seed=st.integers(0, 100), concentration=st.floats(0.1, 100))
def test_random_chains_are_stationary(vocabulary, seed, concentration):
    source = MarkovSource.random(vocabulary, seed, concentration)
    np.testing.assert_allclose(source.initial @ source.transition, source.initial, atol=1e-12)
    rate = source.entropy_rate
    np.testing.assert_allclose(source.entropy(7) - source.entropy(6), rate, atol=1e-9)
    assert -1e-9 <= rate <= np.log(vocabulary) + 1e-9


def test_the_entropy_rate_is_the_limit_of_any_start():
    source = chain()
    np.testing.assert_allclose(
        source.entropy(101) - source.entropy(100), source.entropy_rate, rtol=1e-9
    )


def test_limits():
    uniform = MarkovSource(np.full(4, 0.25), np.full((4, 4), 0.25))
    np.testing.assert_allclose(uniform.entropy(5), 5 * np.log(4))
    cycle = MarkovSource(np.full(3, 1 / 3), np.roll(np.eye(3), 1, axis=1))
    np.testing.assert_allclose(cycle.entropy(9), np.log(3))
    np.testing.assert_allclose(cycle.entropy_rate, 0, atol=1e-12)
    tokens = cycle.batch(0, 0, 5, length=9)["tokens"]
    assert (np.diff(tokens, axis=1) % 3 == 1).all()


@settings(max_examples=50, deadline=None)
@given(shards=st.integers(1, 8), each=st.integers(1, 9), step=st.integers(0, 1000))
def test_the_shards_concatenated_are_the_batch(shards, each, step):
    source, size = chain(), shards * each
    whole = source.batch(7, step, size, length=5)["tokens"]
    parts = [source.batch(7, step, size, length=5, shard=(i, shards)) for i in range(shards)]
    assert whole.shape == (size, 5)
    assert whole.dtype == np.int32
    assert np.array_equal(whole, np.concatenate([part["tokens"] for part in parts]))


def test_seeds_and_steps_give_different_batches():
    source = MarkovSource.random(50, 0)
    batches = [source.batch(s, t, 8, length=8)["tokens"] for s in range(3) for t in range(3)]
    assert len({tokens.tobytes() for tokens in batches}) == 9


HALF = np.full(2, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MarkovSource(HALF.astype(np.float32), np.eye(2)), "initial must be float64"),
        (lambda: MarkovSource(np.zeros(0), np.zeros((0, 0))), "V >= 1"),
        (lambda: MarkovSource(HALF, np.eye(3)), r"transition must be float64 \[2, 2\]"),
        (lambda: MarkovSource(HALF, np.ones((2, 2))), "transition holds a row"),
        (lambda: MarkovSource(np.array([1.5, -0.5]), np.eye(2)), "initial holds a row"),
        (lambda: MarkovSource(np.array([np.nan, 1]), np.eye(2)), "initial holds a row"),
        (lambda: MarkovSource.random(0, 0), "vocabulary 0"),
        (lambda: MarkovSource.random(3, -1), "seed -1"),
        (lambda: MarkovSource.random(3, 0, 0.0), r"concentration 0\.0"),
        (lambda: MarkovSource(HALF, np.eye(2)).entropy_rate, "several stationary distributions"),
        (lambda: chain().entropy(0), "length is 0"),
        (lambda: chain().batch(0, 0, 2, length=0), "length is 0"),
        (lambda: chain().batch(0, 0, 4, length=2, shard=(0, 3)), "not a multiple"),
        (lambda: chain().batch(-1, 0, 4, length=2), "seed is -1"),
        (lambda: chain().log_prob(np.zeros(3, np.int32)), r"integers \[B, L\] with L >= 1"),
        (lambda: chain().log_prob(np.zeros((3, 0), np.int32)), r"integers \[B, L\] with L >= 1"),
        (lambda: chain().log_prob(np.zeros((3, 2))), "not float64"),
        (lambda: chain().log_prob(np.full((3, 2), 3)), r"must lie in 0\.\.2"),
    ],
)
@unchecked_annotations()
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
