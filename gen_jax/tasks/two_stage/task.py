"""Priors over codes or latents: what they are trained on, and how their samples are judged."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax import config as config_lib
from gen_jax import evaluation, interop, loading, pictures, sampling, trees
from gen_jax.data import ShapesSet
from gen_jax.data.streams import shard_slice
from gen_jax.metrics import gaps
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.diffusion.vlb import discretised_log_likelihood
from gen_jax.models.masked import MaskedModel, OrderedGroups
from gen_jax.models.next_scale import NextScaleModel, NextScaleSampler, network_sizes
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.models.vq import Autoencoder, make_autoencoder
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files, masked_rounds
from gen_jax.tasks.autoencoder import task as autoencoder_task
from gen_jax.tasks.two_stage.codes import CodeFiles, distribution, encoded
from gen_jax.tasks.two_stage.config import TwoStageConfig
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]

_MOMENTS, _ROWS, _FITTED = 10, 4, 1024  # of trajectory.png; training images for the deviation


def make(config: TwoStageConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the images by split."""
    space = _Space(config, context)
    record = context.records.get("prior")
    classes = image_files.number_of_classes(config, 0, record, context.data.values())
    model, drawn = _prior(config, space.model, classes)
    sampler = TwoStageSampler(drawn, space.model, latents=space.latents)
    prior = Stage(
        name="prior",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(_batch, config, space),
        batch_like=functools.partial(_batch_of, config, space, space.blank),
        record={
            "image_shape": list(space.model.shape),
            "classes": classes,
            "autoencoder": space.digest,
        },
        must_match=("autoencoder",),
        evaluate=functools.partial(_validate, config, space, drawn),
    )
    return Task(
        stages=(*space.stages, prior),
        model=sampler,
        sampler=sampler,
        sampler_params=space.both,
        condition=functools.partial(image_files.condition, config.sample.label, classes),
        write=_write,
        show=lambda samples: image_files.sheet(pictures.to_uint8(samples)),
        evaluate=functools.partial(_evaluate, config, space, drawn),
        commands={"export": _export},
        sizes={f"{split}_images": len(images) for split, images in context.data.items()},
        data=image_files.digest(context.data),
        results=("samples.png", "samples.npz", "samples", "trajectory.png"),
    )


class _Space:
    """The autoencoder of a run: its own, trained as a stage before, or that of another run.

    Attributes:
      model: the autoencoder.
      latents: whether the prior is over latents, not codes.
      stages: what trains it; empty where it is of another run.
      digest: of its parameters; "" where this run trains it.
    """

    def __init__(self, config, context):
        self.config, self.images = config, context.data
        self.latents = config.prior == "diffusion"
        self.params, self.stages, self.digest = None, (), ""
        record = context.records.get("prior")
        if config.autoencoder:
            self.model, self.params = _load(config, self.images, self.latents)
            self.digest = trees.digest(self.params)
            self._files = self._checked_files(context, self._identity)
            if record is not None and record["autoencoder"] != self.digest:
                raise ValueError(
                    f"the prior in {context.workdir.path} was trained with another autoencoder "
                    f"than that in {config.autoencoder}"
                )
            return
        train = self.images.get("train")
        stored = record or context.records.get("autoencoder")
        shape = tuple(stored["image_shape"]) if stored else train.images.shape[1:]
        parts = config.coder, config.quantiser, config.objective
        self.model = make_autoencoder(*parts, shape)
        own = autoencoder_task.stage("autoencoder", config, self.model, train, config.coder_train)
        self.stages = (own,)
        self._files = self._checked_files(context, "*")

    def _checked_files(self, context, identity):
        folder, flip = context.workdir.path / "codes", self.config.data.flip
        files = CodeFiles(folder, self.images, self.model, self.latents, flip)
        files.check(identity)
        return files

    @functools.cached_property
    def _identity(self):
        """What the codes depend on beside the images."""
        return trees.digest({"latents" if self.latents else "codes": self.params})

    def both(self, params: Any) -> dict[str, Any]:
        """What the sampler reads, from the averaged parameters of the run."""
        if self.stages:
            self.params = params["autoencoder"]
            return params
        return {"prior": params, "autoencoder": jax.device_put(self.params)}

    def draw(
        self, step: int, shard: tuple[int, int], seed: int, size: int
    ) -> dict[str, np.ndarray]:
        """Codes or scaled latents of a part of the training images of a step, and their labels."""
        images, codes = self.images["train"], self.codes("train")
        chosen = images.indices(seed, step, size)
        places = chosen
        if self.config.data.flip:
            coins = np.random.default_rng([seed, step]).integers(0, 2, size)
            places = chosen + len(images) * coins
        mine = shard_slice(size, shard)
        return {self._name: np.asarray(codes[places[mine]]), "label": images.labels[chosen[mine]]}

    def blank(self, seed: int, size: int) -> dict[str, np.ndarray]:
        """Arrays of the names, shapes and dtypes of `draw`, all zeros."""
        del seed
        blank = np.zeros((size, *self._files.row), self._files.dtype)
        labels = self.images["train"].labels
        return {self._name: blank, "label": np.zeros(size, labels.dtype)}

    @property
    def _name(self):
        """Of codes or latents in a batch."""
        return "latent" if self.latents else "tokens"

    def codes(self, split: str) -> np.ndarray:
        """The codes or scaled latents of a split, from a file of the work directory."""
        encode = functools.partial(encoded, self.model, self.params, latents=self.latents)
        return self._files.of(split, self._identity, encode)


