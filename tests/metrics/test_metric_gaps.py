import itertools

import numpy as np
import pytest

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
from gen_jax.metrics.gaps import (
    any_order_bound,
    checkerboard_groups,
    code_groups,
    coverage,
    dyadic_groups,
    eos_hazards,
    half_groups,
    kl,
    kl_of_groups,
    law_of_groups,
    law_of_rounds,
    lengths_of_hazards,
    lengths_of_law,
    random_order_gap,
    total_variation,
    valid_mass,
    valid_mass_of_groups,
)
from gen_jax.models.masked.schedules import Cosine, Optimal, Power

LN2 = np.log(2)
DISTRIBUTIONS = {
    "modes": modes((0.5, 0.3, 0.2), 4),
    "mixture": NoisyMixture(2, 5, 2, 0.2).data,
    "parity": even_parity(5),
    "permutations": permutations(4),
    "chain": binary_chain(6, 0.9),
    "lengths": lengths(4),
}
each = pytest.mark.parametrize("dist", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())


def optimal_sizes(profile, rounds):
    return Optimal(tuple(profile)).sizes(len(profile) - 1, rounds)


def at_once(dist):
    return (tuple(range(dist.length)),)


def one_by_one(order):
    return tuple((i,) for i in order)


def compositions(length, rounds):
    for cuts in itertools.combinations(range(1, length), rounds - 1):
        yield tuple(np.diff((0, *cuts, length)).tolist())


@each
def test_drawing_one_position_at_a_time_is_exact_in_any_order(dist):
    for order in (range(dist.length), np.random.default_rng(0).permutation(dist.length).tolist()):
        np.testing.assert_allclose(kl_of_groups(dist, one_by_one(order)), 0, atol=1e-12)
        law = law_of_groups(dist, one_by_one(order))
        np.testing.assert_allclose(law, dist.dense(), atol=1e-14)
        np.testing.assert_allclose(valid_mass(dist, law), 1, rtol=1e-12)


@each
def test_the_sum_of_correlations_is_the_kl_of_the_law(dist):
    stream = np.random.default_rng(1)
    for _ in range(5):
        order = stream.permutation(dist.length).tolist()
        cut = int(stream.integers(1, dist.length))
        groups = (tuple(order[:cut]), tuple(order[cut:]))
        law = law_of_groups(dist, groups)
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
        mass = valid_mass_of_groups(dist, groups)
        np.testing.assert_allclose(mass, valid_mass(dist, law), rtol=1e-12)
        gap = kl_of_groups(dist, groups)
        np.testing.assert_allclose(kl(dist.dense(), law), gap, atol=1e-12)
        assert total_variation(dist.dense(), law) <= np.sqrt(max(gap, 0) / 2) + 1e-7


@each
def test_the_gap_of_random_orders_is_the_mean_over_all_of_them(dist):
    for sizes in ((1, dist.length - 1), (2, 1, dist.length - 3), (dist.length,)):
        gaps = []
        for order in itertools.permutations(range(dist.length)):
            ends = np.cumsum((0, *sizes))
            groups = tuple(order[a:b] for a, b in itertools.pairwise(ends))
            if all(tuple(sorted(group)) == group for group in groups):
                gaps.append(kl_of_groups(dist, groups))
        mean = random_order_gap(dist.entropy_profile, sizes)
        np.testing.assert_allclose(mean, np.mean(gaps), atol=1e-12)
        law = law_of_rounds(dist, sizes)
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
        assert kl(dist.dense(), law) <= mean + 1e-12


@pytest.mark.parametrize(
    "dist",
    [
        NoisyMixture(2, 8, 2, 0.2).data,
        binary_chain(8, 0.9),
        binary_chain(7, 0.2),
        even_parity(8),
        permutations(5),
        modes((0.6, 0.4), 6),
    ],
)
def test_no_sizes_beat_the_optimal_ones(dist):
    profile = dist.entropy_profile
    for rounds in range(1, dist.length + 1):
        sizes = optimal_sizes(profile, rounds)
        assert len(sizes) == rounds
        least = min(random_order_gap(profile, s) for s in compositions(dist.length, rounds))
        np.testing.assert_allclose(random_order_gap(profile, sizes), least, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "length", "gap", "distance"),
    [(2, 2, 0.693147, 0.5), (2, 4, 2.079442, 0.875), (4, 8, 9.704061, 0.999939)],
)
def test_equiprobable_modes_at_once(number, length, gap, distance):
    dist = modes((1 / number,) * number, length)
    law = law_of_groups(dist, at_once(dist))
    np.testing.assert_allclose(kl_of_groups(dist, at_once(dist)), gap, atol=5e-7)
    np.testing.assert_allclose(gap, (length - 1) * np.log(number), atol=5e-7)
    np.testing.assert_allclose(valid_mass(dist, law), number ** (1.0 - length), rtol=1e-10)
    np.testing.assert_allclose(total_variation(dist.dense(), law), distance, atol=5e-7)


