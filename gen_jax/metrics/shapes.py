"""How well samples follow the shapes set, whose distribution is known exactly."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from gen_jax.data.shapes import ShapesSet

__all__ = ["THRESHOLD", "expected_total_variation", "score"]

THRESHOLD = 0.06


def score(
    images: Float[Any, "B side side 3"] | Integer[Any, "B side side"],
    shapes_set: ShapesSet,
    threshold: float = THRESHOLD,
) -> dict[str, float]:
    """Compares samples with the uniform distribution over the shapes set.

    A sample is valid when its mean squared error to the nearest image of the set is at most the
    threshold, and is then read as that image. Total variation is taken between the empirical
    distribution of the samples, in which all invalid samples are one outcome more, and the
    truth; so it is at least the fraction of invalid samples, and 1 when none is valid. Keys that
    end in `_expected` are what as many exact draws give on average, in closed form.

    Args:
      images: RGB in [-1, 1], or palette indices; B >= 1.
      shapes_set: the set, at the resolution of the images.
      threshold: largest mean squared error of a valid sample, on the scale [-1, 1].

    Returns:
      validity: fraction of valid samples.
      mean_mse: mean over all samples of the error to the nearest image.
      coverage, coverage_expected: fraction of the set that some valid sample is read as.
      tv_joint, tv_joint_expected: total variation over all images of the set.
      tv_<attribute>, tv_<attribute>_expected: the same for the marginal of each attribute.

    Raises:
      ValueError: there are no images, the threshold is not positive, or `ShapesSet.nearest`
        refuses the images.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be positive")
    draws = len(images)
    if draws == 0:
        raise ValueError("there are no images to score; give at least one")
    index, mse = shapes_set.nearest(images)
    hits = index[mse <= threshold]
    support = len(shapes_set)
    report = {
        "validity": len(hits) / draws,
        "mean_mse": float(mse.mean()),
        "coverage": len(np.unique(hits)) / support,
        "coverage_expected": 1 - (1 - 1 / support) ** draws,
    }
    outcomes = {"joint": (hits, support)}
    names, values = shapes_set.attribute_names, shapes_set.attribute_values
    for column, (name, names_of_values) in enumerate(zip(names, values, strict=True)):
        outcomes[name] = (shapes_set.attributes[hits, column], len(names_of_values))
    for name, (observed, kinds) in outcomes.items():
        report[f"tv_{name}"] = _total_variation(observed, kinds, draws)
        report[f"tv_{name}_expected"] = expected_total_variation(kinds, draws)
    return report


def expected_total_variation(kinds: int, draws: int) -> float:
    """Mean total variation between a uniform distribution and the empirical one of its draws.

    It is K / (2 n) times the mean absolute deviation of a binomial(n, 1 / K) variable, for which
    de Moivre's formula gives 2 v C(n, v) p^v (1 - p)^(n - v + 1) with v = floor(n p) + 1.

    Args:
      kinds: K, the number of outcomes, from 1 up.
      draws: n, the number of draws, from 1 up.

    Raises:
      ValueError: an argument is below 1.
    """
    if kinds < 1 or draws < 1:
        raise ValueError(f"kinds is {kinds} and draws is {draws}; both must be at least 1")
    if kinds == 1:
        return 0.0
    turn = draws // kinds + 1
    log_choose = math.lgamma(draws + 1) - math.lgamma(turn + 1) - math.lgamma(draws - turn + 1)
    log_deviation = (
        math.log(2 * turn)
        + log_choose
        - turn * math.log(kinds)
        + (draws - turn + 1) * math.log1p(-1 / kinds)
    )
    return kinds / (2 * draws) * math.exp(log_deviation)


def _total_variation(observed: np.ndarray, kinds: int, draws: int) -> float:
    # Both distributions have mass 1, so the distance is what the truth has in excess.
    counts = np.bincount(observed, minlength=kinds)
    return float(np.maximum(draws - kinds * counts, 0).sum() / (kinds * draws))
