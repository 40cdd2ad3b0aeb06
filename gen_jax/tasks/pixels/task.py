"""Autoregressive models of pixels: what they are trained on, and how samples are judged."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from gen_jax import evaluation, pictures
from gen_jax.data import PixelSequences, ShapesSet
from gen_jax.data.shapes import PALETTE
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files
from gen_jax.tasks.pixels.config import PixelRunConfig, PixelsConfig
from gen_jax.trainables import ModelTrainable

__all__ = [
    "batch",
    "evaluate",
    "filling",
    "images_of",
    "keep",
    "likelihood",
    "make",
    "rows_to_evaluate",
    "shape_and_classes",
    "show",
    "to_rgb",
]

_MOMENTS, _ROWS, _EMPTY = 8, 4, 64  # of trajectory.png: columns, rows, what is not drawn yet


def make(config: PixelsConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the sequences by split."""
    splits = context.data
    shape, classes = shape_and_classes(config, context)
    model = AutoregressiveModel(TokenNetwork(config.network(classes)))
    validate = functools.partial(_validate, config, model, splits.get("test"))
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(batch, config, splits.get("train")),
        record={"image_shape": list(shape), "classes": classes},
        evaluate=validate,
    )
    return Task(
        stages=(stage,),
        model=model,
        sampler=AutoregressiveSampler(model, 0, config.model.context, config.sampler),
        condition=functools.partial(image_files.condition, config.sample.label, classes),
        write=functools.partial(_write, config, shape),
        show=functools.partial(show, config, shape),
        evaluate=functools.partial(evaluate, config, validate, splits.get("test")),
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        data=image_files.digest(splits),
        results=("samples.png", "samples.npz", "samples", "trajectory.png"),
    )


def shape_and_classes(config: PixelRunConfig, context: Context) -> tuple[tuple[int, ...], int]:
    """The shape of one image, and the number of classes of a conditional model, else 0."""
    splits, record = context.data, context.records.get("model")
    shape = tuple(record["image_shape"]) if record is not None else splits["train"].shape
    sets = (sequences.images for sequences in splits.values())
    return shape, image_files.number_of_classes(config, config.classes, record, sets)


def batch(
    config: PixelRunConfig,
    sequences: PixelSequences,
    step: int,
    shard: tuple[int, int],
    earlier: Any,
) -> dict[str, np.ndarray]:
    """Images as tokens, and labels for a conditional model; see `Stage.batch`."""
    del earlier
    train = config.train
    whole = sequences.batch(train.seed, step, train.batch, flip=config.data.flip, shard=shard)
    return whole if config.conditional else {"tokens": whole["tokens"]}


def rows_to_evaluate(config: PixelRunConfig, sequences: PixelSequences) -> dict[str, np.ndarray]:
    """As many test images as are to be evaluated, as a batch."""
    images, number = sequences.images, min(config.evaluate.images, len(sequences))
    chosen = images.indices(0, 0, number)
    rows = {"tokens": sequences.tokens_of(images.images[chosen])}
    return rows | ({"label": images.labels[chosen]} if config.conditional else {})


def likelihood(
    config: PixelRunConfig, sequences: PixelSequences, nats: np.ndarray
) -> dict[str, float]:
    """Figures of the code lengths of test images, in nats: mean, error, and floor where known."""
    nats, number = nats.astype(np.float64), len(nats)
    bits = 1 / np.log(2) / math.prod(sequences.shape)
    error = nats.std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
    report = {
        "bits_per_dim": float(nats.mean() * bits),
        "bits_per_dim_standard_error": float(error * bits),
        "nats_per_image": float(nats.mean()),
        "test_images": number,
    }
    if config.data.name != "shapes":
        return report
    floor = ShapesSet(config.data.size).entropy
    if config.conditional:  # the label tells one of equally many images
        floor -= np.log(len(sequences.images.label_names))
    return report | {
        "bits_per_dim_floor": float(floor * bits),
        "nats_per_image_floor": float(floor),
        "nats_over_floor": float(nats.mean() / floor),
    }


def _validate(config, model, sequences, params) -> dict[str, float]:
    """The exact likelihood of test images, its standard error, and its floor where known."""
    rows = rows_to_evaluate(config, sequences)
    values = evaluation.log_prob(model, params, rows, config.evaluate.batch)
    return likelihood(config, sequences, -values)


def evaluate(
    config: PixelRunConfig,
    validate: Callable[[Any], dict[str, float]],
    sequences: PixelSequences,
    run: Run,
) -> dict[str, float]:
    """The likelihood of the test set, and the quality of the samples drawn last."""
    images = run.kept_samples("images")["images"]
    if not config.data.palette:
        images = images / np.float32(127.5) - 1
    return validate(run.params) | image_files.score(images, config.data, sequences.images)


def images_of(config: PixelRunConfig, shape: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
    """Tokens int32 [B, L] as images uint8 [B, height, width, C] or [B, height, width]."""
    if config.patch > 1:
        return config.palette_sequences().images_of(tokens)
    return tokens.reshape(-1, *shape).astype(np.uint8)


def show(config: PixelRunConfig, shape: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
    """Samples int32 [B, L] as one picture."""
    return image_files.sheet(to_rgb(images_of(config, shape, tokens)))


def keep(
    config: PixelRunConfig, shape: tuple[int, ...], run: Run, tokens: np.ndarray
) -> np.ndarray:
    """Leaves samples int32 [B, L] as pictures and arrays, and returns them as images."""
    images = images_of(config, shape, tokens)
    image_files.keep(run, images, to_rgb(images))
    return images


def _write(config, shape, run: Run, tokens: np.ndarray, report: dict) -> dict:
    images = keep(config, shape, run, tokens)
    picture = filling(images[:_ROWS], image_files.scale(shape[0]), config.patch)
    pictures.save_png(run.workdir.path / "trajectory.png", picture)
    return {"sampled_tokens_per_second": report["samples_per_second"] * tokens.shape[1]}


def to_rgb(
    images: UInt8[np.ndarray, "B height width *C"],
) -> UInt8[np.ndarray, "B height width C"]:
    """Images [B, height, width, C] as they are; palette indices [B, height, width] in colour."""
    return PALETTE[images] if images.ndim == 3 else images


def filling(
    images: UInt8[np.ndarray, "B height width *C"], scale: int, patch: int = 1
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A row for each image, which fills up in raster order from left to right.

    Args:
      images: [B, height, width, C], or palette indices [B, height, width].
      scale: pixels drawn for one of an image.
      patch: side of the squares of pixels that come together.

    Returns:
      A picture; what is not drawn yet is grey.
    """
    drawn = to_rgb(images)
    height, width = drawn.shape[1:3]
    rows, columns = height // patch, width // patch
    place = np.arange(rows * columns).reshape(rows, columns)
    place = place.repeat(patch, 0).repeat(patch, 1)[..., None]
    ends = np.linspace(0, rows * columns, _MOMENTS + 1).round().astype(int)[1:]
    frames = np.stack([np.where(place < end, drawn, _EMPTY) for end in ends], axis=1)
    frames = frames.reshape(-1, *drawn.shape[1:]).astype(np.uint8)
    return pictures.grid(frames, columns=_MOMENTS, scale=scale)
