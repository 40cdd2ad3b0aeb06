"""The phases of a run as functions of its task: train, sample, evaluate, and a task's own."""

import contextlib
import functools
import time
from typing import Any

import jax
import numpy as np

from gen_jax import (
    checkpoint,
    cli,
    evaluation,
    hosts,
    parallel,
    parts,
    pictures,
    signals,
    training,
)
from gen_jax import config as config_lib
from gen_jax.config import RunConfig
from gen_jax.task import Context, Run, Stage, Task
from gen_jax.workdir import MetricsLog, Workdir

__all__ = ["evaluate", "make_task", "restore", "run", "sample", "train"]


def run(name: str, config: RunConfig, workdir: Workdir, phases: tuple[str, ...], data: Any) -> None:
    """Runs phases one after the other, adds what each measures to summary.json, and prints it.

    What was not measured again stays in that file.

    Args:
      name: of the experiment.
      config: of the run.
      workdir: its directory, held by the caller unless several hosts train.
      phases: the commands, in order.
      data: of `config.load` for these phases.
    """
    command = "all" if len(phases) > 1 else phases[0]
    resume = cli.command_line(name, [command, "--workdir", str(config.workdir)])
    hosts.start(config.distributed, resume)
    main = jax.process_index() == 0
    several = bool(config.distributed.coordinator)
    claimed = cli.claim(workdir, config) if several and main else None
    with claimed or contextlib.nullcontext():
        hosts.meet("the work directory is there")
        task = make_task(config, workdir, phases, data)
        for path in (workdir.path / name for name in ("summary.json", *task.results)):
            if path.suffix and path.is_dir():  # results without one are folders
                raise IsADirectoryError(f"{path} is a directory; move it away")
        if main:
            print(f"{name}: {parallel.device_banner()}; {workdir.path}")
        current, report = Run(name, config, workdir, phases, task), {}
        if "train" in phases:
            report |= train(current)
        if phases != ("train",):
            current.params, current.step = restore(current)
            report["step"] = current.step
            unknown = not (workdir.path / "config.json").exists()
            if main and unknown:  # of published weights, or lost
                cli.store(workdir, config)
        commands = task.commands | {"sample": sample, "evaluate": evaluate}
        for phase in phases:
            if phase != "train":
                hosts.meet(f"the phase {phase} begins")
                with _naming(phase):
                    report |= commands[phase](current)
            if main:
                figures = report | {"wall_seconds": time.perf_counter() - current.began}
                workdir.write_json("summary.json", cli.stored_summary(workdir) | figures)
        if main:
            _summarise(current, figures)
            parts.clear(workdir.path)


@contextlib.contextmanager
def _naming(phase):
    """Names the phase in the message of a signal that stops it."""
    try:
        yield
    except signals.Stopped as stop:
        stop.place = stop.place or f" in the phase {phase}"
        raise


def make_task(config: RunConfig, workdir: Workdir, phases: tuple[str, ...], data: Any) -> Task:
    """The task of a configuration, made for these phases."""
    records, training = {}, "train" in phases
    for folder in sorted(path for path in workdir.path.glob("*") if path.is_dir()):
        if checkpoint.steps(folder / "checkpoints"):
            step = _wanted_step(config, training)
            restored = checkpoint.restore(folder / "checkpoints", {}, step=step)
            records[folder.name] = restored.record
    if not (training or records or config.pretrained):
        raise FileNotFoundError(f"no checkpoint in {workdir.path} yet; run the command `train`")
    make = config_lib.resolve(config.make_task)
    task = make(config, Context(workdir, phases, records, data))
    # Checkpoints of older versions do not tell.
    if training and any(known.get("data", task.data) != task.data for known in records.values()):
        raise ValueError(
            f"the data is not what the run in {workdir.path} was trained with: restore it, or "
            "choose another --workdir"
        )
    return task


def _wanted_step(config, training):
    """The step of the checkpoint that config.sample asks for; None for the latest whole one."""
    step = getattr(getattr(config, "sample", None), "checkpoint", -1)
    return None if training or step < 0 else step


def train(run: Run) -> dict[str, Any]:
    """Trains every stage from where the work directory left off; what it took.

    Raises:
      training.Interrupted: by a signal; the step was finished and saved.
    """
    report, earlier, initial = {}, {}, _begin(run)
    for stage in run.task.stages:
        trained = _train_stage(run, stage, earlier, initial.pop(stage.name))
        several = len(run.task.stages) > 1
        figures = _figures(stage, trained)
        report |= {f"{stage.name}_{name}": v for name, v in figures.items()} if several else figures
        earlier[stage.name] = trained.averaged
    return report


def _begin(run):
    """Makes all checks of the stages, and only then stores what the run is.

    Returns:
      What each stage starts from, by name; None for fresh parameters.
    """
    for stage in run.task.stages:
        samples = run.task.show is not None and stage is run.task.stages[-1]
        if stage.training(run.config).preview_every and not (samples or stage.show):
            raise ValueError(
                "this experiment shows no samples while it trains: leave preview_every"
            )
    initial = {stage.name: _initial(run, stage) for stage in run.task.stages}
    for stage in run.task.stages:
        given = initial[stage.name] is not None
        config = stage.training(run.config)
        training.check_start(config, stage.trainable, parallel.data_mesh(), given)
        MetricsLog.read(run.workdir.stage(stage.name).path / "metrics.jsonl")
    if jax.process_index() == 0:
        cli.store(run.workdir, run.config)
        if run.task.begin is not None:
            run.task.begin(run)
    return initial


