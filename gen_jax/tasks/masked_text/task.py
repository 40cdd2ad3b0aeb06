"""Masked models of text: what they are trained on, how they fill holes, how that is judged."""

import functools

import numpy as np

from gen_jax import config as config_lib
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.masked import MaskedModel, infill
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import masked_rounds, text_files
from gen_jax.tasks.masked_text.config import MaskedTextConfig, MaskedTextData
from gen_jax.tasks.text_source import TOKENIZER
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]

COMPLETED = "completed.txt"
_SHOWN, _ROUNDS_SHOWN = 3, 10


def make(config: MaskedTextConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` is its `MaskedTextData`."""
    data, record = context.data, context.records.get("model")
    mask = config.mask
    model = MaskedModel(TokenNetwork(data.model), mask.counts, halton=mask.halton)
    if record is not None:
        data.check_record(record)
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(_batch, config, data),
        record=data.record() if "train" in context.phases else {},
        must_match=("tokenizer",),
        evaluate=functools.partial(_validate, config, data, model),
        unit="tokens",
        units_per_example=config.model.context,
    )
    return Task(
        stages=(stage,),
        model=model,
        sampler=_sampler(config, model, config.length),
        begin=data.keep_tokenizer if record is None else None,
        condition=functools.partial(_condition, config, data, model),
        write=functools.partial(_write, data),
        show=functools.partial(_listing, data),
        evaluate=functools.partial(_evaluate, config, data, model),
        commands={"complete": functools.partial(_complete, data)},
        sizes=data.sizes(config.splits(context.phases)),
        data=data.digest(),
        results=(TOKENIZER, "samples.txt", "samples.npz", "trajectory.txt", COMPLETED),
        tokenizer=data.tokenizer,
    )


def _sampler(config, model, length):
    return config_lib.resolve(config.sampler.make)(config.sampler, model, length)


def _batch(config, data, step, shard, earlier):
    """Windows of one context, at random offsets."""
    del earlier
    train, length = config.train, config.model.context
    return data.train_stream.batch(train.seed, step, train.batch, length=length - 1, shard=shard)


def _condition(config, data, model, number) -> Condition:
    if not len(data.prompt):
        return Condition()
    return infill(model, config.length, [data.prompt.tolist()] * number)


def _validate(config, data, model, params) -> dict[str, float]:
    """A bound on the code length of the test split, in windows that know nothing of each other."""
    windows = data.test_windows
    choice, rows = config.evaluate, {"tokens": windows}
    nats = masked_rounds.bound_of(model, params, rows, choice.draws, choice.batch)
    nats = nats.astype(np.float64)
    error = nats.std(ddof=1) * np.sqrt(len(nats)) / windows.size if len(nats) > 1 else np.nan
    figures = data.per_unit(nats.sum(), windows.reshape(-1))
    return figures | {"nats_per_token_standard_error": float(error)}


def _evaluate(config, data, model, run: Run) -> dict[str, float]:
    """The bound of the test split, and how far the samples drawn last are of its kind."""
    texts = [_text(data, row) for row in run.kept_samples("tokens")["tokens"]]
    if not config.sample.prompt:
        texts = [text_files.from_first_word(text) for text in texts]
    return _validate(config, data, model, run.params) | text_files.score(texts, data.train_text)


def _text(data, tokens):
    return text_files.decode(data.tokenizer, None, tokens[:0], tokens)


def _listing(data, tokens):
    """Samples int32 [B, L] as one text."""
    return text_files.listing(_text(data, row) for row in tokens)


def _write(data: MaskedTextData, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the samples as text and arrays, and the way to the first one; shows some of them."""
    sampler = run.task.sampler
    run.keep_samples(tokens=tokens, nfe=sampler.nfe)
    run.keep_text("samples.txt", _listing(data, tokens))
    moments, rounds = masked_rounds.rounds_of(run, 1, _ROUNDS_SHOWN)
    mask, lines = run.task.model.mask, []
    for moment, (row,) in zip(moments, rounds, strict=True):
        shown = text_files.decode_with_masks(data.tokenizer, row, mask)
        lines.append(f"{'-' * 32} after round {moment + 1} of {sampler.steps}\n{shown}\n")
    run.keep_text("trajectory.txt", "".join(lines))
    text_files.show(_listing(data, tokens[:_SHOWN]))
    return {"sampled_tokens_per_second": report["samples_per_second"] * tokens.shape[1]}


def _complete(data: MaskedTextData, run: Run) -> dict:
    """Fills the holes of a text several times."""
    config, template, model = run.config, data.template, run.task.model
    sampler = _sampler(config, model, len(template))
    cond = infill(model, len(template), [template] * config.complete.fills)
    ours = sampling.sample_keys(config.sample.seed, 0, config.complete.fills)
    tokens = np.asarray(sampling.generate(sampler, run.params, ours, cond))
    lines = [f"given      {config.complete.text}"]
    lines += [f"completed  {_text(data, row)}" for row in tokens]
    whole = "\n".join(lines) + "\n"
    run.keep_text(COMPLETED, whole)
    text_files.show(whole)
    return {"nfe": sampler.nfe, "completed": len(tokens)}
