"""The phases of a comparison: train what is missing, examine, time in turns, report.

Every finished part is a file: a checkpoint, `examined/<strategy>.json` and `.npz`, and
`timed/<round>.json`. So a run that was cut off goes on where it was, and loses what was being
worked on alone.
"""

import dataclasses
import datetime
import io
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gen_jax import array_files, cli, loading, runs, whole_file
from gen_jax.comparison import budget, measure, records, report
from gen_jax.comparison.config import CompareConfig
from gen_jax.comparison.gates import GateError
from gen_jax.comparison.judges import Judge
from gen_jax.comparison.strategy import Comparison, Strategy
from gen_jax.config import RunConfig, resolve
from gen_jax.task import Run
from gen_jax.workdir import Workdir, WorkdirError

__all__ = ["compare"]

_QUICK_SAMPLES = 256
_TOOK = "took.json"  # in the directory of a run: how long its training took, to the end


def compare(config: CompareConfig, comparison: Comparison) -> bool:
    """Runs a comparison to its end.

    Args:
      config: its options.
      comparison: what is compared, of the chosen strategies.

    Returns:
      Whether all strategies passed.

    Raises:
      ValueError, FileNotFoundError: the work directory or the trained runs do not fit; nothing was
        changed.
      SystemExit: training was interrupted; how to go on was printed.
    """
    return _Comparing(config, comparison).all()


