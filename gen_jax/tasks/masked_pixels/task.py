"""Masked models of pixels: what they are trained on, how they fill holes, how that is judged."""

import functools

import numpy as np

from gen_jax import config as config_lib
from gen_jax import pictures, sampling
from gen_jax.condition import Condition
from gen_jax.data import ShapesSet
from gen_jax.models.masked import MaskedModel
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files, masked_rounds
from gen_jax.tasks.masked_pixels.config import MaskedPixelsConfig
from gen_jax.tasks.pixels import task as pixels
from gen_jax.trainables import ModelTrainable

__all__ = ["hidden_part", "make"]

_MOMENTS, _ROWS, _HIDDEN = 10, 4, 64  # of trajectory.png: columns, rows, the grey of a mask


def make(config: MaskedPixelsConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the sequences by split."""
    splits = context.data
    shape, classes = pixels.shape_and_classes(config, context)
    grid = (shape[0] // config.patch, shape[1] // config.patch, *shape[2:])
    mask = config.mask
    model = MaskedModel(
        TokenNetwork(config.network(classes)), mask.counts, grid=grid, halton=mask.halton
    )
    build = config_lib.resolve(config.sampler.make)
    validate = functools.partial(_validate, config, model, splits.get("test"))
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(pixels.batch, config, splits.get("train")),
        record={"image_shape": list(shape), "classes": classes},
        evaluate=validate,
    )
    return Task(
        stages=(stage,),
        model=model,
        sampler=build(config.sampler, model, config.model.context),
        condition=functools.partial(image_files.condition, config.sample.label, classes),
        write=functools.partial(_write, config, shape),
        show=functools.partial(pixels.show, config, shape),
        evaluate=functools.partial(pixels.evaluate, config, validate, splits.get("test")),
        commands={"complete": functools.partial(_complete, config, shape, splits.get("test"))},
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        data=image_files.digest(splits),
        results=("samples.png", "samples.npz", "samples", "trajectory.png", "completed.png"),
    )


def _validate(config, model, sequences, params) -> dict[str, float]:
    """A bound on the code length of test images, its standard error, and its floor where known."""
    choice, rows = config.evaluate, pixels.rows_to_evaluate(config, sequences)
    nats = masked_rounds.bound_of(model, params, rows, choice.draws, choice.batch)
    return pixels.likelihood(config, sequences, nats)


def _write(config, shape, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the samples as pictures and arrays, and the way to the first of them."""
    pixels.keep(config, shape, run, tokens)
    moments, rounds = masked_rounds.rounds_of(run, min(_ROWS, len(tokens)), _MOMENTS)
    frames = np.moveaxis(rounds, 0, 1).reshape(-1, tokens.shape[1])
    sheet = _drawn(config, shape, frames, frames == run.task.model.mask)
    picture = pictures.grid(sheet, columns=len(moments), scale=image_files.scale(shape[0]))
    pictures.save_png(run.workdir.path / "trajectory.png", picture)
    return {"sampled_tokens_per_second": report["samples_per_second"] * tokens.shape[1]}


def _drawn(config, shape, tokens, hidden):
    """Tokens int32 [B, L] as RGB images, grey where they are hidden."""
    drawn = pixels.to_rgb(pixels.images_of(config, shape, np.where(hidden, 0, tokens)))
    patch, rest = config.patch, shape[2:]
    grey = hidden.reshape(-1, shape[0] // patch, shape[1] // patch, *rest)
    grey = grey.repeat(patch, axis=1).repeat(patch, axis=2)
    return np.where(grey if rest else grey[..., None], np.uint8(_HIDDEN), drawn)


def hidden_part(hide: str, shape: tuple[int, ...]) -> np.ndarray:
    """Which tokens of an image are to be completed.

    Args:
      hide: as of `CompleteConfig`; "random" is the same half of the places for all images.
      shape: (rows, columns, C) or (rows, columns) of the tokens.

    Returns:
      bool, of this shape.
    """
    rows, columns = shape[:2]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    if hide == "random":
        order = np.random.default_rng(0).permutation(rows * columns)
        part = (order < rows * columns // 2).reshape(rows, columns)
    else:
        part = {
            "middle": (abs(row - (rows - 1) / 2) < rows / 4)
            & (abs(column - (columns - 1) / 2) < columns / 4),
            "top": row < rows // 2,
            "bottom": row >= rows - rows // 2,
            "left": column < columns // 2,
            "right": column >= columns - columns // 2,
        }[hide]
    part = np.broadcast_to(part, (rows, columns))
    return part if len(shape) == 2 else np.broadcast_to(part[..., None], shape)


def _complete(config, shape, sequences, run: Run) -> dict:
    """Fills what is hidden of test images several times, and draws all side by side."""
    choice, sampler = config.complete, run.task.sampler
    chosen = sequences.images.indices(0, 0, min(choice.images, len(sequences)))
    wholes = sequences.tokens_of(sequences.images.images[chosen])
    hidden = hidden_part(choice.hide, run.task.model.grid).reshape(-1)
    tokens = np.repeat(wholes, choice.fills, axis=0)
    cond = Condition(given=tokens, is_given=np.broadcast_to(~hidden, tokens.shape))
    if config.conditional:
        labels = sequences.images.labels[chosen].astype(np.int32)
        cond = cond.replace(label=np.repeat(labels, choice.fills))
    sample = config.sample
    chunks = sampling.generate_many(
        sampler, run.params, sample.seed, len(tokens), cond=cond, micro_batch=sample.micro_batch
    )
    filled = np.concatenate([chunk.samples for chunk in chunks])
    fills = filled.reshape(len(wholes), choice.fills, -1)
    rows = np.concatenate([wholes[:, None], wholes[:, None], fills], axis=1)
    holes = np.zeros(rows.shape, bool)
    holes[:, 1] = hidden
    flat = rows.reshape(-1, rows.shape[-1]), holes.reshape(-1, rows.shape[-1])
    picture = pictures.grid(
        _drawn(config, shape, *flat), columns=rows.shape[1], scale=image_files.scale(shape[0])
    )
    pictures.save_png(run.workdir.path / "completed.png", picture)
    report = {"nfe": sampler.nfe, "completed": len(filled)}
    if config.data.name != "shapes":
        return report
    support = sequences.tokens_of(ShapesSet(config.data.size).images(config.data.palette))
    return report | _exactly(support, filled, tokens, ~hidden)


def _exactly(support, filled, tokens, known):
    """How many fills are images of the set that fit what is given, and how many of those there are.

    Args:
      support: tokens [N, L] of all images.
      filled, tokens: [B, L], what was made, and what was given where `known` is set.
      known: bool [L].
    """
    fits = (support[None, :, known] == tokens[:, None, known]).all(-1)
    of_set = (support[None] == filled[:, None]).all(-1)
    return {
        "completed_valid": float((of_set & fits).any(-1).mean()),
        "completions_possible": float(fits.sum(-1).mean()),
    }
