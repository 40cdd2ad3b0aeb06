"""Autoencoders of images: what they are trained on, and how what comes back is judged."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot

from gen_jax import evaluation, interop, pictures
from gen_jax.config import RunConfig, TrainConfig
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.vq import (
    AdversarialTrainable,
    Autoencoder,
    AutoencoderTrainable,
    make_autoencoder,
    usage,
)
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files
from gen_jax.tasks.autoencoder.config import AutoencoderRunConfig

__all__ = ["code_pictures", "make", "stage"]

_NEAR = 0.06  # mean squared error in [-1, 1] up to which an image of the shapes set is the same


def make(config: AutoencoderRunConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the images by split."""
    splits, record = context.data, context.records.get("model")
    shape = tuple(record["image_shape"]) if record else splits["train"].images.shape[1:]
    model = make_autoencoder(config.model, config.quantiser, config.objective, shape)
    validate = functools.partial(_validate, config, model, splits.get("test"))
    return Task(
        stages=(stage("model", config, model, splits.get("train"), config.train, validate),),
        model=model,
        evaluate=functools.partial(_evaluate, config, model, splits.get("test")),
        commands={"export": _export},
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        data=image_files.digest(splits),
        results=("reconstruction.png", "codes.png", "usage.png"),
    )


def stage(
    name: str,
    config: RunConfig,
    model: Autoencoder,
    images: Any,
    train: TrainConfig,
    evaluate: Any = None,
) -> Stage:
    """What trains an autoencoder on images, which are mirrored as config.data says.

    It is trained against a critic where the options of the model give one a weight. Its previews
    are of training images.
    """
    critic = model.options.critic.weight > 0
    return Stage(
        name=name,
        trainable=(AdversarialTrainable if critic else AutoencoderTrainable)(model, train),
        batch=functools.partial(_batch, config.data.flip, train, images),
        record={"image_shape": list(model.shape)},
        evaluate=evaluate,
        show=functools.partial(_show, model, images, train.preview),
        train=train,
    )


def _batch(flip, train, images, step, shard, earlier):
    del earlier
    whole = images.batch(train.seed, step, train.batch, flip=flip, shard=shard)
    return {"image": whole["image"]}


@functools.partial(jax.jit, static_argnums=0)
def _there_and_back(model, params, rows):
    """Codes, images, and squared and absolute errors of each image, in [-1, 1]."""
    x = to_signal(rows["image"])
    quantised = model.encode(params, x)
    images = jnp.clip(model.decode(params, quantised.value), -1, 1)
    difference = images - x
    figures = {
        "images": images,
        "mse": jnp.square(difference).mean(axis=(1, 2, 3)),
        "mae": jnp.abs(difference).mean(axis=(1, 2, 3)),
    }
    return figures | ({"code": quantised.code} if model.quantiser.discrete else {})


def _coded(config, model, images, params):
    choice = config.evaluate
    chosen = images.indices(0, 0, min(choice.images, len(images)))
    rows = {"image": images.images[chosen]}
    coded = evaluation.map_rows(
        functools.partial(_there_and_back, model), params, rows, choice.batch
    )
    counts = _counts(model, coded["code"]) if model.quantiser.discrete else ()
    return rows["image"], coded, counts


def _show(model, images, number, params):
    """Images from all over the set, below them what comes back, and the difference."""
    originals = images.images[images.indices(0, 0, min(number, len(images)))]
    coded = _there_and_back(model, params, {"image": originals})
    return _compared(originals, np.asarray(coded["images"]))


def _compared(originals, decoded):
    """Images [B, H, W, C] over what came back in [-1, 1], and the difference, as one picture."""
    decoded = pictures.to_uint8(decoded)
    difference = np.abs(decoded.astype(int) - originals).astype(np.uint8)
    rows = np.concatenate([originals, decoded, difference])
    scale = image_files.scale(originals.shape[1])
    return pictures.grid(rows, columns=len(originals), scale=scale)