@dataclasses.dataclass
class _Comparing:
    """A comparison in its work directory."""

    config: CompareConfig
    comparison: Comparison

    def __post_init__(self):
        self.workdir = Workdir(self.config.place)
        self.path = self.workdir.path
        folder = pathlib.Path(self.config.runs).expanduser() if self.config.runs else None
        self.folder = (folder or self.path / "runs").absolute()
        self.configs = self.comparison.placed(self.folder)
        self.judge: Judge = resolve(self.comparison.judge)()
        self.number = self.config.samples or (
            _QUICK_SAMPLES if self.config.quick else self.judge.number
        )
        self.began = time.monotonic()
        self.failed: dict[str, str] = {}

    def all(self) -> bool:
        """All phases; whether every strategy passed."""
        self._check_stored()
        if self.config.runs:
            self._check_given()
        self._check_data()
        with self.workdir.lock():
            self.workdir.write_json("comparison.json", self._identity())
            trained = self._train()
            contestants = self._examine(trained)
            times = self._time(contestants)
            results = self._results(trained, times)
            records.write(self.path / "results.json", results)
            report.write(self.path, results, self._arrays)
        for name, why in self.failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        print(
            f"\n{records.markdown(results)}\nin {self.path}: results.json, results.md, index.html"
        )
        return not self.failed

    def _identity(self):
        """What results depend on, and may not change between two parts of one comparison."""
        config = self.config
        return {
            "schema": records.SCHEMA,
            "data": config.data,
            "runs": config.runs and str(self.folder),
            "quick": config.quick,
            "samples": self.number,
            "batches": list(config.batches),
            "seed": config.seed,
        }

    def _check_stored(self):
        stored = self.workdir.read_json("comparison.json", "choose another --workdir")
        if stored is None:
            if self.workdir.stored_config() is not None:
                raise WorkdirError(f"{self.path} holds a run; choose another --workdir")
            return
        results = self.path / "results.json"
        if results.exists():
            records.read(results)
        for name, value in self._identity().items():
            if stored.get(name) != value:
                raise WorkdirError(
                    f"{self.path} holds a comparison with {name} {stored.get(name)!r}, not "
                    f"{value!r}; choose another --workdir"
                )
        for strategy in self.comparison.strategies:
            if self.workdir.read_json(f"examined/{strategy.name}.json", "remove it") is not None:
                self._arrays(strategy.name)

    def _check_given(self):
        """Runs that were trained elsewhere must be there, of the same task and data."""
        for name, config in self.configs.items():
            stored = cli.stored_run(config.workdir, type(config))
            if stored is None:
                raise FileNotFoundError(f"no run {name} in {self.folder}")
            for field in ("data", "tokenizer"):
                theirs, ours = getattr(stored, field, None), getattr(config, field, None)
                if _without_place(theirs) != _without_place(ours):
                    raise WorkdirError(f"the run in {config.workdir} is of another {field}")

    def _check_data(self):
        """The data must be there before anything is done."""
        seen = set()
        for config in self.configs.values():
            data = getattr(config, "data", None)
            if repr(data) not in seen:
                seen.add(repr(data))
                config.load(Workdir(config.workdir).path, ("train",))

    def _say(self, text):
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", file=sys.stderr, flush=True)

    def _train(self) -> dict[str, dict]:
        """Trains what is not trained yet; what each run took, by name."""
        trained, numbers = {}, len(self.configs)
        for number, (name, config) in enumerate(self.configs.items(), 1):
            try:
                if not (self.config.runs or _is_trained(config)):
                    self._say(f"training {name} ({number} of {numbers})")
                    self._train_one(name, config)
                trained[name] = self._budget(name, config)
            except OSError:
                raise  # of the machine, not of a strategy
            except Exception as error:
                trained[name] = {"failed": _line(error)}
        return trained

    def _train_one(self, name: str, config: RunConfig) -> None:
        workdir, phases = Workdir(config.workdir), ("train",)
        data = config.load(workdir.path, phases)
        began = time.perf_counter()
        with cli.claim(workdir, config):
            task = runs.make_task(config, workdir, phases, data)
            runs.train(Run(name, config, workdir, phases, task))
            seconds = time.perf_counter() - began
            workdir.write_json(_TOOK, {"seconds": seconds, "steps": _steps(config)})

    def _budget(self, name, config):
        """Parameters and operations of a run, from a file where they were counted before."""
        file = f"budget_{name}.json"
        stored = self.workdir.read_json(file, "remove it")
        if stored is None:
            stored_config = cli.stored_run(config.workdir, type(config))
            stored = budget.of_run(stored_config)
            took = Workdir(config.workdir).read_json(_TOOK, "remove it")
            stored |= {"seconds": (took or {}).get("seconds")}
            self.workdir.write_json(file, stored)
        return stored

    def _examine(self, trained) -> dict[str, measure.Contestant]:
        """Examines what was not examined yet; the strategies that are ready to be timed."""
        contestants, loaded = {}, _Loader(self.configs)
        strategies, ours = self.comparison.strategies, self.path / "examined"
        began, done = time.monotonic(), 0
        for number, strategy in enumerate(strategies, 1):
            stored = self.workdir.read_json(f"examined/{strategy.name}.json", "remove it")
            try:
                self._check_trained(strategy, trained)
                contestant = measure.make(strategy, loaded.of(strategy))
                digest = _digest(self.configs, self.comparison.parts(strategy))
                if stored is None or stored["runs_digest"] != digest:
                    left = (
                        (time.monotonic() - began) / max(done, 1) * (len(strategies) - number + 1)
                    )
                    more = f", about {left:.0f} s left" if done else ""
                    self._say(f"examining {strategy.name} ({number} of {len(strategies)}{more})")
                    figures, arrays = measure.examine(
                        contestant, self.judge, self.number, self.config.batches, self.config.seed
                    )
                    ours.mkdir(exist_ok=True)
                    _write_arrays(ours / f"{strategy.name}.npz", arrays)
                    figures |= {"runs_digest": digest}
                    self.workdir.write_json(f"examined/{strategy.name}.json", figures)
                    done += 1
                contestants[strategy.name] = contestant
            except OSError:
                raise
            except Exception as error:
                self.failed[strategy.name] = _line(error)
                self._say(f"{strategy.name} failed: {self.failed[strategy.name]}")
        return contestants

    def _check_trained(self, strategy, trained):
        for name in self.comparison.parts(strategy):
            if "failed" in trained[name]:
                raise GateError(f"its run {name} was not trained: {trained[name]['failed']}")

    def _time(self, contestants) -> list[dict]:
        """Rounds in which every strategy is timed at each of its batch sizes, in turn."""
        folder, wanted = self.path / "timed", {}
        folder.mkdir(exist_ok=True)
        for name in contestants:
            figures = self.workdir.read_json(f"examined/{name}.json", "remove it")
            wanted[name] = figures["batches"]
        times = []
        for number in range(self.config.rounds):
            file = f"timed/{number:03d}.json"
            stored = self.workdir.read_json(file, "remove it")
            if stored is None or any(
                set(stored.get(name, {})) != set(map(str, sizes)) for name, sizes in wanted.items()
            ):
                self._say(f"timing, round {number + 1} of {self.config.rounds}")
                if number == 0 or not times:
                    self._warm(contestants, wanted)
                stored = {
                    name: {
                        str(batch): measure.time_once(contestants[name], batch, self.config.seed)
                        for batch in sizes
                    }
                    for name, sizes in wanted.items()
                }
                self.workdir.write_json(file, stored)
            times.append(stored)
        return times

    def _warm(self, contestants, wanted):
        for name, sizes in wanted.items():
            for batch in sizes:
                measure.time_once(contestants[name], batch, self.config.seed)

    def _results(self, trained, times) -> dict[str, Any]:
        entries = []
        for strategy in self.comparison.strategies:
            entry = {
                name: getattr(strategy, name)
                for name in ("name", "title", "group", "does", "loses", "runs")
            }
            entry["failed"] = self.failed.get(strategy.name)
            if entry["failed"] is None:
                figures = self.workdir.read_json(f"examined/{strategy.name}.json", "remove it")
                entry |= {k: v for k, v in figures.items() if k not in ("batches", "runs_digest")}
                entry["rates"] = _rates(strategy.name, figures["batches"], times)
                parts = [trained[name] for name in self.comparison.parts(strategy)]
                for name in ("parameters", "training_operations"):
                    entry[name] = sum(part[name] for part in parts)
            entries.append(entry)
        return {
            "data": self.config.data,
            "about": self.comparison.about,
            "headline": self.judge.headline,
            "quick": self.config.quick,
            "seed": self.config.seed,
            "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seconds": time.monotonic() - self.began,
            "machine": records.machine(),
            "commit": records.commit(),
            "entropy": self.judge.entropy,
            "runs": trained,
            "strategies": entries,
        }

    def _arrays(self, name: str) -> Mapping[str, np.ndarray]:
        path = self.path / "examined" / f"{name}.npz"
        advice = f"remove {path.with_suffix('.json')}"
        try:
            return array_files.read_npz(path)
        except FileNotFoundError as error:
            raise WorkdirError(f"{path} is not there; {advice}") from error
        except ValueError as error:
            raise WorkdirError(f"{error}; {advice}") from error


