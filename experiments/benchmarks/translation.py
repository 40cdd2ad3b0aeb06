"""Times parallel decoding of trained translation models against the cached autoregressive one.

    python -m experiments.benchmarks.translation --runs AR_RUN MASKED_RUN ONE_SHOT_RUN CTC_RUN ...

The runs are work directories of `nar_translation` over the same test pairs, one of them
autoregressive: the baseline, with cached keys and values and a loop that ends with the longest
translation of a batch. A masked model is timed with several numbers of rounds, a model that
predicts lengths with one length and with several. All sources of the test split are translated,
sorted by length and in batches of a few shapes, on every side; latency is the median of sentences
alone, throughput that of the best batch size. Compiling is apart. Before a figure counts, a
translation must be the same alone and in a batch, but for a few near ties. The last line is one
JSON object.
"""

import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import timing
from gen_jax import cli, runs, sampling
from gen_jax.metrics.translation import bleu
from gen_jax.models.masked.config import MaskPredictOptions
from gen_jax.task import Run
from gen_jax.tasks.translation.config import TranslationData, TranslationRunConfig
from gen_jax.tasks.translation.task import make_sampler, source_condition
from gen_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    runs: tuple[str, ...]
    """Work directories of nar_translation; the first autoregressive one is the baseline."""
    rounds: tuple[int, ...] = (1, 4, 10)
    """Rounds of the masked models."""
    lengths: tuple[int, ...] = (1, 5)
    """Lengths decoded in parallel, where the length is predicted."""
    batches: tuple[int, ...] = (16, 64, 256)
    """Batch sizes of the throughput."""
    alone: int = 100
    """Sentences translated alone, for the latency."""
    repeats: int = 2
    """Passes over the test split at each batch size, of all sides in turn; the best counts."""
    stretch: float = 1.5
    """Positions of a target for each of the columns of its source."""
    same: float = 0.98
    """Share of translations that must be the same alone and in a batch."""

    def __post_init__(self):
        numbers = (*self.rounds, *self.lengths, *self.batches, self.alone, self.repeats)
        if not self.runs or min(numbers) < 1 or self.stretch < 1:
            raise ValueError("give runs, and positive rounds, lengths, batches, alone and repeats")


@dataclasses.dataclass
class Side:
    """A run with one way to decode it.

    Attributes:
      name: for the table.
      config: of the run, with the way to decode it.
      data: its pairs and tokenizer.
      model: what was trained.
      params: its averaged parameters.
    """

    name: str
    config: TranslationRunConfig
    data: TranslationData
    model: Any
    params: Any

    def __post_init__(self):
        self.programs, self.compile_seconds = {}, 0.0

    def translate(
        self, rows: np.ndarray, batch: int, config: Config
    ) -> tuple[dict[int, np.ndarray], list[float]]:
        """Tokens of the sources of these rows, a batch at a time, and the seconds of each."""
        pairs = self.data.pairs("test")
        sources, outputs, seconds = pairs.all(self.config.data.max_length), {}, []
        for first in range(0, len(rows), batch):
            some = rows[np.minimum(np.arange(first, first + batch), len(rows) - 1)]
            longest = pairs.source_length[some].max()
            columns = next(size for size in pairs.buckets if size >= longest)
            cut = {
                "source": sources["source"][some][:, :columns],
                "source_length": sources["source_length"][some],
            }
            cond, keys = source_condition(cut, batch), sampling.sample_keys(0, 0, batch)
            program = self._program(columns, batch, keys, cond, config)
            began = time.perf_counter()
            tokens = np.asarray(jax.block_until_ready(program(self.prepared, keys, cond)))
            seconds.append(time.perf_counter() - began)
            for row, line in zip(some, tokens, strict=True):
                outputs[int(row)] = line
        return outputs, seconds

    def _program(self, columns, batch, keys, cond, config):
        if (columns, batch) not in self.programs:
            began = time.perf_counter()
            target = min(self.config.data.max_length, round(columns * config.stretch))
            sampler = make_sampler(self.config, self.model, self.data.tokenizer.eos, target)
            self.nfe = sampler.nfe
            self.prepared = sampler.prepare(self.params)
            program = sampling.compile_generate(sampler, self.prepared, keys, cond)
            np.asarray(program(self.prepared, keys, cond))
            self.programs[columns, batch] = program
            self.compile_seconds += time.perf_counter() - began
        return self.programs[columns, batch]

    def texts(self, outputs: dict[int, np.ndarray]) -> list[str]:
        """Translations in the order of the rows."""
        return [self.data.texts_of(line[None])[0] for _, line in sorted(outputs.items())]


