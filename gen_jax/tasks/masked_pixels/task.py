"""Masked models of pixels: what they are trained on, how they fill holes, how that is judged."""

import functools

import jax
import numpy as np

from gen_jax import config as config_lib
from gen_jax import evaluation, keys, pictures, sampling
from gen_jax.condition import Condition
from gen_jax.data import ShapesSet
from gen_jax.models.masked import MaskedModel, estimate_bound
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files
from gen_jax.tasks.masked_pixels.config import MaskedPixelsConfig
from gen_jax.tasks.pixels import task as pixels
from gen_jax.trainables import ModelTrainable

__all__ = ["hidden_part", "make"]

_MOMENTS, _ROWS, _HIDDEN = 10, 4, 64  # of trajectory.png: columns, rows, the grey of a mask


def make(config: MaskedPixelsConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the sequences by split."""
    splits = context.data
    shape, classes = pixels.shape_and_classes(config, context)
    model = MaskedModel(TokenNetwork(config.network(classes)), config.mask.counts)
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
        write=functools.partial(_write, shape),
        show=functools.partial(pixels.show, shape),
        evaluate=functools.partial(pixels.evaluate, config, validate, splits.get("test")),
        commands={"complete": functools.partial(_complete, shape, splits.get("test"))},
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        results=("samples.png", "samples.npz", "samples", "trajectory.png", "completed.png"),
    )


def _validate(config, model, sequences, params) -> dict[str, float]:
    """A bound on the code length of test images, its standard error, and its floor where known."""
    rows = pixels.rows_to_evaluate(config, sequences)
    rows["index"] = np.arange(len(rows["tokens"]), dtype=np.int32)
    bound = functools.partial(_bound, model, config.evaluate.draws)
    values = evaluation.map_rows(bound, params, rows, config.evaluate.batch)
    return pixels.likelihood(config, sequences, values)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(model, draws, params, rows):
    ours = keys.of_items(keys.root(0, "evaluate"), rows.pop("index"))
    return estimate_bound(model, params, rows, ours, draws)


def _write(shape, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the samples as pictures and arrays, and the way to the first of them."""
    pixels.keep(shape, run, tokens)
    sampler, number = run.task.sampler, min(_ROWS, len(tokens))
    ours = sampling.sample_keys(run.config.sample.seed, 0, number)
    _, rounds = sampling.generate(
        sampler, run.params, ours, run.task.condition(number), trajectory=_tokens_of
    )
    moments = np.unique(np.linspace(0, sampler.steps - 1, _MOMENTS).round().astype(int))
    frames = np.moveaxis(np.asarray(rounds)[moments], 0, 1).reshape(-1, *shape)
    sheet = _drawn(frames, frames == run.task.model.mask)
    picture = pictures.grid(sheet, columns=len(moments), scale=image_files.scale(shape[0]))
    pictures.save_png(run.workdir.path / "trajectory.png", picture)
    return {"sampled_tokens_per_second": report["samples_per_second"] * tokens.shape[1]}


def _tokens_of(state):
    return state.tokens


def _drawn(images, hidden):
    """Images as RGB, grey where they are hidden."""
    drawn = pixels.to_rgb(np.where(hidden, 0, images).astype(np.uint8))
    return np.where(hidden if hidden.ndim == 4 else hidden[..., None], np.uint8(_HIDDEN), drawn)


def hidden_part(hide: str, shape: tuple[int, ...]) -> np.ndarray:
    """Which values of an image are to be completed.

    Args:
      hide: as of `CompleteConfig`; "random" is the same half of the pixels for all images.
      shape: (height, width, C) or (height, width).

    Returns:
      bool, of this shape.
    """
    height, width = shape[:2]
    row, column = np.arange(height)[:, None], np.arange(width)[None]
    if hide == "random":
        pixels_hidden = np.random.default_rng(0).permutation(height * width) < height * width // 2
        part = pixels_hidden.reshape(height, width)
    else:
        part = {
            "middle": (abs(row - (height - 1) / 2) < height / 4)
            & (abs(column - (width - 1) / 2) < width / 4),
            "top": row < height // 2,
            "bottom": row >= height - height // 2,
            "left": column < width // 2,
            "right": column >= width - width // 2,
        }[hide]
    part = np.broadcast_to(part, (height, width))
    return part if len(shape) == 2 else np.broadcast_to(part[..., None], shape)


def _complete(shape, sequences, run: Run) -> dict:
    """Fills what is hidden of test images several times, and draws all side by side."""
    choice, sampler = run.config.complete, run.task.sampler
    chosen = sequences.images.indices(0, 0, min(choice.images, len(sequences)))
    tokens = np.repeat(sequences.tokens_of(sequences.images.images[chosen]), choice.fills, axis=0)
    hidden = hidden_part(choice.hide, shape)
    known = np.broadcast_to(~hidden.reshape(-1), tokens.shape)
    cond = Condition(given=tokens, is_given=known)
    if run.config.conditional:
        labels = sequences.images.labels[chosen].astype(np.int32)
        cond = cond.replace(label=np.repeat(labels, choice.fills))
    sample = run.config.sample
    chunks = sampling.generate_many(
        sampler, run.params, sample.seed, len(tokens), cond=cond, micro_batch=sample.micro_batch
    )
    filled = np.concatenate([chunk.samples for chunk in chunks])
    whole = tokens.reshape(-1, choice.fills, *shape)[:, :1]
    fills = filled.reshape(-1, choice.fills, *shape)
    rows = np.concatenate([whole, whole, fills], axis=1)
    holes = np.zeros(rows.shape, bool)
    holes[:, 1] = hidden
    sheet = _drawn(rows.reshape(-1, *shape), holes.reshape(-1, *shape))
    scale = image_files.scale(shape[0])
    picture = pictures.grid(sheet, columns=rows.shape[1], scale=scale)
    pictures.save_png(run.workdir.path / "completed.png", picture)
    report = {"nfe": sampler.nfe, "completed": len(filled)}
    if run.config.data.name != "shapes":
        return report
    return report | _exactly(run.config.data, filled, tokens, known[0])


def _exactly(data, filled, tokens, known):
    """How many fills are images of the set, and how many of those fit what is given."""
    support = ShapesSet(data.size).images(data.palette).reshape(-1, tokens.shape[1])
    fits = (support[None, :, known] == tokens[:, None, known]).all(-1)
    of_set = (support[None] == filled[:, None]).all(-1)
    return {
        "completed_valid": float((of_set & fits).any(-1).mean()),
        "completions_possible": float(fits.sum(-1).mean()),
    }