def test_weighted_modes_at_once():
    dist = modes((0.7, 0.3), 2)
    np.testing.assert_allclose(kl_of_groups(dist, at_once(dist)), 0.610864, atol=5e-7)
    law = law_of_groups(dist, at_once(dist))
    np.testing.assert_allclose(total_variation(dist.dense(), law), 0.42, rtol=1e-12)


@each
def test_no_factorised_decoder_has_less_cross_entropy_than_the_marginals(dist):
    floor = sum(dist.subset_entropy((i,)) for i in range(dist.length))
    np.testing.assert_allclose(dist.entropy + kl_of_groups(dist, at_once(dist)), floor, atol=1e-12)

    def cross_entropy(rows):
        chosen = rows[np.arange(dist.length), dist.support]
        return -dist.prob @ np.log(chosen).sum(axis=1)

    np.testing.assert_allclose(cross_entropy(dist.marginals), floor, atol=1e-12)
    stream = np.random.default_rng(0)
    for _ in range(5):
        rows = stream.dirichlet(np.ones(dist.vocabulary), dist.length)
        assert cross_entropy(0.5 * dist.marginals + 0.5 * rows) > floor


def test_autoregression_over_modes_reaches_their_entropy():
    dist = modes((0.25,) * 4, 8)
    groups = one_by_one(range(8))
    assert len(groups) == 8
    np.testing.assert_allclose(dist.entropy, np.log(4), rtol=1e-12)
    np.testing.assert_allclose(kl_of_groups(dist, groups), 0, atol=1e-12)
    law = law_of_groups(dist, groups)
    np.testing.assert_allclose(total_variation(dist.dense(), law), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "vocabulary", "gap", "distance"),
    [(2, 2, 1.298117, 0.689513), (4, 4, 2.777474, 0.766589)],
)
def test_a_shared_latent_closes_the_gap_of_the_noisy_mixture(number, vocabulary, gap, distance):
    mixture = NoisyMixture(number, 4, vocabulary, 0.1)
    dist = mixture.data
    law = law_of_groups(dist, at_once(dist))
    np.testing.assert_allclose(kl_of_groups(dist, at_once(dist)), gap, atol=5e-7)
    np.testing.assert_allclose(total_variation(dist.dense(), law), distance, atol=5e-7)
    two_rounds = ((0,), (1, 2, 3, 4))
    np.testing.assert_allclose(kl_of_groups(mixture.joint, two_rounds), 0, atol=1e-12)


def test_a_small_latent_does_not_help_parity():
    """A product law inside even strings is one string, so 2 ** (L - 1) components are needed."""
    dist = even_parity(5)
    for known in range(5):
        rest = dist.total_correlation(given=tuple(range(known)))
        np.testing.assert_allclose(rest, LN2 if known < 4 else 0, atol=1e-12)
    for a, b in itertools.combinations(range(len(dist.support)), 2):
        pair = Enumerated(dist.support[[a, b]], np.array([0.5, 0.5]), 2)
        assert valid_mass(dist, law_of_groups(pair, at_once(pair))) < 1


@pytest.mark.parametrize(("number", "length"), [(2, 4), (4, 5)])
def test_conditioning_closes_the_gap_and_distillation_costs_modes(number, length):
    dist = modes((1 / number,) * number, length)
    told = np.insert(dist.support, 0, np.arange(number), axis=1)
    told = Enumerated(told, dist.prob, number)
    content = tuple(range(1, length + 1))
    gap = (length - 1) * np.log(number)
    np.testing.assert_allclose(told.total_correlation(content), gap, rtol=1e-12)
    np.testing.assert_allclose(told.total_correlation(content, (0,)), 0, atol=1e-12)
    distilled = Enumerated(dist.support[:1], np.ones(1), number)
    np.testing.assert_allclose(kl_of_groups(distilled, at_once(dist)), 0, atol=1e-12)
    law = law_of_groups(distilled, at_once(dist))
    np.testing.assert_allclose(coverage(dist, law), 1 / number, rtol=1e-12)
    np.testing.assert_allclose(coverage(dist, law_of_groups(dist, at_once(dist))), 1, rtol=1e-12)


