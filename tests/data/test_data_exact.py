import itertools

import numpy as np
import pytest

from annotations import unchecked_annotations
from gen_jax.data.exact import Enumerated
from gen_jax.data.exact_sets import (
    EOS,
    BinaryPyramid,
    NoisyMixture,
    binary_chain,
    bit_entropy,
    even_parity,
    lengths,
    lengths_first,
    modes,
    permutations,
)
from gen_jax.data.gaussian_process import (
    GaussianSource,
    correlated_pair,
    gaussian_kl,
    levinson,
    sinusoid,
    sinusoid_autocovariance,
    sinusoid_gap,
)
from gen_jax.data.markov import MarkovSource

LN2 = np.log(2)


def random_distribution(seed=0, number=20, length=5, vocabulary=3):
    stream = np.random.default_rng(seed)
    rows = stream.choice(vocabulary**length, number, replace=False)
    support = rows[:, None] // vocabulary ** np.arange(length) % vocabulary
    return Enumerated(support.astype(np.int32), stream.dirichlet(np.ones(number)), vocabulary)


DISTRIBUTIONS = {
    "modes": modes((0.5, 0.3, 0.2), 4),
    "mixture": NoisyMixture(2, 4, 3, 0.2).data,
    "latent and mixture": NoisyMixture(2, 4, 2, 0.1, (0.7, 0.3)).joint,
    "parity": even_parity(5),
    "permutations": permutations(4),
    "chain": binary_chain(6, 0.9),
    "lengths": lengths(4),
    "random": random_distribution(),
}
each = pytest.mark.parametrize("dist", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())


def entropy(prob):
    prob = prob[prob > 0]
    return -prob @ np.log(prob)


def marginal(dist, positions):
    others = tuple(i for i in range(dist.length) if i not in positions)
    return dist.dense().sum(axis=others).reshape(-1)


@each
def test_log_prob_and_dense_agree_on_every_sequence(dist):
    everything = np.array(list(itertools.product(range(dist.vocabulary), repeat=dist.length)))
    log_prob = dist.log_prob(everything)
    np.testing.assert_array_equal(np.exp(log_prob).reshape(-1) > 0, dist.dense().reshape(-1) > 0)
    np.testing.assert_allclose(np.exp(log_prob), dist.dense().reshape(-1), rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1, rtol=1e-12)
    again = Enumerated.from_dense(dist.dense())
    np.testing.assert_allclose(again.entropy, dist.entropy, rtol=1e-12)


@each
def test_with_everything_masked_the_conditionals_are_the_marginals(dist):
    masked = np.full((1, dist.length), -1)
    np.testing.assert_allclose(dist.conditionals(masked, -1)[0], dist.marginals, atol=1e-14)
    for i in range(dist.length):
        np.testing.assert_allclose(dist.marginals[i], marginal(dist, [i]), atol=1e-14)


@each
def test_conditionals_are_ratios_of_marginals(dist):
    mask_id, stream = dist.vocabulary, np.random.default_rng(0)
    tokens = dist.sample(0, 20)
    hidden = stream.random(tokens.shape) < 0.5
    rows = dist.conditionals(np.where(hidden, mask_id, tokens), mask_id)
    np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-12)
    for x, unknown, row in zip(tokens, hidden, rows, strict=True):
        matches = (dist.support[:, ~unknown] == x[~unknown]).all(axis=1)
        for i, v in itertools.product(range(dist.length), range(dist.vocabulary)):
            expected = dist.prob[matches & (dist.support[:, i] == v)].sum()
            np.testing.assert_allclose(row[i, v], expected / dist.prob[matches].sum(), atol=1e-13)


def test_a_context_that_cannot_occur_is_uniform_and_keeps_what_is_known():
    rows = even_parity(3).conditionals(np.array([[1, 0, 0], [1, 2, 0]]), 2)
    np.testing.assert_array_equal(rows[0], [[0, 1], [1, 0], [1, 0]])
    np.testing.assert_array_equal(rows[1], [[0, 1], [0, 1], [1, 0]])
    impossible = modes((0.5, 0.5), 3).conditionals(np.array([[0, 0, 2]]), 2)
    np.testing.assert_array_equal(impossible[0], [[1, 0], [1, 0], [0.5, 0.5]])


