"""What the tasks of masked models share: the bound of test rows, and rounds as they go."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from gen_jax import evaluation, keys, sampling
from gen_jax.models.masked import (
    MaskedModel,
    OrderedGroups,
    estimate_bound,
    log_prob_in_order,
)
from gen_jax.task import Run

__all__ = ["bound_of", "nats_in_order", "rounds_of"]


def bound_of(
    model: MaskedModel, params: Any, rows: dict[str, np.ndarray], draws: int, batch: int
) -> Float[np.ndarray, " N"]:
    """The estimated bound of each row, in nats; row i is drawn with key i of evaluation.

    Args:
      model: of the tokens.
      params: its parameters.
      rows: "tokens" int [N, L], and "label" for a conditional model.
      draws: evaluations for each row.
      batch: rows at a time.
    """
    rows = rows | {"index": np.arange(len(rows["tokens"]), dtype=np.int32)}
    return evaluation.map_rows(functools.partial(_bound, model, draws), params, rows, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bound(model, draws, params, rows):
    ours = keys.of_items(keys.root(0, "evaluate"), rows.pop("index"))
    return estimate_bound(model, params, rows, ours, draws)


def nats_in_order(
    sampler: OrderedGroups, params: Any, rows: dict[str, np.ndarray], batch: int
) -> Float[np.ndarray, " N"]:
    """-log p of each row, in nats: exactly what a sampler with an order of its own draws it with.

    Args:
      sampler: one with an order that is the same for all samples; its temperature is not read.
      params: of its model.
      rows: "tokens" int [N, L], and "label" for a conditional model.
      batch: rows at a time.
    """
    return -evaluation.map_rows(functools.partial(_in_order, sampler), params, rows, batch)


@functools.partial(jax.jit, static_argnums=0)
def _in_order(sampler, params, rows):
    cond = {name: rows[name] for name in rows if name != "tokens"}
    order, sizes = sampler.order, sampler.schedule.sizes(sampler.length, sampler.rounds)
    return log_prob_in_order(sampler.model, params, rows["tokens"], np.array(order), sizes, cond)


def rounds_of(
    run: Run, number: int, most: int
) -> tuple[Int[np.ndarray, " rounds"], Int[np.ndarray, "rounds {number} L"]]:
    """The first samples of a run on the way, after at most `most` rounds, evenly chosen.

    Returns:
      The rounds, counted from 0, and the tokens after each, where a hidden one is the mask.
    """
    sampler = run.task.sampler
    ours = sampling.sample_keys(run.config.sample.seed, 0, number)
    _, tokens = sampling.generate(
        sampler, run.params, ours, run.task.condition(number), trajectory=_tokens_of
    )
    chosen = np.unique(np.linspace(0, sampler.steps - 1, most).round().astype(int))
    return chosen, np.asarray(tokens)[chosen]


def _tokens_of(state):
    return state.tokens
