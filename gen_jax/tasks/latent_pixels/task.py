"""One-shot decoders of pixels: what they are trained on, and how samples are judged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax import evaluation, keys
from gen_jax.condition import Condition
from gen_jax.models.parallel import ParallelModel, ParallelSampler, one_shot
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import image_files
from gen_jax.tasks.latent_pixels.config import LatentPixelsConfig
from gen_jax.tasks.pixels import task as pixels
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]


def make(config: LatentPixelsConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` has the sequences by split."""
    splits = context.data
    shape, _ = pixels.shape_and_classes(config, context)
    network = TokenNetwork(config.network(0))
    model = ParallelModel(network, config.model.context, ending="eos", latent=config.latent)
    validate = functools.partial(_validate, config, model, splits.get("test"))
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(pixels.batch, config, splits.get("train")),
        record={"image_shape": list(shape), "classes": 0},
        evaluate=validate,
    )
    return Task(
        stages=(stage,),
        model=model,
        sampler=ParallelSampler(model, one_shot(model, config.sampler.temperature)),
        condition=lambda number: Condition(),
        write=functools.partial(_write, config, shape),
        show=functools.partial(pixels.show, config, shape),
        evaluate=functools.partial(pixels.evaluate, config, validate, splits.get("test")),
        sizes={f"{split}_images": len(images) for split, images in splits.items()},
        data=image_files.digest(splits),
        results=("samples.png", "samples.npz", "samples"),
    )


def _validate(config, model, sequences, params) -> dict[str, float]:
    """The code length of test images: exact for codes, a bound for a Gaussian latent."""
    choice, rows = config.evaluate, pixels.rows_to_evaluate(config, sequences)
    if config.latent.kind != "gaussian":
        nats = -evaluation.log_prob(model, params, rows, choice.batch)
        return pixels.likelihood(config, sequences, nats)
    latent = dataclasses.replace(config.latent, free_nats=0.0)
    rows["index"] = np.arange(len(rows["tokens"]), dtype=np.int32)
    bound = functools.partial(_bound, dataclasses.replace(model, latent=latent), choice.draws)
    values = evaluation.map_rows(bound, params, rows, choice.batch)
    report = pixels.likelihood(config, sequences, values["nats"])
    return report | {"nats_of_latent": float(values["kl"].mean(dtype=np.float64))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(model, draws, params, rows):
    """The mean bound of each row over draws of the latent, in nats, and the part of the latent."""
    tokens = rows["tokens"]
    ours = keys.of_items(keys.root(0, "evaluate"), rows["index"])

    def one(tokens, key):
        nats, metrics = model.loss(params, {"tokens": tokens[None]}, key[None])
        return {"nats": nats * len(tokens), "kl": metrics["kl"]}

    def add(i, total):
        some = jax.vmap(one)(tokens, keys.fold_in_each(ours, i))
        return jax.tree.map(lambda old, new: old + new / draws, total, some)

    zeros = jnp.zeros(len(tokens), jnp.float32)
    return jax.lax.fori_loop(0, draws, add, {"nats": zeros, "kl": zeros})


def _write(config, shape, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the samples as pictures and arrays."""
    pixels.keep(config, shape, run, tokens)
    return {"sampled_tokens_per_second": report["samples_per_second"] * tokens.shape[1]}
