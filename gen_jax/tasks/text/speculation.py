"""Speculative decoding of text: the draft of another run, and what it gains over plain decoding."""

import numpy as np

from gen_jax import loading, sampling
from gen_jax.data.tokenizers import Tokenizer
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.task import Run

__all__ = ["draw", "load_draft"]

_TIMES = 5  # samples that both ways draw in turn


def load_draft(workdir: str, tokenizer: Tokenizer) -> loading.Loaded:
    """The run of a smaller model, which must read the same tokens.

    Raises:
      FileNotFoundError: there is no run, or it has no checkpoint yet.
      ValueError: it is no autoregressive model of text, or of other tokens.
    """
    draft = loading.load(workdir)
    if not isinstance(draft.model, AutoregressiveModel) or draft.tokenizer is None:
        raise ValueError(
            f"the run in {workdir} is no autoregressive model of text: it cannot draft"
        )
    if draft.tokenizer.describe()["digest"] != tokenizer.describe()["digest"]:
        raise ValueError(
            f"the run in {workdir} has another tokenizer: a draft must read the same tokens"
        )
    return draft


def draw(run: Run) -> tuple[np.ndarray, dict]:
    """The samples of speculative decoding; its figures beside those of plain decoding.

    Both draw the same samples one at a time, in turn, after compiling; rates are medians.
    """
    samples, report = run.draw()
    sampler, config, cond = run.task.sampler, run.config.sample, run.task.condition(1)
    params = run.task.sampler_params(run.params)
    plain = AutoregressiveSampler(
        sampler.model, sampler.prompt_length, sampler.tokens, sampler.options, sampler.eos
    )
    ways = {"speculative": (sampler, params), "plain": (plain, run.params)}
    seconds = {name: [] for name in ways}
    for number in range(_TIMES):
        for name, (way, theirs) in ways.items():
            (chunk,) = sampling.generate_many(
                way, theirs, config.seed, 1, start=number, cond=cond, micro_batch=1, progress=False
            )
            seconds[name].append(chunk.seconds)
    rates = {name: sampler.tokens / float(np.median(some)) for name, some in seconds.items()}
    keys = sampling.sample_keys(config.seed, 0, len(samples))
    states = sampling.stream(
        sampler, params, keys, run.task.condition(len(samples)), every=sampler.steps
    )
    (end,) = states
    return samples, report | {
        "accepted_share_of_drafted": float(sampler.accepted(end)),
        "evaluations_of_the_large_model": float(np.mean(end.rounds)),
        "tokens_per_second_alone": rates["speculative"],
        "tokens_per_second_alone_plain": rates["plain"],
        "times_plain_decoding": rates["speculative"] / rates["plain"],
    }
