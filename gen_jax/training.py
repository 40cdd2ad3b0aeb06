"""The only training loop, over a `Trainable`.

The state is a tree of the Trainable's, its moving average, and a step; the batch of a step is a
function of (seed, step), and so is its randomness. A run that was cut off anywhere and resumed
therefore ends with the state of one that was not, bit for bit.
"""

import contextlib
import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gen_jax import checkpoint, event_log, hosts, memory, parallel, signals
from gen_jax.config import TrainConfig
from gen_jax.training_step import Trainable, TrainState, abstract_state, init_state, make_step
from gen_jax.workdir import MetricsLog, Workdir

__all__ = [
    "Interrupted",
    "NotFinite",
    "TrainState",
    "Trainable",
    "Trained",
    "abstract_state",
    "check_start",
    "fit",
    "init_state",
    "make_step",
]


_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `fit` returns: the state, and how long it took on the clock.

    Attributes:
      state: after the last step.
      start: the step it began from.
      compile_seconds: for the training step, in all its shapes.
      seconds: for the steps, without compiling, checkpoints and evaluations.
      examples_per_second: over those seconds; 0 when there was nothing left to do.
    """

    state: TrainState
    start: int
    compile_seconds: float
    seconds: float
    examples_per_second: float

    @property
    def averaged(self) -> Any:
        """The moving average, which samples come from."""
        return self.state.ema

    @property
    def step(self) -> int:
        """Updates tried in all."""
        return int(self.state.step)


class Interrupted(signals.Stopped):
    """Training stopped for a signal, after saving; `step` is where it was."""

    def __init__(self, signum: int, step: int):
        super().__init__(signum, f" after step {step}, which is saved")
        self.step = step


class NotFinite(FloatingPointError):
    """Too many updates in a row had a loss or gradient that was not finite."""


def fit(
    config: TrainConfig,
    trainable: Trainable,
    batch: Callable[[int], dict[str, np.ndarray]],
    workdir: Workdir,
    *,
    mesh: Mesh,
    record: dict | None = None,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    preview: Callable[[int, Any], Any] | None = None,
    initial: Any | None = None,
    progress: bool | None = None,
) -> Trained:
    """Trains from the latest checkpoint in the work directory, or from the start.

    SIGTERM, SIGHUP and SIGINT finish the step, save, and raise `Interrupted`, also where they come
    with the last step; a second signal ends the process at once. Losses are read one step late, so
    that the devices are never waited for.

    Args:
      config: of the loop.
      trainable: what is trained; see `trainables`.
      batch: this host's share of the batch of a step, as NumPy arrays. Each combination of shapes
        is compiled when it first comes.
      workdir: holds metrics.jsonl and the checkpoints; made when it does not exist.
      mesh: all devices.
      record: JSON values to keep in each checkpoint.
      evaluate: metrics of the moving average, logged every `config.evaluate_every` steps under
        "eval/". An array of integers [K] counts K things: TensorBoard alone gets it, a histogram.
      preview: preview(step, moving average) shows samples on the first host, every
        `config.preview_every` steps; what it returns, a text or a picture, TensorBoard gets too.
      initial: what to start from in the place of `trainable.averaged`, say pretrained weights; it
        is not read where there is a checkpoint.
      progress: True shows a bar with rate and time left, False nothing; None shows the bar on a
        terminal, and elsewhere a line on standard error every half a minute.

    Raises:
      ValueError: the trainable is not hashable; the batch does not divide over devices and slices;
        the trainable cannot start from `initial`; its update is not as `Trainable` says.
      Interrupted: a signal came; the state is saved.
      NotFinite: more than `config.max_skipped` updates in a row were not finite; names step and
        seed. The last checkpoint is from before the first of them, or from a step whose own
        update was skipped, so that its state is finite.
      MemoryError: the state, or a step, does not fit in the memory of the CPU.
    """
    check_start(config, trainable, mesh, initial is not None)
    if jax.process_index() == 0:
        workdir.create()
    abstract = abstract_state(config, trainable)
    memory.check_arrays("the state of training", abstract, len(mesh.local_devices))
    if checkpoint.steps(workdir.checkpoints):
        state = _restore(workdir, abstract)
    else:
        state = init_state(config, trainable, initial)
    start = int(state.step)
    _agree_on_start(start, workdir)
    if start >= config.steps:
        if jax.process_index() == 0:
            checkpoint.tidy(workdir.checkpoints, keep=config.keep)
        return Trained(state, start, 0.0, 0.0, 0.0)
    if not config.ema:
        state = state.replace(ema=None)
    state = parallel.replicate(mesh, state)
    loop = _Loop(config, trainable, workdir, record or {}, evaluate, preview)
    with loop.open(start, progress), signals.finishing("the step and saving") as stop:
        trained = loop.run(make_step(trainable, config, mesh), state, start, batch, mesh, stop)
        if stop.signum:
            raise Interrupted(stop.signum, config.steps)
    return trained


def check_start(config: TrainConfig, trainable: Trainable, mesh: Mesh, given: bool) -> None:
    """Refuses what `fit` cannot start, before anything is written.

    Args:
      config: of the loop.
      trainable: what is to be trained.
      mesh: all devices.
      given: whether training starts from given values.

    Raises:
      ValueError: the trainable is not hashable, the batch does not divide over devices and slices,
        the trainable cannot start from given values, or a package is missing.
    """
    try:
        hash(trainable)
    except TypeError as error:
        raise ValueError(
            f"{type(trainable).__name__} is not hashable ({error}): make it a frozen dataclass "
            "whose fields are"
        ) from None
    slices = getattr(trainable, "accumulate", 1)
    if slices != config.accumulate:
        raise ValueError(
            f"accumulate is {config.accumulate}, but {type(trainable).__name__} cuts its batch "
            f"into {slices} slices"
        )
    if config.batch % (mesh.size * slices):
        raise ValueError(
            f"a batch of {config.batch} does not divide over {mesh.size} devices and "
            f"{slices} slices; choose a multiple of {mesh.size * slices}"
        )
    if config.tensorboard:
        event_log.check()
    if given and not hasattr(trainable, "replace_averaged"):
        raise ValueError(
            f"{type(trainable).__name__} cannot start from given values: it has no method "
            "replace_averaged(state, tree)"
        )


def _agree_on_start(start, workdir):
    """Refuses hosts that would train from different steps."""
    starts = hosts.gather("training starts", np.int32(start)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(
            f"the hosts found different checkpoints, of steps {starts}: "
            f"{workdir.path} must be one directory that all of them share"
        )


def _restore(workdir, abstract):
    abstract = {
        "ema": abstract.ema,
        "state": abstract.state,
        "loop": {"step": abstract.step, "skipped": abstract.skipped},
    }
    trees = checkpoint.restore(workdir.checkpoints, abstract).trees
    return TrainState(trees["state"], trees["ema"], **trees["loop"])


class _Loop:
    """The part of `fit` that has side effects: records, checkpoints, the progress bar."""

    def __init__(self, config, trainable, workdir, record, evaluate, preview):
        self.config, self.workdir, self.record = config, workdir, record
        self.trainable, self.evaluate, self.preview = trainable, evaluate, preview
        self.main = jax.process_index() == 0

    @contextlib.contextmanager
    def open(self, start, progress):
        """Opens the records and the bar for the time of the loop."""
        on_terminal = sys.stderr.isatty()
        hidden = not (self.main and (on_terminal if progress is None else progress))
        self.lines = self.main and progress is None and not on_terminal
        self.last_line = time.perf_counter()
        total = self.config.steps
        path, self.logs, self.events = self.workdir.path, [], None
        if self.main:
            self.logs = [MetricsLog(path / "metrics.jsonl", start)]
            self.metrics = self.logs[0]
        if self.main and self.config.tensorboard:
            self.events = event_log.EventLog(path / "tensorboard", start)
            self.logs.append(self.events)
        with tqdm(total=total, initial=start, desc="training", unit="step", disable=hidden) as bar:
            self.bar = bar
            try:
                yield
            finally:
                for log in self.logs:
                    log.close()

    def run(self, step_fn, state, start, batch, mesh, stop):
        """Takes the steps from `start` to the last."""

        def flags():
            return np.full(len(mesh.local_devices), stop.signum or 0, np.int32)

        arrays = parallel.split(mesh, batch(start))
        began = self.last_time = time.perf_counter()
        self.last_step, self.aside, self.compile_seconds = start, 0.0, 0.0
        self.programs, pending = {}, None
        for step in range(start, self.config.steps):
            arguments = state, arrays, parallel.split(mesh, flags())
            state, metrics = self._program(step_fn, arguments)(*arguments)
            done = step + 1
            if done < self.config.steps:  # made while the devices work
                arrays = parallel.split(mesh, batch(done))
            signum = self._read(pending)
            pending = (done, metrics)
            save = done % self.config.checkpoint_every == 0 or done == self.config.steps
            if save or signum:
                signum = self._read(pending) or signum
                pending = None
                with self._apart():
                    self._save(state, done)
            if signum:
                raise Interrupted(signum, done)
            if self.evaluate and _is_due(done, self.config.evaluate_every):
                with self._apart():
                    self._report(done, self.evaluate(self._whole(state).ema))
            if self.main and self.preview and _is_due(done, self.config.preview_every):
                with self._apart():
                    self._preview(state, done)
        seconds = time.perf_counter() - began - self.aside
        self._sync()
        rate = (self.config.steps - start) * self.config.batch / seconds
        return Trained(self._whole(state), start, self.compile_seconds, seconds, rate)

    def _program(self, step_fn, arguments):
        """The step compiled for a batch of these shapes, of which there are few."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1]))
        if shapes not in self.programs:
            with self._apart():
                began = time.perf_counter()
                self.programs[shapes] = step_fn.lower(*arguments).compile()
                memory.check("a step of training", self.programs[shapes])
                self.compile_seconds += time.perf_counter() - began
                hosts.meet("a step is compiled")
        return self.programs[shapes]

    @contextlib.contextmanager
    def _apart(self):
        """Takes the time of what is inside out of the rates."""
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self.aside += passed
        self.last_time += passed

    def _read(self, pending):
        """Looks at the metrics of a step: logs them, stops for NaN; the signal to stop for."""
        if pending is None:
            return 0
        step, metrics = pending
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        signum, skipped = metrics.pop("stop"), metrics["skipped"]
        if skipped:
            self._report_skipped(step, metrics)
        self.bar.update(step - self.bar.n)
        if step % self.config.log_every == 0 or step == self.config.steps:
            now = time.perf_counter()
            rate = (step - self.last_step) * self.config.batch / (now - self.last_time)
            self.last_step, self.last_time = step, now
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}")
            self._write({"step": step} | metrics | {"examples_per_second": round(rate, 2)})
            self._show(step, metrics["loss"], rate)
        return signum

    def _show(self, step, loss, rate):
        """A line of progress, where it is time for one and there is no bar."""
        now = time.perf_counter()
        if not self.lines or now - self.last_line < _SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        left = datetime.timedelta(
            seconds=round((self.config.steps - step) * self.config.batch / rate)
        )
        print(
            f"step {step} of {self.config.steps}: loss {loss:.4f}, {rate:.4g} examples/s, "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )

    def _report_skipped(self, step, metrics):
        """Says which metrics of a skipped update are not finite; raises after too many in a row."""
        skipped, seed = metrics["skipped"], self.config.seed
        names = [name for name, value in metrics.items() if not math.isfinite(value)]
        what = ", ".join(names) or "an entry of the state"
        if skipped <= self.config.max_skipped:
            print(
                f"step {step}: {what} not finite, update skipped ({skipped} in a row, seed {seed})",
                file=sys.stderr,
            )
            return
        saved = checkpoint.steps(self.workdir.checkpoints)
        left = "holds the last finite parameters" if saved else "is still empty"
        raise NotFinite(
            f"updates of {skipped} steps in a row, up to step {step} of seed {seed}, were not "
            f"finite (the last in {what}); training stopped, and {self.workdir.checkpoints} "
            f"{left}. Try a lower --train.learning-rate in another --workdir"
        )

    def _report(self, step, report):
        """Writes the figures of an evaluation, and draws its counts."""
        counts = {name: v for name, v in report.items() if isinstance(v, np.ndarray)}
        figures = {f"eval/{name}": v for name, v in report.items() if name not in counts}
        self._write({"step": step} | figures)
        if self.events is not None:
            for name, counted in counts.items():
                self.events.count(step, f"eval/{name}", counted)

    def _write(self, record):
        for log in self.logs:
            log.write(record)

    def _sync(self):
        if self.main:
            self.metrics.sync()

    def _preview(self, state, step):
        shown = self.preview(step, self._whole(state).ema)
        if self.events is not None:
            self.events.show(step, shown)

    def _whole(self, state):
        """With an average, which is the tree itself where none is kept."""
        if state.ema is not None:
            return state
        return state.replace(ema=self.trainable.averaged(state.state))

    def _save(self, state, step):
        self._sync()  # a run that goes on from here has the records up to here
        state = self._whole(state)
        trees = {
            "ema": state.ema,
            "state": state.state,
            "loop": {"step": state.step, "skipped": state.skipped},
        }
        checkpoint.save(self.workdir.checkpoints, step, trees, self.record, keep=self.config.keep)


def _is_due(step, every):
    return every > 0 and step % every == 0