@each
def test_subset_entropies_are_those_of_the_marginals(dist):
    profile = [[] for _ in range(dist.length + 1)]
    for index in range(1 << dist.length):
        subset = tuple(i for i in range(dist.length) if index >> i & 1)
        expected = entropy(marginal(dist, subset)) if subset else 0
        np.testing.assert_allclose(dist.subset_entropies[index], expected, atol=1e-12)
        np.testing.assert_allclose(dist.subset_entropy(subset), expected, atol=1e-12)
        profile[len(subset)].append(expected)
    means = [np.mean(values) for values in profile]
    np.testing.assert_allclose(dist.entropy_profile, means, atol=1e-12)


@each
def test_the_profile_rises_and_is_concave_and_ends_at_the_entropy(dist):
    steps = np.diff(dist.entropy_profile)
    assert (steps > -1e-12).all()
    assert (np.diff(steps) < 1e-12).all()
    np.testing.assert_allclose(dist.entropy_profile[[0, -1]], [0, dist.entropy], atol=1e-12)


@each
def test_samples_have_the_probabilities_by_chi_square(dist):
    number = 20_000
    for tokens in (dist.sample(3, number), dist.batch(3, 5, number)["tokens"]):
        assert tokens.dtype == np.int32
        equal = (tokens[:, None] == dist.support).all(axis=2)
        counts, expected = equal.sum(axis=0), number * dist.prob
        assert counts.sum() == number
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < len(counts) - 1 + 4 * np.sqrt(2 * len(counts))