def _load(config, splits, latents) -> tuple[Autoencoder, Any]:
    """The autoencoder of another run, which must take the images."""
    loaded = loading.load(config.autoencoder)
    if not isinstance(loaded.model, Autoencoder):
        raise ValueError(f"the run in {config.autoencoder} is no autoencoder")
    if not latents and not loaded.model.quantiser.discrete:
        raise ValueError(
            f"--prior {config.prior} is over codes, and the autoencoder in {config.autoencoder} "
            "has none"
        )
    if config.prior == "next_scale" and not loaded.model.quantiser.options.scales:
        raise ValueError(
            f"--prior next_scale is over the codes of scales, and the autoencoder in "
            f"{config.autoencoder} has none"
        )
    for images in splits.values():
        if images.images.shape[1:] != loaded.model.shape:
            raise ValueError(
                f"the images are {list(images.images.shape[1:])}, the autoencoder in "
                f"{config.autoencoder} takes {list(loaded.model.shape)}"
            )
    return loaded.model, jax.device_get(loaded.params)


def _prior(config, autoencoder, classes):
    """The model of the prior, and the sampler of its codes or latents."""
    if config.prior == "diffusion":
        height, width, channels = autoencoder.latent_shape
        sizes = {"channels": channels, "out_channels": channels, "classes": classes}
        network = UNetNetwork(dataclasses.replace(config.unet, **sizes))
        model = DiffusionModel(network, config.diffusion, (height, width, channels))
        return model, DiffusionSampler(model, config.decoding)
    if config.prior == "next_scale":
        scales = autoencoder.quantiser.options.scales
        sizes = network_sizes(autoencoder.quantiser.codes, scales, classes)
        model = NextScaleModel(TokenNetwork(dataclasses.replace(config.model, **sizes)), scales)
        return model, NextScaleSampler(model, config.decoding)
    length, causal = math.prod(autoencoder.code_shape), config.prior == "ar"
    sizes = dataclasses.replace(
        config.model,
        vocabulary=autoencoder.quantiser.codes,
        context=length + bool(classes and not causal),
        causal=causal,
        extra_inputs=max(classes, 1) if causal else 1 + classes,
    )
    if causal:
        model = AutoregressiveModel(TokenNetwork(sizes))
        return model, AutoregressiveSampler(model, 0, length, config.decoding)
    counts = "all" if config.prior == "one_shot" else config.mask.counts
    grid, halton = autoencoder.code_shape, config.mask.halton
    model = MaskedModel(TokenNetwork(sizes), counts, grid=grid, halton=halton)
    build = config_lib.resolve(config.decoding.make)
    return model, build(config.decoding, model, length)


def _batch(config, space, step, shard, earlier):
    """Codes or scaled latents of images, and labels for a conditional prior."""
    if space.params is None:
        space.params = jax.device_get(earlier["autoencoder"])
    return _batch_of(config, space, functools.partial(space.draw, step, shard))


def _batch_of(config, space, draw):
    """A batch of what `draw` gives."""
    reference = 0
    if space.latents:
        reference = image_files.reference_size(config.diffusion, len(space.images["train"]))
    return image_files.batch_of(draw, config.train, reference, config.conditional)


def _validate(config, space, sampler, params) -> dict[str, int | float]:
    """The code length of test images, exactly or by its bound; nothing for latents.

    -log p(x) is at most that of the code and that of the image given its code, a normal around the
    decoded image on the grid of 256 values, whose deviation is fitted on training images.
    """
    if space.latents:
        return {}
    number = min(config.evaluate.images, len(space.images["test"]))
    chosen = space.images["test"].indices(0, 0, number)
    rows = {"tokens": np.asarray(space.codes("test")[chosen])}
    if config.conditional:
        rows["label"] = space.images["test"].labels[chosen]
    code = _code_nats(config, sampler, params, rows)
    errors = _errors(config, space, space.images["train"].images[:_FITTED])
    deviation = math.sqrt(max(errors["mse"].mean(dtype=np.float64), 1e-8))
    left = _errors(config, space, space.images["test"].images[chosen], deviation)
    bits = 1 / np.log(2) / math.prod(space.model.shape)
    nats = (code + left["nats"]).astype(np.float64)
    return {
        "codes_per_image": rows["tokens"].shape[1],
        "reconstruction_mse": float(left["mse"].mean(dtype=np.float64)),
        "nats_per_code": float(code.mean(dtype=np.float64) / rows["tokens"].shape[1]),
        "nats_of_codes": float(code.mean(dtype=np.float64)),
        "bits_per_dim": float(nats.mean() * bits),
        "bits_per_dim_of_codes": float(code.mean(dtype=np.float64) * bits),
        "bits_per_dim_standard_error": float(nats.std(ddof=1) / np.sqrt(number) * bits),
        "test_images": number,
    }


