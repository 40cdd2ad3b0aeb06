"""What the tasks of images share: files of samples, labels, and scores without a network."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gen_jax import evaluation, pictures
from gen_jax.condition import Condition
from gen_jax.config import TrainConfig
from gen_jax.data import DataConfig, Images, ShapesSet
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.task import Run

SHEET = 64  # samples in samples.png
OTHER_ORDER = 2**32  # added to a seed, which is below it, for another order of the images


def save_samples(path: Path, images: np.ndarray) -> None:
    """Writes samples.png and the folder samples, which then holds these alone.

    Args:
      path: the work directory.
      images: uint8 [B, H, W, C].
    """
    pictures.save_png(path / "samples.png", sheet(images))
    for old in (path / "samples").glob("[0-9]" * 6 + ".png"):
        old.unlink()
    pictures.save_images(path / "samples", images)


def keep(run: Run, images: np.ndarray, drawn: np.ndarray) -> None:
    """Leaves the samples of a run in samples.npz, and as pictures.

    Args:
      run: of the samples.
      images: what samples.npz keeps, with the labels that they were conditioned on.
      drawn: the same, uint8 [B, H, W, C].
    """
    labels = run.task.condition(len(images)).label
    known = {} if labels is None else {"labels": labels}
    run.keep_samples(images=images, nfe=run.task.sampler.nfe, **known)
    save_samples(run.workdir.path, drawn)


def sheet(images: np.ndarray) -> np.ndarray:
    """The first images uint8 [B, H, W, C] as one picture."""
    return pictures.grid(images[:SHEET], scale=scale(images.shape[1]))


def scale(height: int) -> int:
    """Pixels drawn for one of an image of this height."""
    return max(1, 64 // height)


def digest(splits: Mapping[str, Any]) -> str:
    """Of the training images, `Images` or sequences of them; "" where they are not read."""
    return splits["train"].digest if "train" in splits else ""


def number_of_classes(
    config: Any, given: int, record: Mapping | None, splits: Iterable[Images]
) -> int:
    """Classes of a conditional model: those of its configuration, its checkpoint or its data.

    Args:
      config: of the run.
      given: the number in its configuration; 0 where there is none.
      record: of the checkpoint that the run goes on from, or None.
      splits: the images that were read.

    Returns:
      The number; 0 for an unconditional model.

    Raises:
      ValueError: the data has another number, nothing tells it, or the label to sample is none of
        the classes.
    """
    if not config.conditional:
        return 0
    found = {len(images.label_names) for images in splits}
    classes = given or (record or {}).get("classes", 0) or next(iter(found), 0)
    if not classes:
        raise ValueError("nothing tells the number of classes of the model: set it")
    if found - {classes}:
        raise ValueError(f"the data has {found.pop()} classes, the model has {classes}")
    if config.sample.label >= classes:
        raise ValueError(f"sample.label must be -1 or a class, got {config.sample.label}")
    return classes


def condition(label: int, classes: int, number: int) -> Condition:
    """The condition of the first samples: one class, or all in turn where `label` is -1."""
    if not classes:
        return Condition()
    if label >= 0:
        return Condition(label=np.full(number, label, np.int32))
    return Condition(label=np.arange(number, dtype=np.int32) % classes)


def reference_size(process: DiffusionConfig, images: int) -> int:
    """How many images the reference of a process has, out of so many training images.

    They divide over the devices; where the set is smaller than the number of those, images repeat.
    """
    if not process.reference:
        return 0
    devices = jax.device_count()
    return devices * max(1, min(process.reference, images) // devices)


def batch_of(
    draw: Callable[[int, int], dict[str, np.ndarray]],
    train: TrainConfig,
    reference: int,
    conditional: bool,
) -> dict[str, np.ndarray]:
    """A batch of training: images or codes, those of the reference, and labels where they are read.

    The reference is the training set in another order, in which each epoch has every image once.

    Args:
      draw: draw(seed, size) has "label" [size], and one further entry [size, ...].
      train: seed and size of the batch.
      reference: of `reference_size`.
      conditional: whether the model reads labels.
    """
    batch = draw(train.seed, train.batch)
    if reference:
        others = draw(train.seed + OTHER_ORDER, reference)
        labels = others.pop("label")
        (values,) = others.values()
        batch |= {"reference": values, "reference_label": labels}
    if conditional:
        return batch
    return {name: value for name, value in batch.items() if not name.endswith("label")}


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
    make = functools.partial(_score, images, config, test_set)
    return evaluation.kept_figures(make, [images, test_set.digest])


def _score(images, config, test_set):
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