def sides(config: Config) -> list[Side]:
    """Every run with every way to decode it, the baseline first.

    Raises:
      FileNotFoundError: there is no run in one of the directories.
      ValueError: none of the runs is autoregressive.
    """
    found = []
    for path in config.runs:
        found += _sides_of(pathlib.Path(path).expanduser(), config)
    baselines = [side for side in found if side.config.strategy == "ar"]
    if not baselines:
        raise ValueError("none of the runs is autoregressive: the others have no baseline")
    return [baselines[0], *(side for side in found if side is not baselines[0])]


def _sides_of(path, config):
    """A run with every way to decode it."""
    workdir = Workdir(path)
    stored = cli.stored_run(path, TranslationRunConfig)
    if stored is None:
        raise FileNotFoundError(f"no run in {path}; train one first")
    ways = [("", {}, {})]
    if stored.strategy == "masked":
        ways = [
            (f", {r} rounds, {n} lengths", {"sampler": MaskPredictOptions(r)}, {"lengths": n})
            for r in config.rounds
            for n in config.lengths
        ]
    elif stored.strategy == "one_shot":
        ways = [(f", {n} lengths", {}, {"lengths": n}) for n in config.lengths]
    sides, params = [], None
    for label, changes, sample in ways:
        sample = dataclasses.replace(stored.sample, split="test", **sample)
        ours = dataclasses.replace(stored, sample=sample, **changes)
        data = ours.load(path, ("sample",))
        task = runs.make_task(ours, workdir, ("sample",), data)
        if params is None:
            params, _ = runs.restore(Run("benchmark", ours, workdir, ("sample",), task))
        sides.append(Side(f"{path.name}{label}", ours, data, task.model, params))
    return sides


def measure(config: Config) -> list[dict]:
    """One row per side."""
    every = sides(config)
    pairs, (_, references) = every[0].data.pairs("test"), every[0].data.texts("test")
    order = np.argsort(pairs.source_length, kind="stable")
    some = order[np.linspace(0, len(order) - 1, min(config.alone, len(order))).astype(int)]
    best, latency, outputs = {}, {}, {}
    for side in every:
        side.translate(some, 1, config)  # compiles
        alone, _ = side.translate(some, 1, config)
        for batch in config.batches:
            outputs[side.name], _ = side.translate(order, batch, config)
        same = [
            np.array_equal(*_cut(side, line, outputs[side.name][row]))
            for row, line in alone.items()
        ]
        if np.mean(same) < config.same:
            raise RuntimeError(
                f"{side.name}: only {np.mean(same):.0%} of translations are the "
                "same alone and in a batch"
            )
    for _ in range(config.repeats):
        for side in every:
            seconds = statistics.median(side.translate(some, 1, config)[1])
            latency[side.name] = min(seconds, latency.get(side.name, seconds))
            for batch in config.batches:
                rate = len(order) / sum(side.translate(order, batch, config)[1])
                best[side.name] = max((rate, batch), best.get(side.name, (0, 0)))
    base = every[0].name
    return [
        {
            "run": side.name,
            "nfe": side.nfe,
            "bleu": bleu(side.texts(outputs[side.name]), references),
            "latency_ms": latency[side.name] * 1e3,
            "latency_ratio": latency[base] / latency[side.name],
            "sentences_per_second": best[side.name][0],
            "best_batch": best[side.name][1],
            "throughput_ratio": best[side.name][0] / best[base][0],
            "compile_seconds": side.compile_seconds,
        }
        for side in every
    ]


def _cut(side, *lines):
    """Sequences up to their EOS."""
    eos = side.data.tokenizer.eos
    return [line[: np.argmax(np.append(line, eos) == eos)] for line in lines]


def show(rows: list[dict]) -> None:
    """Prints the table."""
    print(
        f"{'run':<44}{'NFE':>5}{'BLEU':>7}{'ms alone':>10}{'x AR':>7}{'sent/s':>9}{'batch':>7}"
        f"{'x AR':>7}"
    )
    for row in rows:
        print(
            f"{row['run']:<44}{row['nfe']:>5}{row['bleu']:>7.2f}{row['latency_ms']:>10.2f}"
            f"{row['latency_ratio']:>7.2f}{row['sentences_per_second']:>9.0f}"
            f"{row['best_batch']:>7}{row['throughput_ratio']:>7.2f}"
        )


def benchmark(config: Config) -> dict:
    """Runs everything and prints the table; the figures as JSON values."""
    rows = measure(config)
    show(rows)
    return {"machine": timing.machine(), "rows": rows}


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
