"""Translation models: what they are trained on, how they translate, and how that is judged."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from gen_jax import config as config_lib
from gen_jax import evaluation, keys, sampling
from gen_jax.condition import Condition
from gen_jax.data.synonyms import Synonyms
from gen_jax.data.translation import Pairs
from gen_jax.metrics import translation as metrics
from gen_jax.models.autoregressive import AutoregressiveModel
from gen_jax.models.masked import infill
from gen_jax.models.parallel import (
    CTCModel,
    CTCSampler,
    ParallelModel,
    ParallelSampler,
    one_shot,
)
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.sampling import Sampler
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks.translation.config import TOKENIZER, TranslationData, TranslationRunConfig
from gen_jax.trainables import ModelTrainable

__all__ = ["DISTILLED", "make", "make_model", "make_sampler", "source_condition"]

DISTILLED, COMPLETED = "distilled.txt", "completed.txt"
_SHOWN = 4


def make(config: TranslationRunConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` is its `TranslationData`."""
    data, record = context.data, context.records.get("model")
    model, training = make_model(config, data), "train" in context.phases
    if record is not None:
        _check_record(data, record, context)
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(_batch, config, data),
        record={"tokenizer": data.tokenizer.describe()} if training else {},
        must_match=("tokenizer",),
        evaluate=functools.partial(_validate, config, data),
        unit="pairs",
    )
    sampled = "sample" in context.phases or config.train.preview_every > 0
    return Task(
        stages=(stage,),
        model=model,
        sampler=make_sampler(config, model, data.tokenizer.eos, config.data.max_length),
        begin=functools.partial(_begin, config, data, record is None),
        condition=functools.partial(_condition, config, data) if sampled else None,
        number=len(data.pairs(config.sample.split)) if sampled else None,
        write=functools.partial(_write, config, data),
        show=functools.partial(_listing, config, data),
        evaluate=functools.partial(_evaluate, config, data),
        sizes={"train_pairs": len(data.pairs("train"))} if training else {},
        data=_digest(data) if training else "",
        commands={
            "distill": functools.partial(_distill, config, data),
            "complete": functools.partial(_complete, config, data),
        },
        results=(TOKENIZER, "translations.txt", "samples.npz", DISTILLED, COMPLETED),
        tokenizer=data.tokenizer,
    )


def make_model(
    config: TranslationRunConfig,
    data: TranslationData,
    *,
    dropout: float | None = None,
    smoothing: float | None = None,
) -> AutoregressiveModel | ParallelModel | CTCModel:
    """The model of a strategy; with dropout and smoothing of its own where they are given."""
    sizes, most = data.model, config.data.max_length
    if dropout is not None:
        sizes = dataclasses.replace(sizes, dropout=dropout)
    smoothing = config.smoothing if smoothing is None else smoothing
    copies = config.copies and config.strategy != "ar"
    network = EncoderDecoder(sizes, config.encoder_layers, copies)
    if config.strategy == "ar":
        return AutoregressiveModel(network, smoothing=smoothing)
    if config.strategy == "ctc":
        return CTCModel(network, config.ctc_factor)
    mask = config.mask if config.strategy == "masked" else None
    return ParallelModel(network, most, latent=config.latent, mask=mask, smoothing=smoothing)


def make_sampler(
    config: TranslationRunConfig,
    model: AutoregressiveModel | ParallelModel | CTCModel,
    eos: int,
    max_length: int,
) -> Sampler:
    """The sampler that config.decoding describes, of targets of at most `max_length` tokens.

    CTC has columns by the source instead.
    """
    options, sample = config.decoding, config.sample
    if config.strategy == "ctc":
        return CTCSampler(model, eos)
    if config.strategy == "ar":
        return config_lib.resolve(options.make)(options, model, 0, max_length, eos)
    if config.strategy == "one_shot":
        inner = one_shot(model, options.temperature, max_length)
    else:
        inner = config_lib.resolve(options.make)(options, model.denoiser, max_length)
    lengths = min(sample.lengths, max_length)
    return ParallelSampler(model, inner, lengths, eos, sample.latent_temperature)


def source_condition(sources: dict[str, np.ndarray], number: int) -> Condition:
    """The first sources of `Pairs.all`."""
    return Condition(
        source=sources["source"][:number], source_length=sources["source_length"][:number]
    )


