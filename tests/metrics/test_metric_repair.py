import itertools

import numpy as np
import pytest

from annotations import unchecked_annotations
from gen_jax.data.exact_sets import (
    NoisyMixture,
    binary_chain,
    even_parity,
    lengths,
    modes,
    permutations,
)
from gen_jax.metrics.gaps import total_variation
from gen_jax.metrics.repair import mode_agreement, repair_curve, repair_kernel

DISTRIBUTIONS = {
    "modes": modes((0.5, 0.3, 0.2), 4),
    "mixture": NoisyMixture(2, 5, 2, 0.2).data,
    "parity": even_parity(5),
    "permutations": permutations(4),
    "lengths": lengths(4),
}
each = pytest.mark.parametrize("dist", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
ROUNDS = (0, 1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def two_modes():
    return NoisyMixture(2, 4, 2, 0.1)


def distances(dist, rule, rounds=ROUNDS):
    return [total_variation(dist.dense(), law) for law in repair_curve(dist, rule, rounds)]


def test_erasing_one_at_random_converges_to_the_data(two_modes):
    expected = (0.6895, 0.5770, 0.4248, 0.2302, 0.0676, 0.0058, 0.0000)
    np.testing.assert_allclose(distances(two_modes.data, "random_one"), expected, atol=6e-5)


def test_erasing_half_stays_at_a_distance(two_modes):
    floor = distances(two_modes.data, "random_half", (100, 200))
    np.testing.assert_allclose(floor, 0.0440, atol=6e-5)


def test_erasing_the_least_confident_is_quick_and_seeks_modes(two_modes):
    at_one, at_two, floor = distances(two_modes.data, "confidence_one", (1, 2, 200))
    np.testing.assert_allclose([at_one, at_two, floor], [0.2513, 0.1015, 0.1425], atol=6e-5)
    (law,) = repair_curve(two_modes.data, "confidence_one", (200,))
    np.testing.assert_allclose(mode_agreement(two_modes.centres, law), 0.987, atol=6e-4)
    own = mode_agreement(two_modes.centres, two_modes.data.dense())
    np.testing.assert_allclose(own, 0.950, atol=6e-4)


def test_repair_of_four_modes():
    dist = NoisyMixture(4, 4, 4, 0.1).data
    np.testing.assert_allclose(distances(dist, "random_one", (8, 32)), [0.1094, 0.0001], atol=6e-5)
    np.testing.assert_allclose(
        distances(dist, "confidence_one", (2, 100)), [0.0889, 0.2085], atol=6e-5
    )


@each
@pytest.mark.parametrize("rule", ["random_one", "random_half", "confidence_one"])
def test_kernels_are_distributions_and_change_what_they_erase_alone(dist, rule):
    kernel = repair_kernel(dist, rule)
    np.testing.assert_allclose(kernel.sum(axis=1), 1, rtol=1e-12)
    rows = np.array(list(itertools.product(range(dist.vocabulary), repeat=dist.length)))
    changed = (rows[:, None] != rows).sum(axis=2)
    assert changed[kernel > 0].max() <= (dist.length // 2 if rule == "random_half" else 1)


@each
def test_erasing_one_at_random_leaves_the_data_as_they_are(dist):
    """Gibbs sampling: reversible on the data, also where the data cannot get everywhere."""
    prob = dist.dense().reshape(-1)
    flow = prob[:, None] * repair_kernel(dist, "random_one")
    np.testing.assert_allclose(flow, flow.T, atol=1e-14)


@unchecked_annotations()
def test_arguments_out_of_range_are_refused():
    for call in (
        lambda: repair_kernel(even_parity(4), "random_two"),
        lambda: repair_kernel(binary_chain(13, 0.9), "random_one"),
        lambda: repair_curve(even_parity(4), "random_one", (2, 1)),
    ):
        with pytest.raises(ValueError):
            call()