def _code_nats(config, sampler, params, rows):
    """-log p of code sequences [N]; a bound where the order depends on what was drawn."""
    draws, batch, model = config.evaluate.draws, config.evaluate.batch, sampler.model
    if config.prior in ("ar", "next_scale"):
        return -evaluation.log_prob(model, params, rows, batch)
    if config.prior == "one_shot":
        sampler = OrderedGroups.of_groups(model, (tuple(range(sampler.length)),))
    if isinstance(sampler, OrderedGroups) and sampler.order:
        return masked_rounds.nats_in_order(sampler, params, rows, batch)
    return masked_rounds.bound_of(model, params, rows, draws, batch)


def _errors(config, space, images, deviation=1.0):
    f = functools.partial(_reconstruct, space.model)
    rows = {"image": images, "deviation": np.full(len(images), deviation, np.float32)}
    return evaluation.map_rows(f, space.params, rows, config.evaluate.batch)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model, params, rows):
    """Squared errors of decoded images, and -log p of the images given their codes."""
    x = to_signal(rows["image"])
    decoded = jnp.clip(model.decode(params, model.encode(params, x).value), -1, 1)
    scale = jnp.log(rows["deviation"])[:, None, None, None]
    nats = -discretised_log_likelihood(x, decoded, scale).sum(axis=(1, 2, 3))
    return {"mse": jnp.square(decoded - x).mean(axis=(1, 2, 3)), "nats": nats}


def _evaluate(config, space, sampler, run: Run) -> dict[str, int | float]:
    """The likelihood of the test set, the quality of samples, and what one shot must lose."""
    images = run.kept_samples("images")["images"]
    params = space.both(run.params)
    report = _validate(config, space, sampler, params["prior"])
    report |= image_files.score(images, config.data, space.images["test"])
    if config.data.name == "shapes" and not space.latents:
        support = ShapesSet(config.data.size).images()
        codes = encoded(space.model, space.params, support, False)
        scales = space.model.quantiser.options.scales
        measure = functools.partial(_exactly, codes, space.model.quantiser.codes, scales)
        report |= evaluation.kept_figures(measure, codes)
    return report


def _exactly(codes, vocabulary, scales=()):
    """What is known of the encoded support [N, L], all of whose images are equally likely.

    Drawn all at once from the exact marginals of each place, so much of the mass falls on codes
    that some image has; drawn scale by scale from the exact conditionals, so much, and so many nats
    are lost. The entropy of the codes is the floor of their code length.
    """
    dist = distribution(codes, vocabulary)
    at_once = (tuple(range(dist.length)),)
    report = {
        "distinct_codes_of_support": len(dist.support),
        "nats_of_codes_floor": dist.entropy,
        "one_shot_mass_on_support": gaps.valid_mass_of_groups(dist, at_once),
    }
    if not scales:
        return report
    ends = np.cumsum([side**2 for side in scales])
    groups = tuple(tuple(range(end - side**2, end)) for side, end in zip(scales, ends, strict=True))
    return report | {
        "next_scale_mass_on_support": gaps.valid_mass_of_groups(dist, groups),
        "next_scale_nats_lost": gaps.kl_of_groups(dist, groups),
    }


def _export(run: Run) -> dict:
    """Writes latent diffusion as a folder of diffusers; other priors have no such format."""
    path, task = run.workdir.path / "diffusers", run.task
    interop.save_diffusers_ldm(path, task.sampler, task.sampler_params(run.params))
    return {"exported": str(path)}


def _write(run: Run, samples: np.ndarray, report: dict) -> dict:
    """Leaves the samples as pictures and arrays, and the way to the first of them."""
    del report
    image_files.keep(run, samples, pictures.to_uint8(samples))
    _write_trajectory(run)
    return {}


def _write_trajectory(run):
    """What the prior has drawn after some of its steps, decoded."""
    sampler, params = run.task.sampler, run.task.sampler_params(run.params)
    ours = sampling.sample_keys(run.config.sample.seed, 0, _ROWS)
    moments = np.unique(np.linspace(1, sampler.steps, _MOMENTS).round().astype(int))
    finish, frames = jax.jit(sampler.finish), []
    states = sampling.stream(sampler, params, ours, run.task.condition(_ROWS))
    for step, state in enumerate(states, start=1):
        if step in moments:
            frames.append(pictures.to_uint8(finish(params, state)))
    rows = np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:])
    scale = image_files.scale(frames[0].shape[1])
    picture = pictures.grid(rows, columns=len(frames), scale=scale)
    pictures.save_png(run.workdir.path / "trajectory.png", picture)
