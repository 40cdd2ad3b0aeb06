"""Distances between two sets of images through their features, in float64.

The Frechet distance between Gaussians (Heusel et al. 2017, arXiv:1706.08500) is the FID when
the features are those of Inception-v3; the kernel distance (Binkowski et al. 2018,
arXiv:1801.01401) is then the KID. Any other feature function gives numbers of its own, which
compare with each other and with no published ones.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

__all__ = [
    "frechet_distance",
    "frechet_over_features",
    "gaussian_statistics",
    "kernel_distance",
    "kernel_over_features",
    "pooled_pixels",
]

_ROWS = 1024


def gaussian_statistics(
    features: Shaped[Any, "samples features"],
) -> tuple[Float64[np.ndarray, " features"], Float64[np.ndarray, "features features"]]:
    """Mean and unbiased covariance of features.

    Args:
      features: of at least two samples.

    Raises:
      ValueError: another shape, or a value that is not finite.
    """
    features = _checked(features, "features")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean1: Shaped[Any, " features"],
    covariance1: Shaped[Any, "features features"],
    mean2: Shaped[Any, " features"],
    covariance2: Shaped[Any, "features features"],
) -> float:
    """Squared Frechet distance of two Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the last trace being the sum of the singular
    values of C1^(1/2) C2^(1/2), taken on the ranges of C1 and C2; so covariances of deficient
    rank lose no accuracy.

    Args:
      mean1: of the first.
      covariance1: of the first, symmetric and positive semi-definite.
      mean2: of the second.
      covariance2: of the second.

    Returns:
      The distance, at least 0.

    Raises:
      ValueError: shapes disagree, or a covariance is not symmetric positive semi-definite.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    covariance1 = np.asarray(covariance1, np.float64)
    covariance2 = np.asarray(covariance2, np.float64)
    square = (*mean1.shape, *mean1.shape)
    if mean1.ndim != 1 or mean2.shape != mean1.shape:
        raise ValueError(
            f"means have shapes {mean1.shape} and {mean2.shape}; both must be [features]"
        )
    if covariance1.shape != square or covariance2.shape != square:
        raise ValueError(
            f"covariances have shapes {covariance1.shape} and {covariance2.shape}; "
            f"both must be {square}"
        )
    root1, root2 = _root(covariance1), _root(covariance2)
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    shift = mean1 - mean2
    distance = shift @ shift + np.trace(covariance1) + np.trace(covariance2) - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(
    x: Shaped[Any, "samples features"],
    y: Shaped[Any, "others features"],
    *,
    degree: int = 3,
    subsets: int | None = None,
    subset_size: int | None = None,
    seed: int | None = None,
) -> float:
    """Unbiased squared maximum mean discrepancy, k(a, b) = (a.b / features + 1)^degree.

    Args:
      x: features of at least two samples.
      y: features of at least two others.
      degree: of the polynomial, from 1 up.
      subsets: average over this many random subsets instead of using all pairs.
      subset_size: samples in each subset of x and of y, drawn without replacement; from 2 to the
        smaller number of samples.
      seed: of the draw of the subsets.

    Returns:
      The estimate, which may be negative; its mean is 0 for features of one distribution.

    Raises:
      ValueError: shapes disagree, a value is not finite, or subsets, subset_size and seed are
        out of range or not given together.
    """
    x, y = _checked(x, "x"), _checked(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features and y has {y.shape[1]}; they must agree")
    if degree < 1:
        raise ValueError(f"degree is {degree}; it must be at least 1")
    given = [value is not None for value in (subsets, subset_size, seed)]
    if not any(given):
        return _unbiased_mmd(x, y, degree)
    if not all(given):
        raise ValueError("give subsets, subset_size and seed together, or none of them")
    if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subsets is {subsets} and subset_size is {subset_size}; they must be at least 1, and "
            f"from 2 to {min(len(x), len(y))}"
        )
    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        part_x = x[generator.choice(len(x), subset_size, replace=False)]
        part_y = y[generator.choice(len(y), subset_size, replace=False)]
        estimates.append(_unbiased_mmd(part_x, part_y, degree))
    return float(np.mean(estimates))