def _condition(config, data, number):
    return source_condition(data.pairs(config.sample.split).all(config.data.max_length), number)


def _begin(config, data, fresh, run):
    """Leaves the tokenizer of a fresh run, and says which pairs are not trained on."""
    if fresh:
        data.tokenizer.save(run.workdir.path / TOKENIZER)
    if left := data.pairs("train").left_out:
        most = config.data.max_length
        print(f"{left} training pairs are longer than {most} tokens and left out")


def _digest(data):
    """Of the sources and the targets that are trained on."""
    lines = [line for side in data.texts("train") for line in side]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_record(data, record, context):
    """Refuses to go on with another tokenizer."""
    path = context.workdir.path
    if record["tokenizer"] != data.tokenizer.describe():
        raise ValueError(
            f"{path / TOKENIZER} is not the tokenizer that the checkpoint was trained with; "
            "restore that file"
        )


def _batch(config, data, step, shard, earlier):
    """Pairs of about one length."""
    del earlier
    train = config.train
    return _named(data.pairs("train").batch(train.seed, step, train.batch, shard=shard))


def _named(batch: dict) -> dict:
    """A batch of pairs under the names that the losses read."""
    names = {"target": "tokens"}
    return {names.get(name, name): leaf for name, leaf in batch.items()}


def _validate(config, data, params) -> dict[str, float]:
    """The loss of the validation pairs, without dropout and smoothing, in nats per token."""
    model, rows = make_model(config, data, dropout=0.0, smoothing=0.0), _validation(config, data)
    batch, totals = config.evaluate.batch, {}
    found = evaluation.map_batches(functools.partial(_loss, model), params, rows, batch)
    for number, (value, further) in enumerate(found):
        counted = int(rows["length"][number * batch :][:batch].sum())
        for name, one in ({"nats_per_token": value} | further).items():
            totals[name] = totals.get(name, 0.0) + float(one) * counted
    tokens = int(rows["length"].sum())
    return {name: total / tokens for name, total in totals.items()}


@functools.partial(jax.jit, static_argnums=0)
def _loss(model, params, rows):
    return model.loss(params, *_with_keys(rows))


def _validation(config, data):
    """The validation pairs, and the number of each."""
    arrays = _named(data.pairs("validation").all(config.data.max_length))
    return arrays | {"index": np.arange(len(arrays["tokens"]), dtype=np.uint32)}


def _with_keys(rows):
    """A batch of validation pairs, and their keys."""
    index = rows.pop("index")
    return rows, keys.of_items(keys.root(0, "evaluate"), index)


def _nats_per_pair(config, data, model, params, nats_per_token: float) -> float:
    """Minus the log-probability of a validation target, length included, or a bound on it.

    Of a masked model it is the bound of drawing its tokens one by one in a random order.
    """
    pairs = data.pairs("validation")
    if config.strategy != "masked":
        return nats_per_token * int(pairs.length.sum()) / len(pairs)
    f, rows = functools.partial(_masked_nats, model), _validation(config, data)
    found = evaluation.map_batches(f, params, rows, config.evaluate.batch)
    return sum(map(float, found)) / len(pairs)


@functools.partial(jax.jit, static_argnums=0)
def _masked_nats(model, params, rows):
    batch, ours = _with_keys(rows)
    terms = model.denoiser.bound_terms(params["network"], batch, ours)
    return (terms.sum(-1) + model.length_nats(params, batch)).sum()


