"""What the tasks of images share: files of samples, labels, and scores without a network."""

from pathlib import Path

import numpy as np

from gen_jax import pictures
from gen_jax.data import DataConfig, Images, ShapesSet

SHEET = 64  # samples in samples.png


def save_samples(path: Path, images: np.ndarray) -> None:
    """Writes samples.png and the folder samples, which then holds these alone.

    Args:
      path: the work directory.
      images: uint8 [B, H, W, C].
    """
    sheet = pictures.grid(images[:SHEET], scale=scale(images.shape[1]))
    pictures.save_png(path / "samples.png", sheet)
    for old in (path / "samples").glob("[0-9]" * 6 + ".png"):
        old.unlink()
    pictures.save_images(path / "samples", images)


def scale(height: int) -> int:
    """Pixels drawn for one of an image of this height."""
    return max(1, 64 // height)


def labels(number: int, label: int, classes: int) -> np.ndarray:
    """Labels of the first samples, int32 [number]: one class, or all in turn where it is -1."""
    if label >= 0:
        return np.full(number, label, np.int32)
    return np.arange(number, dtype=np.int32) % classes


def score(images: np.ndarray, config: DataConfig, test_set: Images) -> dict[str, float]:
    """How well samples follow the data.

    Args:
      images: float [B, H, W, C] in [-1, 1], or palette indices, as `metrics.shapes.score` takes.
      config: of the data; what is known exactly is scored exactly.
      test_set: of the same data.

    Returns:
      The scores of `metrics.shapes.score`, or a Frechet distance of pooled pixels, or nothing
      where there are too few images.
    """
    if config.name == "shapes":
        from gen_jax.metrics import shapes

        return shapes.score(images, ShapesSet(config.size))
    if min(len(images), len(test_set)) < 2:
        return {}
    from gen_jax.metrics import frechet

    # A check that needs no weights, and is no FID.
    distance = frechet.frechet_over_features(
        frechet.pooled_pixels,
        np.clip(images, -1, 1),
        test_set.images / np.float32(127.5) - 1,
        batch_size=1024,
    )
    return {"frechet_pooled_pixels": distance}
