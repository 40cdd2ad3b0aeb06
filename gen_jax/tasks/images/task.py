"""Diffusion models of images: what they are trained on, and how samples are judged."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from gen_jax import config as config_lib
from gen_jax import evaluation, interop, keys, pictures, sampling
from gen_jax.data import ShapesSet
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler
from gen_jax.nn.unet import UNetNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files
from gen_jax.tasks.images.config import ImagesConfig
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]

_TRAJECTORIES, _ROWS, _COLUMNS, _FRAMES = 8, 4, 10, 40  # samples; of trajectory.png; of the GIF


def make(config: ImagesConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the images by split."""
    splits, record, initial = context.data, context.records.get("model"), None
    classes = image_files.number_of_classes(config, config.model.classes, record, splits.values())
    network = dataclasses.replace(config.model, classes=classes)
    if config.pretrained:
        published, initial = _load_pretrained(config, network)
    if record is not None:
        shape = tuple(record["image_shape"])
    else:
        shape = splits["train"].images.shape[1:] if "train" in splits else published.shape
    model = DiffusionModel(UNetNetwork(network), config.diffusion, shape)
    validate = functools.partial(_validate, config, model, splits.get("test"))
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(_batch, config, splits.get("train")),
        record={"image_shape": list(shape), "classes": classes},
        evaluate=validate,
        initial=None if initial is None else lambda: initial,
    )
    return Task(
        stages=(stage,),
        model=model,
        sampler=DiffusionSampler(model, config.sampler),
        condition=functools.partial(image_files.condition, config.sample.label, classes),
        write=_write,
        show=lambda samples: image_files.sheet(pictures.to_uint8(samples)),
        evaluate=functools.partial(_evaluate, config, validate, splits.get("test")),
        commands={"export": _export},
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        data=image_files.digest(splits),
        results=("samples.png", "samples.npz", "samples", "trajectory.png", "trajectory.gif"),
    )


def _batch(config, images, step, shard, earlier):
    """Images, those of the reference where there is one, and labels for a conditional model."""
    del earlier

    def draw(seed, size):
        return images.batch(seed, step, size, flip=config.data.flip, shard=shard)

    reference = image_files.reference_size(config.diffusion, len(images))
    return image_files.batch_of(draw, config.train, reference, config.conditional)


def _load_pretrained(config, network) -> tuple[DiffusionModel, Any]:
    """A UNet2DModel of diffusers, which must be our network."""
    model, params = interop.load_diffusers_unet(config.pretrained, config.diffusion)
    ours = dataclasses.replace(network, dropout=0.0, dtype="float32")
    theirs = config_lib.to_dict(model.network.config)
    differing = config_lib.differences(config_lib.to_dict(ours), theirs, ("dropout",))
    if differing:
        raise ValueError(
            f"{config.pretrained} is another network than model ({'; '.join(differing)})"
        )
    return model, params


def _export(run: Run) -> dict:
    """Writes the averaged parameters as a folder of diffusers."""
    path, height = run.workdir.path / "diffusers", run.task.model.shape[0]
    network = run.task.model.network.config
    interop.save_diffusers_unet(path, network, run.params, sample_size=height)
    return {"exported": str(path)}


def _validate(config, model, test_set, params) -> dict[str, float]:
    """The variational bound on test images: its mean, parts and standard error."""
    choice = config.evaluate
    number = min(choice.images, len(test_set))
    chosen = test_set.indices(0, 0, number)
    rows = {"image": test_set.images[chosen], "index": np.arange(number, dtype=np.int32)}
    if config.conditional:
        rows["label"] = test_set.labels[chosen]
    values = evaluation.map_rows(
        functools.partial(_bound, model, choice.draws or None), params, rows, choice.batch
    )
    report = {
        name if name == "bits_per_dim" else f"bits_{name}": float(value.mean(dtype=np.float64))
        for name, value in values.items()
    }
    error = values["bits_per_dim"].std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
    return report | {"bits_per_dim_standard_error": float(error), "test_images": number}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(model, draws, params, rows):
    ours = keys.of_items(keys.root(0, "evaluate"), rows.pop("index"))
    return model.bits_per_dim(params, rows, ours, draws=draws)


def _evaluate(config, validate, test_set, run: Run) -> dict[str, float]:
    """Bits per dimension on the test set, and the quality of the samples drawn last."""
    images = run.kept_samples("images")["images"]
    report = validate(run.params)
    if config.data.name == "shapes":
        entropy = ShapesSet(config.data.size).entropy
        report["bits_per_dim_floor"] = entropy / np.log(2) / np.prod(run.task.model.shape)
    return report | image_files.score(images, config.data, test_set)


def _write(run: Run, samples: np.ndarray, report: dict) -> dict:
    """Leaves the samples as pictures and arrays, and the way to the first of them."""
    del report
    image_files.keep(run, samples, pictures.to_uint8(samples))
    _write_trajectory(run)
    return {"solver": run.config.sampler.name}


def _write_trajectory(run):
    sampler, task = run.task.sampler, run.task
    ours = sampling.sample_keys(run.config.sample.seed, 0, _TRAJECTORIES)
    cond = task.condition(_TRAJECTORIES)
    _, (noisy, clean) = sampling.generate(
        sampler, run.params, ours, cond, trajectory=sampler.trajectory
    )
    noisy, clean = np.asarray(noisy), np.asarray(clean)
    columns = np.unique(np.linspace(0, sampler.steps - 1, _COLUMNS).round().astype(int))
    rows = [frames[columns, i] for i in range(_ROWS) for frames in (noisy, clean)]
    scale = image_files.scale(task.model.shape[0])
    sheet = pictures.to_uint8(np.concatenate(rows))
    picture = pictures.grid(sheet, columns=len(columns), scale=scale)
    pictures.save_png(run.workdir.path / "trajectory.png", picture)
    moments = np.unique(np.linspace(0, sampler.steps - 1, _FRAMES).round().astype(int))
    both = (pictures.to_uint8(np.concatenate([noisy[m], clean[m]])) for m in moments)
    frames = [pictures.grid(sheet, columns=_TRAJECTORIES, scale=scale) for sheet in both]
    pictures.save_gif(run.workdir.path / "trajectory.gif", frames, 80)
