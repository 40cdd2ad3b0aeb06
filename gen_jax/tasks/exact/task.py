"""The exact comparison of strategies as a task: four families of networks, and their gaps."""

import functools

import jax
import numpy as np

from gen_jax import evaluation
from gen_jax.models.masked.schedules import SCHEDULES, Optimal
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.tasks.exact import facts as known_facts
from gen_jax.tasks.exact import measure as measures
from gen_jax.tasks.exact import report as reports
from gen_jax.tasks.exact.config import ExactConfig
from gen_jax.tasks.exact.networks import Networks, StackedModel, make_models
from gen_jax.trainables import ModelTrainable

__all__ = ["make"]

_SCHEDULES = ("cosine", "linear", "square_root")


def make(config: ExactConfig, context: Context) -> Task:
    """The task of a configuration, whose data are distributions and need not be read."""
    del context
    sets = measures.known_sets(config)
    models = make_models(config, next(iter(sets.values())).vocabulary)
    stages = [
        Stage(
            name=family,
            trainable=ModelTrainable(StackedModel(model, len(sets)), config.train),
            batch=functools.partial(_batch, config, sets),
            unit="sequences",
            units_per_example=len(sets),
        )
        for family, model in models.items()
    ]
    return Task(
        stages=tuple(stages),
        model=models,
        evaluate=functools.partial(_evaluate, config, sets, models),
        results=("gaps.png", "gaps.json"),
    )


def _batch(config, sets, step, shard, earlier):
    """This host's sequences of every set side by side, int32 [B, S, L]."""
    del earlier
    index, hosts = shard
    every = (dist.batch(config.train.seed, step, config.train.batch) for dist in sets.values())
    tokens = np.stack([one["tokens"] for one in every], axis=1)
    return {"tokens": np.array_split(tokens, hosts)[index]}


def _evaluate(config, sets, models, run: Run) -> dict:
    """Measures, prints and draws the gaps; leaves gaps.json and gaps.png."""
    tables = {}
    for place, (name, dist) in enumerate(sets.items()):
        tables[name] = _table(config, name, dist, _of_set(models, run.params, place, dist))
        reports.show(name, tables[name])
    facts = known_facts.facts(config)
    reports.show_facts(facts)
    findings = reports.findings(tables)
    print("\n" + "\n".join(findings))
    reports.figure(tables, run.workdir.path / "gaps.png")
    run.workdir.write_json("gaps.json", {"tables": tables, "facts": facts, "findings": findings})
    return {"sets": len(tables)}


def _of_set(models, params, place, dist):
    """The networks of one of the sets, out of the stacked ones."""
    return Networks(models, jax.tree.map(lambda leaf: leaf[place], params), dist.length)


def _table(config, name, dist, networks):
    """All gaps on one set."""
    schedules = {name: SCHEDULES[name] for name in _SCHEDULES}
    schedules["optimal"] = Optimal(tuple(map(float, dist.entropy_profile)))
    measure, params = measures.Measure(config, dist, networks), networks.params
    rows = [
        evaluation.kept_figures(functools.partial(measure.row, strategy), params)
        for strategy in measures.strategies(config.length, schedules)
    ]
    latent = functools.partial(measure.latent, measures.mixtures(config).get(name))
    rows.insert(1, evaluation.kept_figures(latent, params))
    limits = functools.partial(measure.limits, reports.LIMIT)
    return {
        "entropy": dist.entropy,
        "total_correlation": dist.total_correlation(),
        "valid": len(dist.support) < measure.dense.size,
        "repair_limits": evaluation.kept_figures(limits, ()),
        "rows": rows,
    }