class _Loader:
    """Loads runs once for all strategies that change nothing of them."""

    def __init__(self, configs):
        self.configs, self.plain = configs, {}

    def of(self, strategy: Strategy) -> dict[str, loading.Loaded]:
        """The runs of a strategy by name, the first with its changes."""
        loaded = {}
        for name in strategy.runs:
            if name not in self.plain:
                self.plain[name] = self._load(name, {})
            loaded[name] = self.plain[name]
        if strategy.changes:
            first = strategy.runs[0]
            changed = self._load(first, strategy.changes)
            # One copy of the parameters for all strategies of a run.
            loaded[first] = dataclasses.replace(changed, params=self.plain[first].params)
        return loaded

    def _load(self, name, changes):
        config = self.configs[name]
        if getattr(config, "autoencoder", ""):  # where it is now, should all have been moved
            changes = {"autoencoder": config.autoencoder, **changes}
        return loading.load(config.workdir, **changes)


def _is_trained(config: RunConfig) -> bool:
    """Whether training has come to its end, which `_train_one` notes."""
    took = Workdir(config.workdir).read_json(_TOOK, "remove it")
    return took is not None and took.get("steps") == _steps(config)


def _steps(config):
    """The steps of training of each stage of a run."""
    fields = ("coder_train", "train")
    return [getattr(config, field).steps for field in fields if hasattr(config, field)]


def _digest(configs, names):
    """What tells a trained run from another: the step and time of its last checkpoints."""
    found = {}
    for name in names:
        for path in sorted(pathlib.Path(configs[name].workdir).glob("*/checkpoints/[0-9]*")):
            record = path / "meta" / "metadata"
            found[f"{name}/{path.parent.parent.name}"] = [path.name, record.stat().st_mtime_ns]
    return json.dumps(found, sort_keys=True)


def _rates(name, batches, times):
    rates = []
    for batch in batches:
        seconds = [one[name][str(batch)] for one in times]
        summary = records.summary(seconds)
        rates.append(
            {
                "batch": batch,
                "seconds": summary,
                "samples_per_second": batch / summary["median"],
                "repeats": len(seconds),
            }
        )
    return rates


def _write_arrays(path, arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with whole_file.replacing(path) as file:
        file.write(content.getvalue())


def _without_place(data):
    """The data of a configuration without the folder that it was read from."""
    if dataclasses.is_dataclass(data) and hasattr(data, "dir"):
        return dataclasses.replace(data, dir="")
    return data


def _line(error):
    """An error in one line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, GateError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:300]