def test_batches_are_functions_of_seed_and_step_and_their_shards_are_their_parts():
    dist = binary_chain(6, 0.9)
    whole = dist.batch(0, 4, 12)["tokens"]
    parts = [dist.batch(0, 4, 12, shard=(i, 3))["tokens"] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (dist.batch(0, 5, 12)["tokens"] != whole).any()
    assert (dist.batch(1, 4, 12)["tokens"] != whole).any()


@pytest.mark.parametrize(
    ("support", "prob", "vocabulary", "message"),
    [
        ([[0, 1], [0, 1]], [0.5, 0.5], 2, "twice"),
        ([[0, 1], [1, 1]], [0.5, 0.4], 2, "no distribution"),
        ([[0, 1], [1, 1]], [1.0, 0.0], 2, "no distribution"),
        ([[0, 1], [1, 1]], [np.nan, 0.5], 2, "no distribution"),
        ([[0, 1], [1, 2]], [0.5, 0.5], 2, "must lie in 0..1"),
        ([[0, 1], [1, 1]], [1.0], 2, "prob must be float64"),
        ([0, 1], [0.5, 0.5], 2, "support must be int32"),
    ],
)
@unchecked_annotations()
def test_what_is_no_distribution_is_refused(support, prob, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        Enumerated(np.array(support, np.int32), np.array(prob), vocabulary)


def test_arguments_out_of_range_are_refused():
    dist = even_parity(4)
    for call in (
        lambda: dist.log_prob(np.zeros((2, 3), int)),
        lambda: dist.log_prob(np.full((2, 4), 2)),
        lambda: dist.conditionals(np.zeros((1, 4), int), 1),
        lambda: dist.conditionals(np.full((1, 4), 3), 2),
        lambda: dist.subset_entropy((0, 4)),
        lambda: dist.total_correlation((0, 1), (1,)),
        lambda: dist.sample(0, 0),
        lambda: binary_chain(17, 0.9).entropy_profile,
        lambda: modes((0.5, 0.2), 3),
        lambda: modes((), 3),
        lambda: NoisyMixture(3, 4, 2, 0.1),
        lambda: NoisyMixture(2, 4, 2, 1.1),
        lambda: NoisyMixture(2, 4, 2, 0.1, (0.5, 0.6)),
        lambda: even_parity(0),
        lambda: permutations(9),
        lambda: binary_chain(3, 1.5),
        lambda: lengths(0),
        lambda: lengths_first(0),
        lambda: BinaryPyramid(0, 0.1),
        lambda: BinaryPyramid(3, 0.1).data,
        lambda: BinaryPyramid(4, 0.1).leaves,
        lambda: correlated_pair(1.0),
        lambda: sinusoid(8, 4, 0.1),
        lambda: sinusoid(8, 2, 0.0),
        lambda: levinson(np.array([1.0, 1.0, 1.0])),
        lambda: GaussianSource(np.array([[1.0, 0.5], [0.4, 1.0]])),
        lambda: GaussianSource(np.zeros((0, 0))),
    ):
        with pytest.raises(ValueError):
            call()


def test_no_two_modes_agree_anywhere():
    for support in (modes((0.2,) * 5, 7).support, NoisyMixture(3, 7, 4, 0.1).centres):
        for a, b in itertools.combinations(support, 2):
            assert (a != b).all()


def test_the_noisy_mixture_has_its_components_and_posterior():
    mixture = NoisyMixture(2, 4, 3, 0.3, (0.7, 0.3))
    x = mixture.data.support
    likelihood = mixture.components[:, np.arange(4), x].prod(axis=2)
    np.testing.assert_allclose(mixture.prior @ likelihood, mixture.data.prob, rtol=1e-12)
    np.testing.assert_allclose(
        mixture.posterior(x), (mixture.prior[:, None] * likelihood).T / mixture.data.prob[:, None]
    )
    latent = np.insert(x, 0, mixture.vocabulary, axis=1)
    of_joint = mixture.joint.conditionals(latent, mixture.vocabulary)[:, 0, :2]
    np.testing.assert_allclose(of_joint, mixture.posterior(x), rtol=1e-12)
    np.testing.assert_allclose(marginal(mixture.joint, [1, 2, 3, 4]), mixture.data.dense().ravel())


def test_without_noise_the_mixture_is_the_modes():
    clean = NoisyMixture(3, 4, 3, 0.0, (0.5, 0.3, 0.2)).data
    np.testing.assert_array_equal(clean.dense(), modes((0.5, 0.3, 0.2), 4).dense())


def test_the_chain_is_the_markov_source():
    dist = binary_chain(6, 0.9)
    source = MarkovSource(np.full(2, 0.5), np.array([[0.9, 0.1], [0.1, 0.9]]))
    np.testing.assert_allclose(source.log_prob(dist.support), np.log(dist.prob), rtol=1e-12)
    np.testing.assert_allclose(dist.entropy, LN2 + 5 * bit_entropy(0.9), rtol=1e-12)


def test_lengths_are_content_then_end():
    np.testing.assert_array_equal(lengths(3).support, [[0, EOS, EOS], [0, 0, EOS], [0, 0, 0]])
    np.testing.assert_array_equal(lengths_first(3).support[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(lengths_first(3).support[:, 1:], lengths(3).support)


@pytest.mark.parametrize(
    ("flip", "gap", "leaf_entropy", "leaf_correlation"),
    [(0.1, 30.917393, 7.008885, 4.081470), (0.05, 41.549083, 4.630419, 6.459936)],
)
def test_the_pyramid_of_bits(flip, gap, leaf_entropy, leaf_correlation):
    """Sides 1, 2, 4, 8: closed forms; the leaves of sides 1, 2, 4 enumerated."""
    whole = BinaryPyramid(4, flip)
    assert whole.edges == 84
    np.testing.assert_allclose(whole.one_shot_gap, gap, atol=5e-7)
    np.testing.assert_allclose(whole.entropy, LN2 + 84 * bit_entropy(flip), rtol=1e-12)
    leaves = BinaryPyramid(3, flip).leaves
    assert leaves.support.shape == (65536, 16)
    np.testing.assert_allclose(leaves.entropy, leaf_entropy, atol=1e-6)
    np.testing.assert_allclose(leaves.total_correlation(), leaf_correlation, atol=1e-6)


def test_the_leaves_of_the_pyramid_correlate_by_their_distance_in_the_tree():
    flip = 0.1
    leaves = BinaryPyramid(3, flip).leaves
    spins = 1 - 2.0 * leaves.support
    correlation = np.einsum("n,ni,nj->ij", leaves.prob, spins, spins)
    rows, columns = np.divmod(np.arange(16), 4)
    siblings = (rows[:, None] // 2 == rows // 2) & (columns[:, None] // 2 == columns // 2)
    expected = np.where(siblings, (1 - 2 * flip) ** 2, (1 - 2 * flip) ** 4)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(correlation, expected, atol=1e-12)


def test_the_small_pyramid_is_that_of_its_closed_forms():
    pyramid = BinaryPyramid(2, 0.2)
    assert pyramid.groups == ((0,), (1, 2, 3, 4))
    np.testing.assert_allclose(pyramid.data.entropy, pyramid.entropy, rtol=1e-12)
    np.testing.assert_allclose(pyramid.data.total_correlation(), pyramid.one_shot_gap, rtol=1e-12)
    np.testing.assert_allclose(
        marginal(pyramid.data, [1, 2, 3, 4]), pyramid.leaves.dense().ravel(), rtol=1e-12
    )
    np.testing.assert_allclose(
        pyramid.log_prob(pyramid.data.support), np.log(pyramid.data.prob), rtol=1e-12
    )


def test_images_drawn_from_the_pyramid_are_of_it():
    pyramid = BinaryPyramid(4, 0.1)
    tokens = pyramid.batch(0, 3, 4000)["tokens"]
    assert tokens.shape == (4000, 85)
    log_prob = pyramid.log_prob(tokens)
    error = log_prob.std() / 4000**0.5
    assert abs(-log_prob.mean() - pyramid.entropy) < 4 * error
    halves = [pyramid.batch(0, 3, 4000, shard=(i, 2))["tokens"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), tokens)


@pytest.mark.parametrize(
    ("source", "gap"),
    [
        (correlated_pair(0.9), 0.830366),
        (sinusoid(64, 4, 0.01), 139.612638),
        (sinusoid(16, 2, 0.1), 14.788713),
    ],
)
def test_the_one_shot_gap_of_gaussian_signals(source, gap):
    np.testing.assert_allclose(source.one_shot_gap, gap, atol=5e-7)
    independent = np.diag(np.diag(source.covariance))
    np.testing.assert_allclose(gaussian_kl(source.covariance, independent), gap, atol=5e-7)


def test_the_gap_of_the_sinusoid_in_closed_form():
    for length, cycles, noise in ((64, 4, 0.01), (64, 9, 0.01), (16, 2, 0.1), (7, 3, 2.0)):
        np.testing.assert_allclose(
            sinusoid(length, cycles, noise).one_shot_gap, sinusoid_gap(length, noise), rtol=1e-10
        )


@pytest.mark.parametrize("source", [correlated_pair(0.9), sinusoid(16, 2, 0.1)])
def test_one_linear_step_from_noise_is_exact(source):
    """The student of a flow: x = cholesky z has the covariance in one step, in any batch."""
    law = source.one_step(np.eye(source.length))
    np.testing.assert_allclose(gaussian_kl(source.covariance, law.T @ law), 0, atol=1e-10)
    noise = np.random.default_rng(0).standard_normal((5, source.length))
    np.testing.assert_allclose(source.autoregress(noise), source.one_step(noise), atol=1e-10)


@pytest.mark.parametrize(("length", "cycles", "noise"), [(16, 2, 0.1), (64, 4, 0.01)])
def test_levinson_predicts_as_the_covariance_does(length, cycles, noise):
    """Autoregression reaches gap 0 in N steps; its surprises add up to the one-shot gap."""
    source = sinusoid(length, cycles, noise)
    coefficients, variances = levinson(sinusoid_autocovariance(length, cycles, noise))
    np.testing.assert_allclose(coefficients, source.predictor[0], atol=1e-9)
    np.testing.assert_allclose(variances, source.predictor[1], rtol=1e-9)
    mixing = np.linalg.inv(np.eye(length) - coefficients) * np.sqrt(variances)
    np.testing.assert_allclose(gaussian_kl(source.covariance, mixing @ mixing.T), 0, atol=1e-8)
    surprises = 0.5 * np.log(variances[0] / variances).sum()
    np.testing.assert_allclose(surprises, sinusoid_gap(length, noise), rtol=1e-10)


def test_gaussian_samples_have_the_covariance_and_the_entropy():
    source = sinusoid(6, 1, 0.3)
    for signal in (source.sample(0, 20_000), source.batch(0, 1, 20_000)["signal"]):
        products = signal[:, :, None] * signal[:, None]
        error = products.std(axis=0) / np.sqrt(len(signal))
        assert (np.abs(products.mean(axis=0) - source.covariance) < 4.5 * error).all()
        surprise = -source.log_prob(signal)
        assert abs(surprise.mean() - source.entropy) < 4 * surprise.std() / np.sqrt(len(signal))


def test_gaussian_batches_are_pure_and_shards_are_their_parts():
    source = correlated_pair(0.5)
    whole = source.batch(0, 4, 12)["signal"]
    assert whole.dtype == np.float32
    parts = [source.batch(0, 4, 12, shard=(i, 3))["signal"] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