def _initial(run, stage):
    if checkpoint.steps(run.workdir.stage(stage.name).checkpoints):
        return None  # the stage goes on from there
    if not run.config.init_from:
        return stage.initial() if stage.initial is not None else None
    source = Workdir(run.config.init_from).stage(stage.name)
    if not checkpoint.steps(source.checkpoints):
        raise FileNotFoundError(f"no checkpoint in {source.path} to start from")
    restored = checkpoint.restore(source.checkpoints, {"ema": stage.abstract_params()})
    for name in stage.must_match:
        if restored.record.get(name) != stage.record[name]:
            raise ValueError(
                f"the run in {run.config.init_from} was trained with another {name}, by which "
                "its parameters are read"
            )
    return restored.trees["ema"]


def _train_stage(run, stage, earlier, initial):
    shard = (jax.process_index(), jax.process_count())
    config = stage.training(run.config)
    return training.fit(
        config,
        stage.trainable,
        lambda step: stage.batch(step, shard, earlier),
        run.workdir.stage(stage.name),
        mesh=parallel.data_mesh(),
        record={"config": cli.stored_form(run.config), "data": run.task.data} | dict(stage.record),
        evaluate=stage.evaluate,
        preview=functools.partial(_preview, run, stage, earlier),
        initial=initial,
    )


def _preview(run, stage, earlier, step, averaged):
    """Shows what the stage has learned, by samples or its own way, in the folder previews."""
    several = len(run.task.stages) > 1
    if stage.show is not None:
        shown = stage.show(jax.device_put(jax.device_get(averaged)))
    else:
        params = {**earlier, stage.name: averaged} if several else averaged
        params, number = jax.device_put(jax.device_get(params)), stage.training(run.config).preview
        chunks = run.generate(params, number, progress=False)
        shown = run.task.show(np.concatenate([chunk.samples for chunk in chunks]))
    suffix = "txt" if isinstance(shown, str) else "png"
    name = f"{stage.name + '_' if several else ''}{step:08d}.{suffix}"
    path = run.workdir.path / "previews"
    if isinstance(shown, str):
        run.keep_text(f"previews/{name}", shown)
    else:
        pictures.save_png(path / name, shown)
    return shown


def _figures(stage, trained):
    size = sum(leaf.size for leaf in jax.tree.leaves(trained.averaged))
    report = {"parameters": size, "steps": trained.step}
    if trained.start == trained.step:  # nothing was left to do
        return report
    rate = trained.examples_per_second * stage.units_per_example
    return report | {
        "train_compile_seconds": trained.compile_seconds,
        "train_seconds": trained.seconds,
        f"{stage.unit}_per_second": rate,
    }


def restore(run: Run) -> tuple[Any, int]:
    """The averaged parameters to sample from, on the device, and their step.

    Raises:
      FileNotFoundError: there is no checkpoint, or not the one that config.sample asks for.
    """
    restored = {stage.name: _restore_stage(run, stage) for stage in run.task.stages}
    step = max(step for _, step in restored.values())
    params = {name: params for name, (params, _) in restored.items()}
    return (params if len(params) > 1 else next(iter(params.values()))), step


def _restore_stage(run: Run, stage: Stage):
    folder = run.workdir.stage(stage.name).checkpoints
    if stage.initial is not None and not checkpoint.steps(folder):
        return jax.device_put(stage.initial()), 0
    step = _wanted_step(run.config, False)
    restored = checkpoint.restore(folder, {"ema": stage.abstract_params()}, step=step)
    return jax.device_put(restored.trees["ema"]), restored.step


def sample(run: Run) -> dict[str, Any]:
    """Draws samples and writes them; rates and latency.

    Several hosts draw a share each, in parts that the first one puts together.
    """
    if run.config.sample.of:
        return run.draw_part()
    if jax.process_count() > 1:
        run.draw_share()
        hosts.meet("all samples are drawn")
        if jax.process_index() > 0:
            return {}
    samples, report = run.task.draw(run) if run.task.draw is not None else run.draw()
    return report | run.task.write(run, samples, report)


def evaluate(run: Run) -> dict[str, Any]:
    """What the task measures of the trained model and of its samples.

    Rows of the test set are shared among hosts; what is measured of them is kept until the run is
    done.
    """
    with evaluation.in_parts(parts.Parts(run.workdir.path, run.request("evaluate"))):
        report = run.task.evaluate(run)
    hosts.meet("all figures are made")  # before the first of them removes the parts
    return report


def _summarise(run, report):
    """Prints what was measured, and names the files that are left."""
    cli.print_summary(f"{run.name}: {', '.join(run.phases)}", report)
    stages = [f"{stage.name}/metrics.jsonl" for stage in run.task.stages]
    names = ("config.json", *stages, *run.task.results, "summary.json")
    left = [name for name in names if (run.workdir.path / name).exists()]
    print(f"\nin {run.workdir.path}: {', '.join(left)}")
