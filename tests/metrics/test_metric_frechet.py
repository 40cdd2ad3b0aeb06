import numpy as np
import pytest
import scipy.linalg

from annotations import unchecked_annotations
from gen_jax.metrics.frechet import (
    frechet_distance,
    frechet_over_features,
    gaussian_statistics,
    kernel_distance,
    kernel_over_features,
    pooled_pixels,
)


def gaussian(seed, width=6, rank=None):
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(width, rank or 2 * width))
    return generator.normal(size=width), factor @ factor.T


def rotation(seed, width):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def test_a_distance_known_by_hand():
    distance = frechet_distance(
        np.zeros(2), np.diag([1.0, 4.0]), np.array([1.0, 2.0]), np.diag([4.0, 1.0])
    )
    np.testing.assert_allclose(distance, 7, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_agrees_with_a_matrix_square_root(seed):
    (mean1, cov1), (mean2, cov2) = gaussian(seed), gaussian(seed + 100)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9)


@pytest.mark.parametrize("rank", [2, 6])
def test_the_distance_is_symmetric_and_blind_to_rotation(rank):
    (mean1, cov1), (mean2, cov2) = gaussian(0, rank=rank), gaussian(1, rank=rank)
    turn = rotation(2, 6)
    distance = frechet_distance(mean1, cov1, mean2, cov2)
    np.testing.assert_allclose(frechet_distance(mean2, cov2, mean1, cov1), distance, rtol=1e-12)
    turned = frechet_distance(
        turn @ mean1, turn @ cov1 @ turn.T, turn @ mean2, turn @ cov2 @ turn.T
    )
    np.testing.assert_allclose(turned, distance, rtol=1e-9)


def test_covariances_of_deficient_rank_lose_no_accuracy():
    # In a common eigenbasis the distance is a sum over the axes of (s1 - s2)^2.
    spread1 = np.array([3.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    spread2 = np.array([1.0, 0.0, 2.0, 0.0, 0.0, 1.0])
    turn = rotation(3, 6)
    cov1, cov2 = (turn * spread1**2) @ turn.T, (turn * spread2**2) @ turn.T
    zero = np.zeros(6)
    expected = ((spread1 - spread2) ** 2).sum()
    np.testing.assert_allclose(frechet_distance(zero, cov1, zero, cov2), expected, rtol=1e-12)
    assert frechet_distance(zero, cov1, zero, cov1) < 1e-12
    assert frechet_distance(zero, 0 * cov1, zero, 0 * cov1) == 0


def test_fewer_samples_than_features_work():
    features = np.random.default_rng(0).normal(size=(5, 40))
    statistics = gaussian_statistics(features)
    assert frechet_distance(*statistics, *statistics) < 1e-10
    shifted = gaussian_statistics(features + 1)
    np.testing.assert_allclose(frechet_distance(*statistics, *shifted), 40, rtol=1e-9)


def test_statistics_are_those_of_numpy_in_float64():
    features = np.random.default_rng(0).normal(1000, 1, (50, 4)).astype(np.float32)
    mean, covariance = gaussian_statistics(features)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False))