def frechet_over_features(
    features_fn: Callable[[np.ndarray], np.ndarray],
    images_a: Shaped[Any, "samples ..."],
    images_b: Shaped[Any, "others ..."],
    batch_size: int,
) -> float:
    """Squared Frechet distance of two sets of images under any feature function.

    Args:
      features_fn: from images [B, ...], with B <= batch_size, to features [B, features].
      images_a: at least two images.
      images_b: at least two images.
      batch_size: images per call; the last call of a set may see fewer.

    Raises:
      ValueError: batch_size is below 1, a set has fewer than two images, or features are no
        finite matrix with a row per image.
    """
    a, b = _features_of_both(features_fn, images_a, images_b, batch_size)
    return frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b))


def kernel_over_features(
    features_fn: Callable[[np.ndarray], np.ndarray],
    images_a: Shaped[Any, "samples ..."],
    images_b: Shaped[Any, "others ..."],
    batch_size: int,
    **options: int,
) -> float:
    """Kernel distance of two sets of images under any feature function.

    Args:
      features_fn, images_a, images_b, batch_size: as in `frechet_over_features`.
      options: those of `kernel_distance`; without them it takes all pairs of images.

    Raises:
      ValueError: as `frechet_over_features` and `kernel_distance`.
    """
    a, b = _features_of_both(features_fn, images_a, images_b, batch_size)
    return kernel_distance(a, b, **options)


def _features_of_both(features_fn, images_a, images_b, batch_size):
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    features = []
    for name, images in (("images_a", images_a), ("images_b", images_b)):
        if len(images) < 2:
            raise ValueError(f"{name} holds {len(images)} images; give at least 2")
        starts = range(0, len(images), batch_size)
        parts = [np.asarray(features_fn(images[i : i + batch_size])) for i in starts]
        matrix = _checked(np.concatenate(parts), f"the features of {name}")
        if len(matrix) != len(images):
            raise ValueError(f"features_fn gave {len(matrix)} rows for the {len(images)} {name}")
        features.append(matrix)
    return features


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [features, rank] with R R^T = covariance, at its numerical rank."""
    scale = np.abs(covariance).max(initial=0.0)
    if not np.isfinite(scale) or not np.allclose(covariance, covariance.T, 1e-6, 1e-8 * scale):
        raise ValueError("a covariance is not finite and symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = np.abs(values).max(initial=0.0)
    if values.min(initial=0.0) < -1e-6 * largest:
        raise ValueError(
            f"a covariance has the eigenvalue {values.min():.3g} beside {largest:.3g}; "
            "it must be positive semi-definite"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


def _unbiased_mmd(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    return (
        _kernel_sum(x, x, degree, diagonal=False) / (len(x) * (len(x) - 1))
        + _kernel_sum(y, y, degree, diagonal=False) / (len(y) * (len(y) - 1))
        - 2 * _kernel_sum(x, y, degree, diagonal=True) / (len(x) * len(y))
    )


def _kernel_sum(x: np.ndarray, y: np.ndarray, degree: int, *, diagonal: bool) -> float:
    width = x.shape[1]
    total = 0.0
    for begin in range(0, len(x), _ROWS):
        total += float(((x[begin : begin + _ROWS] @ y.T / width + 1) ** degree).sum())
    if not diagonal:
        total -= float(((np.einsum("nd,nd->n", x, y) / width + 1) ** degree).sum())
    return total


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(f"{name} have shape {features.shape}; expected at least two samples")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} hold values that are not finite")
    return features


def pooled_pixels(
    images: Shaped[Any, "B height width C"],
) -> Float64[np.ndarray, "B features"]:
    """Means over blocks of 4 x 4 pixels: features that need no weights, and are no FID.

    Args:
      images: of at least 4 x 4 pixels; what is left over of a block is cut off.

    Returns:
      The (height // 4) x (width // 4) x C means of each image.
    """
    count, height, width, channels = images.shape
    rows, columns = height // 4, width // 4
    whole = np.asarray(images, np.float64)[:, : rows * 4, : columns * 4]
    blocks = whole.reshape(count, rows, 4, columns, 4, channels)
    return blocks.mean(axis=(2, 4)).reshape(count, -1)
