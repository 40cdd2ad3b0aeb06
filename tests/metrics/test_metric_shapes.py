import numpy as np
import pytest

from gen_jax.data import ShapesSet
from gen_jax.metrics.shapes import expected_total_variation, score

SHAPES = ShapesSet(16)
FLOATS = SHAPES.images().astype(np.float32) / 127.5 - 1
TV_KEYS = ("tv_joint", "tv_shape", "tv_colour", "tv_size", "tv_row", "tv_column")


def test_the_whole_set_once_is_perfect():
    report = score(FLOATS, SHAPES)
    assert report["validity"] == report["coverage"] == 1
    assert report["mean_mse"] == 0
    for key in TV_KEYS:
        assert report[key] < 1e-12
    assert score(SHAPES.images(palette=True), SHAPES) == report


def test_exact_draws_score_as_expected():
    generator = np.random.default_rng(0)
    reports = [score(FLOATS[generator.integers(0, 648, 400)], SHAPES) for _ in range(20)]
    for key in ("coverage", *TV_KEYS):
        values = np.array([report[key] for report in reports])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - reports[0][f"{key}_expected"]) < 4 * error, key
    assert all(report["validity"] == 1 for report in reports)


def test_mild_noise_is_valid_and_strong_noise_is_not():
    noise = np.random.default_rng(0).normal(size=FLOATS.shape).astype(np.float32)
    mild, strong = score(FLOATS + 0.2 * noise, SHAPES), score(FLOATS + 0.3 * noise, SHAPES)
    assert mild["validity"] == 1
    np.testing.assert_allclose(mild["mean_mse"], 0.04, rtol=0.02)
    assert mild["tv_joint"] == 0
    assert strong["validity"] == 0


@pytest.mark.parametrize("world", [SHAPES, ShapesSet(32)])
def test_blank_and_mean_images_are_not_valid(world):
    floats = world.images().astype(np.float32) / 127.5 - 1
    for image in (np.full_like(floats[0], -1), floats.mean(axis=0), np.zeros_like(floats[0])):
        report = score(np.stack([image] * 10), world)
        assert report["validity"] == report["coverage"] == 0
        assert all(report[key] == 1 for key in TV_KEYS)


def test_one_image_over_and_over_covers_one():
    report = score(np.repeat(FLOATS[:1], 50, axis=0), SHAPES)
    assert report["coverage"] == 1 / 648
    np.testing.assert_allclose(report["tv_joint"], 1 - 1 / 648)
    np.testing.assert_allclose(report["tv_shape"], 5 / 6)
    np.testing.assert_allclose(report["tv_size"], 1 / 2)


def test_a_missing_value_shows_in_its_marginal_alone():
    kept = FLOATS[SHAPES.attributes[:, 1] != 0]
    report = score(kept, SHAPES)
    np.testing.assert_allclose(report["tv_colour"], 1 / 6)
    np.testing.assert_allclose(report["tv_joint"], 1 / 6)
    assert report["tv_shape"] < 1e-12


def test_invalid_samples_are_mass_outside_the_set():
    blank = np.full((648, 16, 16, 3), -1, np.float32)
    report = score(np.concatenate([FLOATS, blank]), SHAPES)
    assert report["validity"] == 0.5
    for key in TV_KEYS:
        np.testing.assert_allclose(report[key], 0.5)


@pytest.mark.parametrize(("kinds", "draws"), [(2, 1), (2, 2), (3, 7), (7, 7), (49, 20)])
def test_expected_total_variation_is_the_sum_over_all_counts(kinds, draws):
    from scipy.stats import binom

    counts = np.arange(draws + 1)
    chances = binom.pmf(counts, draws, 1 / kinds)
    expected = kinds / 2 * (chances * np.abs(counts / draws - 1 / kinds)).sum()
    np.testing.assert_allclose(expected_total_variation(kinds, draws), expected, rtol=1e-10)


def test_edges_of_the_expectation():
    assert expected_total_variation(1, 5) == 0
    np.testing.assert_allclose(expected_total_variation(648, 1), 1 - 1 / 648)
    assert expected_total_variation(2, 10**8) < 1e-4
    with pytest.raises(ValueError, match="at least 1"):
        expected_total_variation(0, 5)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        score(FLOATS[:0], SHAPES)
    with pytest.raises(ValueError, match="must be positive"):
        score(FLOATS, SHAPES, threshold=0.0)