def test_kernel_distance_is_the_double_sum_over_pairs():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(7, 3)), generator.normal(1, 1, size=(9, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = [kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    within_y = [kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    expected = np.mean(within_x) + np.mean(within_y) - 2 * np.mean(across)
    np.testing.assert_allclose(kernel_distance(x, y), expected, rtol=1e-12)
    turn = rotation(1, 3)
    np.testing.assert_allclose(kernel_distance(x @ turn, y @ turn), expected, rtol=1e-9)


def test_row_blocks_do_not_change_the_kernel_distance(monkeypatch):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 3)), generator.normal(size=(40, 3))
    whole = kernel_distance(x, y)
    monkeypatch.setattr("gen_jax.metrics.frechet._ROWS", 7)
    np.testing.assert_allclose(kernel_distance(x, y), whole, rtol=1e-10)


@pytest.mark.parametrize("subset", [{}, {"subsets": 4, "subset_size": 8, "seed": 0}])
def test_kernel_distance_has_mean_zero_for_one_distribution(subset):
    generator = np.random.default_rng(0)
    draws = generator.normal(1, 1, size=(300, 2, 20, 4))
    values = np.array([kernel_distance(x, y, **subset) for x, y in draws])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()
    apart = kernel_distance(draws[0, 0], draws[0, 1] + 2, **subset)
    assert apart > 4 * values.std()


def test_subsets_are_a_function_of_the_seed():
    x, y = np.random.default_rng(0).normal(size=(2, 30, 4))
    first, again, other = (
        kernel_distance(x, y, subsets=3, subset_size=10, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    whole = kernel_distance(x, y, subsets=2, subset_size=30, seed=0)
    np.testing.assert_allclose(whole, kernel_distance(x, y), rtol=1e-9)


def test_features_are_taken_in_batches():
    images = np.random.default_rng(0).normal(size=(2, 25, 2, 2))
    seen = []

    def flatten(batch):
        seen.append(len(batch))
        return batch.reshape(len(batch), -1)

    a, b = images.reshape(2, 25, 4)
    distance = frechet_over_features(flatten, *images, batch_size=10)
    assert seen == [10, 10, 5] * 2
    assert distance == frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b))
    assert kernel_over_features(flatten, *images, batch_size=10) == kernel_distance(a, b)
    assert seen == [10, 10, 5] * 4
    subsets = {"subsets": 3, "subset_size": 8, "seed": 1}
    distance = kernel_over_features(flatten, *images, batch_size=10, **subsets)
    assert distance == kernel_distance(a, b, **subsets)


def test_the_frechet_distance_takes_no_kernel_of_all_pairs(monkeypatch):
    monkeypatch.setattr("gen_jax.metrics.frechet._kernel_sum", None)
    frechet_over_features(lambda x: x, np.eye(3), np.eye(3), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_statistics(np.zeros((1, 3))), "at least two samples"),
        (lambda: gaussian_statistics(np.full((3, 3), np.nan)), "not finite"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "means"),
        (lambda: frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "covariances"),
        (lambda: frechet_distance(*[np.zeros(2), np.diag([1.0, -1])] * 2), "semi-definite"),
        (lambda: frechet_distance(*[np.zeros(2), np.array([[1.0, 1], [0, 1]])] * 2), "symmetric"),
        (lambda: kernel_distance(np.zeros((3, 2)), np.zeros((3, 4))), "must agree"),
        (lambda: kernel_distance(np.zeros((3, 2)), np.zeros((3, 2)), degree=0), "degree"),
        (lambda: kernel_distance(np.zeros((3, 2)), np.zeros((3, 2)), subsets=2), "together"),
        (
            lambda: kernel_distance(
                np.zeros((3, 2)), np.zeros((3, 2)), subsets=2, subset_size=4, seed=0
            ),
            "from 2 to 3",
        ),
        (
            lambda: frechet_over_features(lambda x: x[:2], np.zeros((3, 2)), np.zeros((3, 2)), 3),
            "gave 2 rows",
        ),
        (
            lambda: kernel_over_features(lambda x: x, np.zeros((1, 2)), np.zeros((3, 2)), 3),
            "at least 2",
        ),
        (
            lambda: frechet_over_features(lambda x: x, np.zeros((3, 2)), np.zeros((3, 2)), 0),
            "batch_size",
        ),
    ],
)
@unchecked_annotations()
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pooled_pixels_are_means_of_blocks():
    images = np.random.default_rng(0).normal(size=(3, 10, 8, 2))
    features = pooled_pixels(images).reshape(3, 2, 2, 2)
    np.testing.assert_allclose(features[1, 1, 0], images[1, 4:8, 0:4].mean(axis=(0, 1)))
