"""How a run of any family goes: train, sample from the average, evaluate, export, summarise.

A family of models subclasses `Run` and gives its hooks; the experiments give presets. jax is
imported by the commands, not by this module, so that bad options are refused first.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import common
from gen_jax import config as config_lib
from gen_jax.config import to_dict
from gen_jax.workdir import Workdir, WorkdirError

PHASES = ("train", "sample", "evaluate", "export")

# What may change when a run is resumed: how long, how often, how to sample; not what is learned.
FREE = (
    "workdir", "sample.", "evaluate.", "distributed.", "data.dir", "pretrained", "train.log_every",
    "train.checkpoint_every", "train.evaluate_every", "train.keep", "train.max_skipped",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What to draw; families add how."""

    number: int = 64
    """Samples to draw."""
    seed: int = 0
    """Seed of the samples; sample i depends on the seed and i alone."""
    micro_batch: int = 64
    """Samples drawn at a time; 1 gives the lowest latency."""
    checkpoint: int = -1
    """Step of the checkpoint to sample and evaluate; -1 for the latest that is whole."""

    def __post_init__(self):
        if self.number < 1 or self.micro_batch < 1:
            raise ValueError("sample.number and sample.micro_batch must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sample.seed must be in [0, 2**32), got {self.seed}")


class Run:
    """One run of an experiment in its work directory.

    A family gives these methods:
      check(): refuses data (of `splits`) that does not fit the configuration, before jax loads.
      init_params(key): initial parameters, for the data of the training split.
      loss(params, batch, keys): a `training.Loss`.
      train_batch(step, shard): part shard[0] of shard[1] of the batch of a step, in NumPy.
      record(): JSON values to keep in each checkpoint beside the configuration.
      template(record): shapes and dtypes of the parameters of a checkpoint with this record.
      published(): the parameters in the folder config.pretrained, and a record for them.
      validate(params): metrics every config.train.evaluate_every steps, of the average.
      sample(params), evaluate(params), export(params): the other phases; what goes into the
        summary. They find the checkpoint's step in `step`, its record in `stored`.

    Args:
      name: of the experiment's module.
      config: has the fields workdir, train, sample (a `SampleConfig`), evaluate, distributed and
        pretrained.
      workdir: its directory, locked by the caller.
      phases: those to come; the data that they need is read, and checked, at once.

    Raises:
      ValueError, FileNotFoundError: the data or the directory do not fit the configuration.
    """

    unit, units_per_example = "images", 1  # what the rate of training counts
    results: tuple[str, ...] = ()  # what the family's phases leave in the work directory
    free: tuple[str, ...] = FREE  # keys, or prefixes ending in a dot, that may change on resume

    def __init__(self, name: str, config, workdir: Workdir, phases: tuple[str, ...]):
        self.name, self.config, self.workdir = name, config, workdir
        self.phases, self.began = phases, time.perf_counter()
        testing = "evaluate" in phases or ("train" in phases and config.train.evaluate_every)
        self.splits = ("train",) * ("train" in phases) + ("test",) * bool(testing)
        self.check()
        from gen_jax import parallel

        if is_main(config):
            print(f"{name}: {parallel.device_banner()}; {workdir.path}")

    def train(self) -> dict:
        """Trains from where the work directory left off; what it took."""
        import jax

        from gen_jax import keys, parallel, training

        shard = (jax.process_index(), jax.process_count())
        params = self.init_params(keys.root(self.config.train.seed, "init"))
        if self.config.pretrained:
            params, _ = self.published()
        try:
            trained = training.fit(
                self.config.train, self.loss, params, lambda step: self.train_batch(step, shard),
                self.workdir, mesh=parallel.data_mesh(),
                record={"config": to_dict(self.config)} | self.record(),
                evaluate=lambda state: self.validate(state.ema),
            )  # fmt: skip
        except training.Interrupted as stop:
            command = common.resume_command(self.name, self.config)
            print(f"{stop}; saved. Resume with:\n  {command}", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        report = {"parameters": size, "steps": int(trained.state.step)}
        if trained.start == report["steps"]:  # nothing was left to do
            return report
        return report | {
            "train_compile_seconds": trained.compile_seconds,
            "train_seconds": trained.seconds,
            f"{self.unit}_per_second": trained.examples_per_second * self.units_per_example,
        }

    def restore(self):
        """The averaged parameters to sample from, on the device; sets `step` and `stored`."""
        import jax

        from gen_jax import checkpoint

        folder, step = self.workdir.checkpoints, self.config.sample.checkpoint
        if self.config.pretrained and not checkpoint.steps(folder):
            params, self.stored = self.published()
            self.step = 0
            return jax.device_put(params)
        step = None if step < 0 else step
        self.stored = checkpoint.restore(folder, {}, step=step).record
        restored = checkpoint.restore(folder, {"ema": self.template(self.stored)}, step=step)
        self.step = restored.step
        return jax.device_put(restored.trees["ema"])

    def draw(
        self,
        sampler,
        params,
        cond: Callable[[int], object],
        micro_batch: int | None = None,
        number: int | None = None,
    ) -> tuple[np.ndarray, dict]:
        """The samples of config.sample, and their figures.

        Args:
          sampler: the strategy.
          params: what its networks need.
          cond: cond(n) conditions the first n samples.
          micro_batch: samples at a time; None for config.sample.micro_batch.
          number: how many, at least 3; None for config.sample.number.
        """
        from gen_jax import parallel, sampling

        choice, mesh = self.config.sample, parallel.local_mesh()
        size, number = micro_batch or choice.micro_batch, number or choice.number
        generate = functools.partial(sampling.generate_many, sampler, params, choice.seed)
        chunks = list(
            generate(
                number, cond=cond(number), micro_batch=size,
                mesh=mesh if mesh.size > 1 else None,
            )
        )  # fmt: skip
        one = list(generate(3, cond=cond(3), micro_batch=1, progress=False))
        return np.concatenate([chunk.samples for chunk in chunks]), {
            "nfe": sampler.nfe,
            "samples": number,
            "sample_compile_seconds": sum(chunk.compile_seconds for chunk in chunks + one),
            "sampling_latency_seconds": float(np.median([chunk.seconds for chunk in one])),
            "samples_per_second": number / sum(chunk.seconds for chunk in chunks),
        }

    def keep_samples(self, **arrays) -> None:
        """Writes samples.npz whole: the arrays, the step and the seed."""
        temporary = self.workdir.path / ".samples.npz"
        np.savez(temporary, **arrays, step=self.step, seed=self.config.sample.seed)
        temporary.replace(self.workdir.path / "samples.npz")

    def keep_text(self, name: str, content: str) -> None:
        """Writes a UTF-8 file of the work directory whole."""
        temporary = self.workdir.path / f".{name}"
        temporary.write_text(content, encoding="utf-8", newline="")
        temporary.replace(self.workdir.path / name)

    def kept_samples(self) -> dict[str, np.ndarray]:
        """The arrays in samples.npz, which must be of the restored checkpoint."""
        path = self.workdir.path / "samples.npz"
        if not path.exists():
            raise FileNotFoundError(f"no samples in {path.parent}; run the command `sample` first")
        with np.load(path) as file:
            arrays = dict(file)
        if (drawn := int(arrays["step"])) != self.step:
            raise ValueError(f"{path} was drawn at step {drawn}, the checkpoint is of step "
                             f"{self.step}; run the command `sample` again")  # fmt: skip
        return arrays


def commands(name: str, run_class: type[Run], phases: tuple[str, ...] = PHASES) -> dict:
    """The commands of an experiment: `all`, which is those of PHASES but export, and each phase."""

    def command(*phases):
        return lambda config: _run(name, run_class, config, phases)

    whole = command(*(phase for phase in phases if phase in PHASES[:-1]))
    return {"all": whole} | {phase: command(phase) for phase in phases}


def is_main(config) -> bool:
    """Whether this process is the one that writes; it does not load jax to tell of one alone."""
    if not config.distributed.coordinator:
        return True
    import jax

    return jax.process_index() == 0


def free_keys(run_class: type[Run], config, stored: dict | None) -> tuple[str, ...]:
    """Keys that may change on resume: the family's, the number of steps when the rate does not
    hang on it, and fields at their defaults that the stored configuration is too old to have."""
    current = config_lib.flatten(to_dict(config))
    added = config_lib.added(type(config), stored or {})
    same = tuple(key for key, value in added.items() if current[key] == value)
    steps = ("train.steps",) if config.train.decay == "constant" else ()
    return run_class.free + steps + same


def _run(name, run_class, config, phases):
    training, path = "train" in phases, Path(config.workdir).expanduser()
    if not training and not (path / "config.json").exists() and not config.pretrained:
        raise WorkdirError(f"no run in {path}; train one first, or give its --workdir")
    if config.distributed.coordinator:
        if phases != ("train",):
            raise ValueError("several hosts train together; sample and evaluate on one of them")
        from gen_jax import parallel

        parallel.start(config.distributed)
    workdir = Workdir(path)
    with workdir.lock() if is_main(config) else contextlib.nullcontext():
        free = free_keys(run_class, config, workdir.stored_config())
        if not training:
            workdir.check_config(to_dict(config), free)
        elif is_main(config):
            workdir.write_config(to_dict(config), free)
        run = run_class(name, config, workdir, phases)
        report = run.train() if training else {}
        if phases != ("train",):
            params = run.restore()
            report["step"] = run.step
        for phase in phases:
            if phase != "train":
                report |= getattr(run, phase)(params)
        if is_main(config):
            report["wall_seconds"] = time.perf_counter() - run.began
            _summarise(run, phases, report)


def _summarise(run, phases, report):
    """Adds what was measured to summary.json, which keeps what was not measured again."""
    path = run.workdir.path / "summary.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if "wall_seconds" in known and f"{run.unit}_per_second" not in report:
        report = report | {"wall_seconds": known["wall_seconds"]}  # that of the training
    run.workdir.write_json("summary.json", known | report)
    common.print_summary(f"{run.name}: {', '.join(phases)}", report)
    names = ("config.json", "metrics.jsonl", *run.results, "summary.json")
    left = [name for name in names if (run.workdir.path / name).exists()]
    print(f"\nin {run.workdir.path}: {', '.join(left)}")
