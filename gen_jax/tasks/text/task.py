"""Autoregressive models of text: what they are trained on, and how samples are shown and judged."""

import dataclasses
import functools
import time
from typing import Any

import numpy as np

from gen_jax import config as config_lib
from gen_jax import evaluation, interop, sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import AutoregressiveModel, SpeculativeOptions, make_prompts
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks import text_files
from gen_jax.tasks.text import speculation
from gen_jax.tasks.text.config import TextData, TextRunConfig
from gen_jax.tasks.text_source import TOKENIZER
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]

_SHOWN, _SHOWN_CHARACTERS = 3, 500


def make(config: TextRunConfig, context: Context) -> Task:
    """The task of a configuration; `context.data` is its `TextData`."""
    data, record, initial = context.data, context.records.get("model"), None
    model = AutoregressiveModel(TokenNetwork(data.model))
    if record is not None:
        data.check_record(record)
    elif config.pretrained:
        initial = _load_pretrained(config, data)
    training = "train" in context.phases
    stage = Stage(
        name="model",
        trainable=ModelTrainable(model, config.train),
        batch=functools.partial(_batch, config, data),
        record=data.record() if training else {},
        must_match=("tokenizer",),
        evaluate=functools.partial(_validate, config, data, model),
        initial=None if initial is None else lambda: initial,
        unit="tokens",
        units_per_example=config.model.context,
    )
    sampler, draft = None, None
    if "sample" in context.phases or config.train.preview_every:
        sampler, draft = _make_sampler(config, data, model)
    streamed = config.sample.number == 1 and not config.searches and draft is None
    draw = functools.partial(_stream, data) if streamed else None
    if draft is not None:
        draw = speculation.draw
    return Task(
        stages=(stage,),
        model=model,
        sampler=sampler,
        sampler_params=functools.partial(_with_draft, draft),
        begin=data.keep_tokenizer if record is None else None,
        condition=functools.partial(_prompts, model, data),
        micro_batch=1 if config.searches else None,  # a search finds one text
        draw=draw,
        write=functools.partial(_write, data, streamed),
        show=functools.partial(_listing, data),
        evaluate=functools.partial(_evaluate, config, data, model),
        commands={"export": functools.partial(_export, data)},
        sizes=data.sizes(config.splits(context.phases)),
        data=data.digest(),
        results=(TOKENIZER, "samples.txt", "samples.npz", "gpt2"),
        tokenizer=data.tokenizer,
    )


def _make_sampler(config, data, model):
    """The sampler, and the parameters of the draft that it reads, or None."""
    build, options = config_lib.resolve(config.sampler.make), config.sampler
    sizes = len(data.prompt), config.sample.tokens, data.eos
    if not isinstance(options, SpeculativeOptions):
        return build(options, model, *sizes), None
    draft = speculation.load_draft(options.draft, data.tokenizer)
    return build(options, model, draft.model, *sizes), draft.params


def _with_draft(draft, params):
    return params if draft is None else {"target": params, "draft": draft}


def _batch(config, data, step, shard, earlier):
    """Windows of one token more than the context, at random offsets."""
    del earlier
    train, length = config.train, config.model.context
    return data.train_stream.batch(train.seed, step, train.batch, length=length, shard=shard)


def _prompts(model, data, number) -> Condition:
    return make_prompts(model, [data.prompt] * number)


def _load_pretrained(config, data) -> Any:
    """The weights of a folder of transformers, which must be of our network."""
    model, params = interop.load_transformers(config.pretrained)
    ours, theirs = (config_lib.to_dict(_sizes(c)) for c in (data.model, model.network.config))
    differing = config_lib.differences(ours, theirs, ("dropout", "dtype"))
    if differing:
        raise ValueError(
            f"{config.pretrained} is another network than model ({'; '.join(differing)})"
        )
    return params


def _sizes(model):
    """With every size that follows from another written out."""
    return dataclasses.replace(
        model, kv_heads=model.key_heads, head_width=model.head_size, mlp_dim=model.mlp_size
    )


def _export(data, run: Run) -> dict:
    """Writes the averaged parameters as a folder of transformers."""
    path = run.workdir.path / "gpt2"
    interop.save_gpt2(path, data.model, run.params)
    if data.tokenizer.describe()["kind"] == "pretrained":
        data.tokenizer.save(path / TOKENIZER)
    return {"exported": str(path)}


def _validate(config, data, model, params) -> dict[str, float]:
    """The exact likelihood of the test split, in windows of one context each."""
    windows, counted = data.test_stream.windows(config.model.context)
    rows = {"tokens": windows, "length": counted}
    values = evaluation.log_prob(model, params, rows, config.evaluate.batch)
    nats = -values.astype(np.float64).sum()
    return data.per_unit(nats, data.test_stream.tokens[1:])


def _evaluate(config, data, model, run: Run) -> dict[str, float]:
    """The likelihood of the test split, and how far the samples drawn last are of its kind."""
    kept = run.kept_samples("tokens", "prompt")
    eos = int(kept["eos"]) if "eos" in kept else None
    texts = [text_files.decode(data.tokenizer, eos, kept["prompt"], row) for row in kept["tokens"]]
    return _validate(config, data, model, run.params) | text_files.score(texts, data.train_text)


def _write(data: TextData, streamed: bool, run: Run, tokens: np.ndarray, report: dict) -> dict:
    """Leaves the samples as text and arrays, and shows the first of them."""
    eos = data.eos
    new = sum(len(text_files.cut(row, eos)) for row in tokens)
    known = {} if eos is None else {"eos": eos}
    run.keep_samples(tokens=tokens, prompt=data.prompt, nfe=run.task.sampler.nfe, **known)
    texts = _texts(data, tokens)
    run.keep_text("samples.txt", text_files.listing(texts))
    for number, sample in enumerate([] if streamed else texts[:_SHOWN]):
        cut = "..." if len(sample) > _SHOWN_CHARACTERS else ""
        text_files.show(f"{text_files.title(number)}\n{sample[:_SHOWN_CHARACTERS]}{cut}\n")
    return {"sampled_tokens_per_second": new * report["samples_per_second"] / len(tokens)}


def _texts(data, tokens):
    return [text_files.decode(data.tokenizer, data.eos, data.prompt, row) for row in tokens]


def _listing(data, tokens):
    """Samples int32 [B, N] as one text."""
    return text_files.listing(_texts(data, tokens))


def _stream(data: TextData, run: Run) -> tuple[np.ndarray, dict]:
    """The one sample, int32 [1, N], shown while it is drawn; its figures."""
    sampler, eos = run.task.sampler, data.eos
    keys = sampling.sample_keys(run.config.sample.seed, 0, 1)
    states = functools.partial(sampling.stream, sampler, run.params, keys, run.task.condition(1))
    began = time.perf_counter()
    next(states())  # compiles
    compiled = time.perf_counter()
    times, row = [], np.zeros(sampler.tokens, np.int32)

    def tokens():
        for done, state in enumerate(states(), 1):
            row[:done] = sampler.new_tokens(state)[0, :done]
            times.append(time.perf_counter() - compiled)
            yield row[done - 1]
        if eos is not None:
            row[done:] = eos

    for piece in text_files.pieces(data.tokenizer, eos, data.prompt, tokens()):
        text_files.show(piece)
    text_files.show("\n")
    return row[None], {
        "nfe": sampler.nfe,
        "samples": 1,
        "sample_compile_seconds": compiled - began,
        "first_token_seconds": times[0],
        "sampling_latency_seconds": times[-1],
        "samples_per_second": 1 / times[-1],
    }