def _write(config, data, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the translations as text and arrays, and shows the first of them."""
    del report
    split = config.sample.split
    run.keep_samples(tokens=tokens, split=split, nfe=run.task.sampler.nfe)
    run.keep_text("translations.txt", _listing(config, data, tokens))
    print(_listing(config, data, tokens[:_SHOWN]))
    return {}


def _listing(config, data, tokens):
    """Translations int32 [B, L] of the first sources as one text."""
    sources, targets = (side[: len(tokens)] for side in data.texts(config.sample.split))
    rows = zip(sources, targets, data.texts_of(tokens), strict=True)
    return "\n".join(
        f"source      {source}\nreference   {target}\ntranslation {hypothesis}\n"
        for source, target, hypothesis in rows
    )


def _evaluate(config, data, run: Run) -> dict[str, Any]:
    """How good the translations drawn last are, and the loss of the validation pairs."""
    kept = run.kept_samples("tokens", "split")
    tokens, split = kept["tokens"], str(kept["split"])
    hypotheses, eos = data.texts_of(tokens), data.tokenizer.eos
    sources, targets = (side[: len(tokens)] for side in data.texts(split))
    lengths = np.where((tokens == eos).any(1), (tokens == eos).argmax(1) + 1, tokens.shape[1])
    report = _validate(config, data, run.params)
    nats = _nats_per_pair(config, data, run.task.model, run.params, report["nats_per_token"])
    report["nats_per_pair"] = nats
    if config.data.name == "synonyms":
        measure = functools.partial(_exactly, config, data, nats, sources, hypotheses)
    else:
        measure = functools.partial(_bleu, hypotheses, targets)
    report |= evaluation.kept_figures(measure, [nats, sources, targets, hypotheses])
    rows = zip(tokens, lengths, strict=True)
    report["repeated_token_rate"] = metrics.repeated_token_rate(
        [row[: length - 1] for row, length in rows]
    )
    found = metrics.length_accuracy(lengths, data.pairs(split).length[: len(tokens)])
    return report | {f"length_{name}": value for name, value in found.items()}


def _bleu(hypotheses, targets):
    return {
        "bleu": metrics.bleu(hypotheses, targets),
        "bleu_signature": metrics.bleu_signature(),
    }


def _exactly(config, data, nats, sources, hypotheses):
    """What is known of the procedural task, beside what the model does."""
    task, (ours, targets) = Synonyms.of(config.data), data.texts("validation")
    entropy = -np.mean([task.log_prob(*pair) for pair in zip(ours, targets, strict=True)])
    correlation = np.mean([task.conditional_total_correlation(source) for source in ours])
    mass = np.mean([task.one_shot_valid_mass(source) for source in sources])
    left = metrics.conditional_total_correlation_left(nats, entropy)
    return {
        "exact_accuracy": float(task.accuracy(sources, hypotheses)),
        "one_shot_valid_mass": float(mass),
        "conditional_entropy": float(entropy),
        "conditional_total_correlation": float(correlation),
        "conditional_total_correlation_left": float(left),
    }


def _distill(config, data, run: Run) -> dict:
    """Translates all training sources, one line each: targets for another run."""
    sources, _ = data.texts("train")
    most, sample = config.data.max_length, config.sample
    pairs = Pairs.encode(data.tokenizer, sources, sources, most, long="truncate")
    order = np.argsort(pairs.source_length, kind="stable")  # so that a batch ends together
    whole = {name: leaf[order] for name, leaf in pairs.all(most).items()}
    cond = source_condition(whole, len(order))
    chunks = sampling.generate_many(
        run.task.sampler,
        run.params,
        sample.seed,
        len(order),
        cond=cond,
        micro_batch=sample.micro_batch,
    )
    texts = data.texts_of(np.concatenate([chunk.samples for chunk in chunks]))
    lines = [""] * len(texts)
    for place, text in zip(order, texts, strict=True):
        lines[place] = text
    run.keep_text(DISTILLED, "\n".join(lines) + "\n")
    return {"distilled": len(lines)}


def _complete(config, data, run: Run) -> dict:
    """Fills the holes of a target, or goes on from its beginning, in rounds."""
    pair, given, is_open = data.completion
    sampler, most = run.task.sampler, config.data.max_length
    lengths = None if is_open else [len(given)]
    known = infill(run.task.model.denoiser, most, [given], lengths)
    source = source_condition(pair.all(most), 1)
    cond = known.replace(source=source.source, source_length=source.source_length)
    keys_of_sample = sampling.sample_keys(config.sample.seed, 0, 1)
    tokens = sampling.generate(sampler, run.params, keys_of_sample, cond)
    choice, (text,) = config.complete, data.texts_of(np.asarray(tokens))
    shown = f"source      {choice.source}\ngiven       {choice.target}\ntranslation {text}\n"
    run.keep_text(COMPLETED, shown)
    print(shown)
    return {"nfe": sampler.nfe}