SCHEDULES = {"cosine": Cosine(), "linear": Power(1.0), "square root": Power(0.5)}
SIZES = {
    "cosine": ((3, 5), (2, 2, 4), (1, 2, 2, 3)),
    "linear": ((4, 4), (3, 3, 2), (2, 2, 2, 2)),
    "square root": ((6, 2), (5, 2, 1), (4, 2, 1, 1)),
}


@pytest.mark.parametrize(
    ("dist", "name", "gaps"),
    [
        (NoisyMixture(2, 8, 2, 0.2).data, "cosine", (0.6229, 0.3124, 0.0936)),
        (NoisyMixture(2, 8, 2, 0.2).data, "linear", (0.8817, 0.5555, 0.2790)),
        (NoisyMixture(2, 8, 2, 0.2).data, "square root", (1.536, 1.1822, 0.8448)),
        (NoisyMixture(2, 8, 2, 0.2).data, "optimal", (0.5490, 0.1794, 0.0906)),
        (binary_chain(8, 0.9), "cosine", (0.8330, 0.4293, 0.2199)),
        (binary_chain(8, 0.9), "linear", (0.9973, 0.6179, 0.3064)),
        (binary_chain(8, 0.9), "square root", (1.6639, 1.2399, 0.8528)),
        (binary_chain(8, 0.9), "optimal", (0.8330, 0.4293, 0.2199)),
        (even_parity(8), "cosine", (LN2, LN2, LN2)),
        (even_parity(8), "linear", (LN2, LN2, LN2)),
        (even_parity(8), "square root", (LN2, 0, 0)),
        (even_parity(8), "optimal", (0, 0, 0)),
    ],
)
def test_more_rounds_shrink_the_gap_and_no_schedule_is_always_best(dist, name, gaps):
    """2, 3 and 4 rounds over 8 positions."""
    profile = dist.entropy_profile
    for rounds, gap in zip((2, 3, 4), gaps, strict=True):
        if name == "optimal":
            sizes = optimal_sizes(profile, rounds)
        else:
            sizes = SIZES[name][rounds - 2]
            assert SCHEDULES[name].sizes(8, rounds) == sizes
        np.testing.assert_allclose(random_order_gap(profile, sizes), gap, atol=6e-5)


@pytest.mark.parametrize(
    ("dist", "gap"),
    [
        (NoisyMixture(2, 8, 2, 0.2).data, 2.2570),
        (binary_chain(8, 0.9), 2.5764),
        (even_parity(8), LN2),
    ],
)
def test_one_round_and_eight_are_the_ends_of_the_line(dist, gap):
    np.testing.assert_allclose(random_order_gap(dist.entropy_profile, (8,)), gap, atol=6e-5)
    np.testing.assert_allclose(dist.total_correlation(), gap, atol=6e-5)
    np.testing.assert_allclose(random_order_gap(dist.entropy_profile, (1,) * 8), 0, atol=1e-12)


def test_parity_is_exact_where_the_last_bit_is_drawn_alone():
    assert optimal_sizes(even_parity(8).entropy_profile, 2) == (7, 1)
    dist = even_parity(6)
    np.testing.assert_allclose(kl_of_groups(dist, ((0, 1, 2, 3, 4), (5,))), 0, atol=1e-12)
    np.testing.assert_allclose(kl_of_groups(dist, ((0, 1, 2), (3, 4, 5))), LN2, rtol=1e-12)


def test_permutations_in_groups():
    dist = permutations(4)
    np.testing.assert_allclose(dist.total_correlation(), np.log(256 / 24), rtol=1e-12)
    np.testing.assert_allclose(np.log(256 / 24), 2.367124, atol=5e-7)
    law = law_of_groups(dist, at_once(dist))
    np.testing.assert_allclose(total_variation(dist.dense(), law), 0.90625, rtol=1e-12)
    for sizes, gap in (
        ((2, 2), 0.980829),
        ((1, 3), 1.504077),
        ((3, 1), 0.980829),
        ((1, 1, 2), 0.693147),
    ):
        ends = np.cumsum((0, *sizes))
        groups = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
        np.testing.assert_allclose(kl_of_groups(dist, groups), gap, atol=5e-7)
        np.testing.assert_allclose(random_order_gap(dist.entropy_profile, sizes), gap, atol=5e-7)


