"""A trained run as objects: its model, parameters, sampler and tokenizer."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

from gen_jax import cli, runs
from gen_jax.condition import Condition
from gen_jax.config import RunConfig
from gen_jax.sampling import Sampler
from gen_jax.task import Run
from gen_jax.workdir import Workdir

__all__ = ["Loaded", "load"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained run.

    Attributes:
      model: what was trained; a dict by stage where a run trains several.
      params: what the sampler reads: its averaged parameters, on the device; with speculative
        decoding {"target": those, "draft": the draft's}.
      sampler: the strategy that the run's configuration describes, or None.
      condition: condition(n) is what the run conditions its first n samples on.
      tokenizer: of text, or None.
      show: show(samples) is one picture uint8 [height, width, 3] or text of samples; None where
        there is none.
      config: of the run.
      step: of the checkpoint.
    """

    model: Any
    params: Any
    sampler: Sampler | None
    condition: Callable[[int], Condition]
    tokenizer: Any
    show: Callable[[Any], Any] | None
    config: RunConfig
    step: int


def load(workdir: str | os.PathLike, **changes: Any) -> Loaded:
    """Loads the run in a work directory.

    Args:
      workdir: of a run of any experiment.
      **changes: fields of its configuration to replace, say `sampler=DDIM(steps=20)`; those of
        `config.resumable` alone.

    Raises:
      FileNotFoundError: there is no run, or it has no checkpoint yet.
      ValueError: its files are not what they should be, or a change is not possible.
    """
    path = pathlib.Path(workdir).expanduser()
    config = cli.stored_run(path)
    if config is None:
        raise FileNotFoundError(f"no run in {path}; train one first")
    config, opened = _changed(config, changes), Workdir(path)
    phases = ("sample",)  # which reads no more data than samples need
    data = config.load(path, phases)
    made = runs.make_task(config, opened, phases, data)
    params, step = runs.restore(Run(config.task, config, opened, phases, made))
    condition = made.condition or (lambda number: Condition())
    params = made.sampler_params(params)
    return Loaded(
        model=made.model,
        params=params,
        sampler=made.sampler,
        condition=condition,
        tokenizer=made.tokenizer,
        show=made.show,
        config=config,
        step=step,
    )


def _changed(config, changes):
    """The configuration with these fields, which must not change what was learned."""
    names = {field.name for field in dataclasses.fields(config)}
    for name in changes:
        if name not in names:
            raise ValueError(f"{name!r} is no field of {type(config).__name__}")
        if name not in config.resumable and f"{name}." not in config.resumable:
            raise ValueError(f"{name!r} is what was learned; train another run to change it")
    return dataclasses.replace(config, **changes)