def _validate(config, model, images, params) -> dict[str, Any]:
    """How near decoded test images are to what was encoded, and how often each code was used."""
    _, coded, counts = _coded(config, model, images, params)
    names = [f"code_usage_{i}" if len(counts) > 1 else "code_usage" for i in range(len(counts))]
    return _figures(config, model, coded, counts) | dict(zip(names, counts, strict=True))


def _figures(config, model, coded, counts):
    mse = float(coded["mse"].mean(dtype=np.float64))
    report = {
        "reconstruction_mse": mse,
        "reconstruction_mae": float(coded["mae"].mean(dtype=np.float64)),
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,  # decibels; values span 2
        "test_images": len(coded["mse"]),
    }
    if config.data.name == "shapes":
        report["reconstructed"] = float((coded["mse"] <= _NEAR).mean())
    if not model.quantiser.discrete:
        return report
    measured = usage(jnp.asarray(counts, jnp.float32))
    return report | {
        "codes_per_image": math.prod(model.code_shape),
        "bits_per_image": math.prod(model.code_shape) * math.log2(model.quantiser.codes),
        "code_perplexity": float(measured["perplexity"]),
        "codes_used": float(measured["used"]),
    }


def _counts(model, code):
    """How often each code was used, [R, K], in each table."""
    maps, codes = model.quantiser.maps(code), model.quantiser.codes
    return np.stack([np.bincount(each.reshape(-1), minlength=codes) for each in maps])


def _evaluate(config, model, images, run: Run) -> dict[str, float]:
    """The figures of the test set, and pictures of them."""
    originals, coded, counts = _coded(config, model, images, run.params)
    number, path = min(config.evaluate.shown, len(originals)), run.workdir.path
    compared = _compared(originals[:number], coded["images"][:number])
    pictures.save_png(path / "reconstruction.png", compared)
    if model.quantiser.discrete:
        maps = model.quantiser.maps(coded["code"][:number])
        drawn = code_pictures(maps, model.quantiser.codes, model.shape[0])
        sheet = pictures.grid(drawn, columns=number, scale=image_files.scale(model.shape[0]))
        pictures.save_png(path / "codes.png", sheet)
        _draw_usage(path / "usage.png", counts)
    return _figures(config, model, coded, counts)


def code_pictures(maps: Sequence[np.ndarray], codes: int, height: int) -> np.ndarray:
    """Codes as images of this height, a colour for each, tables side by side.

    Args:
      maps: int [B, h, w] of each table; see `Quantiser.maps`.
      codes: K.
      height: of the pictures in pixels, a multiple of every h.

    Returns:
      uint8 [B, height, width, 3].
    """
    hues = np.arange(codes) * 0.61803398875 % 1
    colours = (255 * pyplot.get_cmap("hsv")(hues)[:, :3]).astype(np.uint8)
    sides = [max(1, height // code.shape[1]) for code in maps]
    drawn = [
        colours[code].repeat(side, axis=1).repeat(side, axis=2)
        for code, side in zip(maps, sides, strict=True)
    ]
    return np.concatenate(drawn, axis=2)


def _draw_usage(path, counts):
    """How often each code of each table was used, the most frequent first."""
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for i, share in enumerate(counts / counts.sum(axis=1, keepdims=True)):
        label = f"table {i}" if len(counts) > 1 else None
        axes.step(np.arange(len(share)), np.sort(share)[::-1], where="mid", label=label)
    axes.set(xlabel="codes, the most frequent first", ylabel="share of the test set")
    axes.set_yscale("log")
    if len(counts) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _export(run: Run) -> dict:
    """Writes the averaged parameters as a folder of diffusers."""
    path, model = run.workdir.path / "diffusers", run.task.model
    save = interop.save_diffusers_vq if model.quantiser.discrete else interop.save_diffusers_kl
    save(path, model, run.params)
    return {"exported": str(path)}