def test_three_ways_to_end_a_sequence():
    """Lengths uniform on 1..4: length first, EOS at once and cut, EOS with its loss masked."""
    np.testing.assert_allclose(kl_of_groups(lengths_first(4), ((0,), (1, 2, 3, 4))), 0, atol=1e-12)
    dist = lengths(4)
    np.testing.assert_allclose(dist.total_correlation(), 0.431523, atol=5e-7)
    wanted = lengths_of_law(dist.dense(), EOS)
    cut = lengths_of_law(law_of_groups(dist, at_once(dist)), EOS)
    np.testing.assert_allclose(wanted, [0, 0.25, 0.25, 0.25, 0.25], rtol=1e-12)
    np.testing.assert_allclose(cut, [0, 0.25, 0.375, 0.28125, 0.09375], rtol=1e-12)
    np.testing.assert_allclose(kl(wanted, cut), 0.114395, atol=5e-7)
    np.testing.assert_allclose(total_variation(wanted, cut), 0.15625, rtol=1e-12)
    hazards = eos_hazards(dist, EOS)
    np.testing.assert_allclose(hazards, [0, 1 / 4, 1 / 3, 1 / 2], rtol=1e-12)
    np.testing.assert_allclose(lengths_of_hazards(hazards), wanted, rtol=1e-12)


def test_small_to_large_is_exact_in_logarithmically_many_rounds():
    dist = binary_chain(9, 0.9)
    for length, rounds in ((2, 2), (3, 3), (5, 4), (9, 5)):
        assert len(dyadic_groups(length)) == rounds
        chain = binary_chain(length, 0.9)
        np.testing.assert_allclose(kl_of_groups(chain, dyadic_groups(length)), 0, atol=1e-12)
    ends = dyadic_groups(9, ends_together=True)
    same = (1 + 0.8**8) / 2
    assert len(ends) == 4
    np.testing.assert_allclose(kl_of_groups(dist, ends), 0.014141, atol=5e-7)
    np.testing.assert_allclose(kl_of_groups(dist, ends), LN2 - bit_entropy(same), rtol=1e-10)
    for groups, gap in (
        (checkerboard_groups(9), 0.887015),
        (half_groups(9), 2.130791),
        (at_once(dist), 2.944514),
    ):
        np.testing.assert_allclose(kl_of_groups(dist, groups), gap, atol=5e-7)
    np.testing.assert_allclose(8 * (LN2 - bit_entropy(0.9)), 2.944514, atol=5e-7)


@pytest.mark.parametrize(
    ("every", "steps", "gap"), [(1, 9, 0), (2, 5, 0), (4, 3, 0.380861), (8, 2, 1.178690)]
)
def test_autoregression_over_a_code_then_all_else_at_once(every, steps, gap):
    groups = code_groups(9, every)
    assert sum(len(group) == 1 for group in groups) == steps
    np.testing.assert_allclose(kl_of_groups(binary_chain(9, 0.9), groups), gap, atol=5e-7)


def test_a_cascade_of_scales_is_exact():
    pyramid = BinaryPyramid(2, 0.1)
    np.testing.assert_allclose(kl_of_groups(pyramid.data, pyramid.groups), 0, atol=1e-12)
    np.testing.assert_allclose(
        kl_of_groups(pyramid.data, at_once(pyramid.data)), pyramid.one_shot_gap, rtol=1e-12
    )


@each
def test_the_any_order_bound_of_the_exact_denoiser_is_the_entropy(dist):
    np.testing.assert_allclose(any_order_bound(dist), dist.entropy, atol=1e-12)


def test_the_any_order_bound_of_another_denoiser_is_above_the_entropy():
    dist = binary_chain(5, 0.9)

    def marginal(tokens):
        return np.broadcast_to(dist.marginals, (*tokens.shape, 2))

    def softer(tokens):
        return 0.9 * dist.conditionals(tokens, 2) + 0.05

    np.testing.assert_allclose(any_order_bound(dist, marginal), 5 * LN2, rtol=1e-12)
    assert dist.entropy < any_order_bound(dist, softer) < 5 * LN2


def test_laws_that_miss_the_data_are_infinitely_far():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])
    assert kl(p, q) == np.inf
    assert kl(p, p) == 0
    assert total_variation(p, q) == 0.5


def test_arguments_out_of_range_are_refused():
    dist = even_parity(4)
    for call in (
        lambda: kl_of_groups(dist, ((0, 1), (2,))),
        lambda: law_of_groups(dist, ((0, 1), (1, 2, 3))),
        lambda: random_order_gap(dist.entropy_profile, (2, 0, 2)),
        lambda: random_order_gap(dist.entropy_profile, (2, 1)),
        lambda: optimal_sizes(dist.entropy_profile, 5),
        lambda: any_order_bound(binary_chain(17, 0.9)),
        lambda: dyadic_groups(8),
        lambda: dyadic_groups(1),
        lambda: code_groups(9, 0),
        lambda: checkerboard_groups(1),
        lambda: half_groups(1),
    ):
        with pytest.raises(ValueError):
            call()
