"""What a run is made of: a task is a value, with its stages, its sampler, and what they mean.

A task says what is trained on what, and what sampling and evaluation mean there. It is made by a
function of a configuration (see `gen_jax.tasks`); the phases of a run are functions of it (see
`gen_jax.runs`). A task gives what it has, and leaves the rest at None.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gen_jax import array_files, sampling, whole_file
from gen_jax import config as config_lib
from gen_jax.condition import Condition
from gen_jax.config import RunConfig, TrainConfig
from gen_jax.drawing import Drawing
from gen_jax.parts import Parts
from gen_jax.sampling import Sampler
from gen_jax.trainables import Trainable
from gen_jax.workdir import Workdir

__all__ = ["Context", "Run", "Stage", "Task"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a task is made for, beside its configuration.

    Attributes:
      workdir: of the run.
      phases: the commands to come; data that none of them needs need not be read.
      records: the JSON records of the checkpoints to go on from or to sample, by stage.
      data: what `config.load` read.
    """

    workdir: Workdir
    phases: tuple[str, ...]
    records: Mapping[str, dict]
    data: Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """Something that `training.fit` trains, in a directory of its own in that of the run.

    Attributes:
      name: of the stage, and of its directory.
      trainable: what is trained.
      batch: batch(step, shard, earlier) is part shard[0] of shard[1] of the batch of a step, in
        NumPy arrays; `earlier` has the averaged parameters of the stages before this one, by name.
      batch_like: batch_like() is of the names, shapes and dtypes of the whole first batch, for what
        is counted before anything is trained or written; None where `batch` needs no earlier stage,
        and writes nothing.
      record: JSON values that are kept in each checkpoint, from which the task can be made again
        without its data.
      must_match: names of entries of the record by which parameters are read, such as the
        tokenizer: a run that starts from the parameters of another one must have the same.
      evaluate: metrics of the averaged parameters, every `config.train.evaluate_every` steps; see
        `training.fit`.
      show: show(averaged parameters) is one picture or text for the previews of training; None
        where the samples of the task are shown, if this is its last stage.
      initial: parameters to start from, say published ones, and to sample where nothing was
        trained; None for fresh ones.
      unit: what the rate of training counts, and how many of them an example has.
      train: how it is trained, where it is not as the configuration of the run says.
    """

    name: str
    trainable: Trainable
    batch: Callable[[int, tuple[int, int], Mapping[str, Any]], dict[str, np.ndarray]]
    batch_like: Callable[[], dict[str, np.ndarray]] | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    must_match: tuple[str, ...] = ()
    evaluate: Callable[[Any], dict[str, Any]] | None = None
    show: Callable[[Any], str | np.ndarray] | None = None
    initial: Callable[[], Any] | None = None
    unit: str = "images"
    units_per_example: int = 1
    train: TrainConfig | None = None

    def training(self, config: RunConfig) -> TrainConfig:
        """How the stage is trained in a run of this configuration."""
        return self.train or config.train

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the averaged parameters."""
        return _abstract_averaged(self.trainable)


@functools.lru_cache(maxsize=64)
def _abstract_averaged(trainable):
    return jax.eval_shape(lambda: trainable.averaged(trainable.init(jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what, and what sampling and evaluation mean there.

    Attributes:
      stages: what is trained, in order.
      model: what the sampler draws from, for users of `gen_jax.load`.
      sampler: the strategy that `sample` runs.
      sampler_params: sampler_params(averaged parameters) is what the sampler reads, where it reads
        more than those, such as the parameters of another model.
      begin: begin(run) leaves in the work directory what the run is read with later, say a
        tokenizer; it is called when everything was checked, before training, on the first host.
      condition: condition(n) conditions the first n samples; None for no condition.
      number: most samples that there are conditions for; None for any number.
      micro_batch: most samples that make sense at a time; None for config.sample.micro_batch.
      draw: draws the samples, in place of `Run.draw`: say text that is shown while it is drawn.
      write: write(run, samples, report) leaves samples in the work directory, and returns further
        figures; `report` has those of the drawing.
      show: show(samples) is one picture or text of samples, for the previews of training; None
        where there is none.
      evaluate: figures of the trained model, and of the samples drawn last.
      commands: further commands by name; what they return joins the summary.
      sizes: of the data, by name, for `--dry-run`.
      data: a digest of what is trained on, which a run that goes on must find again; "" where it is
        not read, or made anew for each step.
      results: files that the phases leave in the work directory, for the last line.
      tokenizer: of what the model reads and writes, where it is text.
    """

    stages: tuple[Stage, ...]
    model: Any = None
    sampler: Sampler | None = None
    sampler_params: Callable[[Any], Any] = lambda params: params
    begin: Callable[["Run"], None] | None = None
    condition: Callable[[int], Condition] | None = None
    number: int | None = None
    micro_batch: int | None = None
    draw: Callable[["Run"], tuple[Any, dict]] | None = None
    write: Callable[["Run", Any, dict], dict] | None = None
    show: Callable[[Any], str | np.ndarray] | None = None
    evaluate: Callable[["Run"], dict] | None = None
    commands: Mapping[str, Callable[["Run"], dict]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    data: str = ""
    results: tuple[str, ...] = ()
    tokenizer: Any = None


@dataclasses.dataclass
class Run:
    """A run in its work directory, as the functions of a task see it.

    Attributes:
      name: of the experiment.
      config: of the run.
      workdir: its directory.
      phases: the commands that it runs.
      task: what is run.
      step: the step of the restored parameters; 0 for published ones.
      params: the averaged parameters: those of the only stage, or a dict by stage.
    """

    name: str
    config: RunConfig
    workdir: Workdir
    phases: tuple[str, ...]
    task: Task
    step: int = 0
    params: Any = None
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def generate(self, params: Any, number: int, **options: Any) -> list[sampling.Chunk]:
        """The first samples with these averaged parameters, or all where conditions are fewer.

        Args:
          params: the averaged parameters.
          number: of samples.
          options: further arguments of `sampling.generate_many`.
        """
        task, config = self.task, self.config.sample
        number = self._number(number)
        options = {"micro_batch": task.micro_batch or config.micro_batch} | options
        cond = task.condition(number) if task.condition else None
        params = task.sampler_params(params)
        return list(
            sampling.generate_many(task.sampler, params, config.seed, number, cond=cond, **options)
        )

    def draw(self) -> tuple[np.ndarray, dict]:
        """The samples that config.sample asks for, over all devices of this host; their figures.

        Finished parts are kept until the run is done, and are not drawn again.
        """
        number = self._number(self.config.sample.number)
        samples, report = self.drawing.draw(0, number)
        alone = self.generate(self.params, 3, micro_batch=1, progress=False)
        report["sample_compile_seconds"] += sum(chunk.compile_seconds for chunk in alone)
        latency = float(np.median([chunk.seconds for chunk in alone]))
        return samples, report | {"sampling_latency_seconds": latency}

    def draw_part(self) -> dict:
        """Draws a part of a larger request, and leaves it for the run that asks for all; figures.

        Raises:
          ValueError: there are fewer conditions than the request has samples.
        """
        choice = self.config.sample
        if self._number(choice.of) < choice.of:
            raise ValueError(f"there are {self.task.number} samples in all, not {choice.of}")
        return self.drawing.draw(choice.start, choice.start + choice.number)[1]

    def draw_share(self) -> None:
        """Draws what falls to this host of the samples that config.sample asks for.

        The first host then finds all of them, as every host writes to the work directory.
        """
        number = self._number(self.config.sample.number)
        hosts, index = jax.process_count(), jax.process_index()
        batches = -(-number // self.drawing.size)
        ends = [min(batches * i // hosts * self.drawing.size, number) for i in (index, index + 1)]
        if ends[0] < ends[1]:
            self.drawing.draw(*ends)

    @functools.cached_property
    def drawing(self) -> Drawing:
        """The request for samples, with the parts of it that are there."""
        task, choice = self.task, self.config.sample
        whole = choice.of or self._number(choice.number)
        return Drawing(
            task.sampler,
            task.sampler_params(self.params),
            choice.seed,
            task.condition(whole) if task.condition else Condition(),
            whole,
            task.micro_batch or choice.micro_batch,
            lambda known: Parts(
                self.workdir.path,
                self.request("sample") | known,
                choice.parts,
                lasting=bool(choice.of),
            ),
        )

    def request(self, phase: str) -> dict:
        """What the parts of a phase depend on, beside parameters, conditions and data."""
        fields = config_lib.to_dict(self.config)
        others = () if phase == "evaluate" else ("evaluate",)
        for name in ("workdir", "train", "distributed", "init_from", "sample", *others):
            fields.pop(name, None)
        return {"phase": phase, "task": self.config.task, "config": fields}

    def _number(self, asked):
        """As many samples as there are conditions for."""
        return min(asked, self.task.number or asked)

    def keep_samples(self, **arrays: Any) -> None:
        """Writes samples.npz whole: the arrays, the step and the seed."""
        with whole_file.replacing(self.workdir.path / "samples.npz") as file:
            np.savez(file, **arrays, step=self.step, seed=self.config.sample.seed)

    def kept_samples(self, *names: str) -> dict[str, np.ndarray]:
        """The arrays in samples.npz, which must be of the restored checkpoint.

        Args:
          *names: of those that must be among them.

        Raises:
          FileNotFoundError: no samples were drawn yet.
          ValueError: they were drawn at another step, or the file is damaged or too large.
        """
        path = self.workdir.path / "samples.npz"
        if not path.exists():
            raise FileNotFoundError(f"no samples in {path.parent}; run the command `sample` first")
        try:
            arrays = array_files.read_npz(path)
        except ValueError as error:
            raise ValueError(f"{error}; run the command `sample` again") from error
        missing = sorted({*names, "step"} - arrays.keys())
        if missing:
            raise ValueError(f"{path} has no {missing[0]}; run the command `sample` again")
        try:
            drawn = int(arrays["step"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged; run the command `sample` again") from error
        if drawn != self.step:
            raise ValueError(
                f"{path} was drawn at step {drawn}, the checkpoint is of step {self.step}; run the "
                "command `sample` again"
            )
        return arrays

    def keep_text(self, name: str, content: str) -> None:
        """Writes a UTF-8 file of the work directory whole."""
        whole_file.write(self.workdir.path / name, content)
