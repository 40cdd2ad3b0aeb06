"""TrainState, and the only training loop.

State is (params, EMA, optimiser state, step) and a seed; the batch of a step is a function of
(seed, step), and so is its randomness. A run that was cut off anywhere and resumed therefore ends
with the parameters of one that was not, bit for bit.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from gen_jax import checkpoint, keys, parallel
from gen_jax.config import TrainConfig
from gen_jax.workdir import MetricsLog, Workdir

# (params, batch, keys [B]) -> (scalar, metrics): means over the examples given.
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step.

    Attributes:
      params: tree of float32 arrays.
      ema: moving average of `params`, the same structure; None inside the loop where
        `TrainConfig.ema` is 0, and it is the parameters.
      optimizer: state of the Optax transformation.
      step: int32, updates tried so far.
      skipped: int32, updates skipped in a row, up to now, for values that were not finite.
    """

    params: dict
    ema: dict | None
    optimizer: optax.OptState
    step: jax.Array
    skipped: jax.Array


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


class Interrupted(Exception):
    """Training stopped for a signal, after saving; `signum` is the signal, `step` where it was."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class NotFinite(FloatingPointError):
    """Too many updates in a row had a loss or gradient that was not finite."""


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam with clipping of the global norm, linear warm-up, and the decays asked for.

    The decay of weights is that of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), of
    parameters of two or more axes; biases and the scales of normalisation are left alone.
    """
    rate = config.learning_rate
    if config.decay == "cosine":
        warmup, final = min(config.warmup, config.steps - 1), rate * config.final_rate
        rate = optax.warmup_cosine_decay_schedule(0, rate, warmup, config.steps, final)
    elif config.warmup:
        rate = optax.linear_schedule(0, rate, config.warmup)
    adam = optax.adam(rate, b1=config.beta1, b2=config.beta2)
    if config.weight_decay:
        matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
        adam = optax.adamw(
            rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=matrices
        )
    return (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam
    )


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        optimizer=optimizer.init(params),
        step=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh
) -> Callable:
    """The compiled update: (state, batch, stop) -> (state, metrics).

    `batch` is split over the mesh (see `parallel.split`); `stop` is int32 [devices], and the
    metric "stop" is its maximum, by which all hosts agree to stop after the same step. The state
    is donated; where its `ema` is None, none is kept.
    """
    step = functools.partial(_device_step, loss, optimizer, config)
    return parallel.map_devices(
        mesh, step, (P(), P(parallel.AXIS), P(parallel.AXIS)), (P(), P()), donate=(0,)
    )


def _device_step(loss, optimizer, config, state, batch, stop):
    size = jax.tree.leaves(batch)[0].shape[0]
    first = jax.lax.axis_index(parallel.AXIS) * size
    step_key = jax.random.fold_in(keys.root(config.seed, "train"), state.step)
    examples = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(first + jnp.arange(size))
    gradients, metrics = _gradients(loss, state.params, batch, examples, config.accumulate)
    gradients, metrics = jax.lax.pmean((gradients, metrics), parallel.AXIS)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = config.ema
        if config.ema_warmup:
            decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, ema, 1 - decay)
    updated = (params, ema, optimizer_state)
    kept = (state.params, state.ema, state.optimizer)
    params, ema, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, kept
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    stop = jax.lax.pmax(stop.max(), parallel.AXIS)
    state = TrainState(params, ema, optimizer_state, state.step + 1, skipped)
    return state, metrics | {"gradient_norm": norm, "skipped": skipped, "stop": stop}


def _gradients(loss, params, batch, keys, slices):
    """Mean gradient and metrics over this device's examples, a slice at a time."""
    # Varying over devices from here, so that gradients are summed once, at the end.
    params = jax.lax.pcast(params, parallel.AXIS, to="varying")

    def one(batch, keys):
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, keys)
        return gradients, metrics | {"loss": value}

    if slices == 1:
        return one(batch, keys)
    cut = lambda leaf: leaf.reshape(slices, -1, *leaf.shape[1:])  # noqa: E731
    batch, keys = jax.tree.map(cut, batch), cut(keys)
    total = one(jax.tree.map(lambda leaf: leaf[0], batch), keys[0])

    def add(total, some):
        return jax.tree.map(jnp.add, total, one(*some)), None

    rest = jax.tree.map(lambda leaf: leaf[1:], batch), keys[1:]
    total, _ = jax.lax.scan(add, total, rest)
    return jax.tree.map(lambda leaf: leaf / slices, total)


def fit(
    config: TrainConfig,
    loss: Loss,
    params,
    batch: Callable[[int], dict[str, np.ndarray]],
    workdir: Workdir,
    *,
    mesh: Mesh,
    record: dict | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    progress: bool | None = None,
) -> Trained:
    """Trains from the latest checkpoint in the work directory, or from `params`.

    SIGTERM and SIGINT finish the step, save, and raise `Interrupted`; a second signal ends the
    process at once. Losses are read one step late, so that the devices are never waited for.

    Args:
      config: of the loop.
      loss: of the model, see `Loss`.
      params: initial parameters.
      batch: this host's share of the batch of a step, as NumPy arrays. Each combination of shapes
        is compiled when it first comes.
      workdir: holds metrics.jsonl and the checkpoints.
      mesh: all devices.
      record: JSON values to keep in each checkpoint.
      evaluate: metrics of a state, logged every `config.evaluate_every` steps under "eval/".
      progress: show a bar with rate and time left; None to show it on a terminal only.

    Raises:
      ValueError: the batch does not divide over devices and slices.
      Interrupted: a signal came; the state is saved.
      NotFinite: more than `config.max_skipped` updates in a row were not finite; names step and
        seed. The last checkpoint is from before the first of them, or from a step whose own
        update was skipped, so that its parameters are finite.
    """
    if config.batch % (mesh.size * config.accumulate):
        raise ValueError(
            f"a batch of {config.batch} does not divide over {mesh.size} devices and "
            f"{config.accumulate} slices; choose a multiple of {mesh.size * config.accumulate}"
        )
    optimizer = make_optimizer(config)
    state = init_state(params, optimizer)
    if checkpoint.steps(workdir.checkpoints):
        state = _restore(workdir, state)
    start = int(state.step)
    _agree_on_start(start, workdir)
    if start >= config.steps:
        return Trained(state, start, 0.0, 0.0, 0.0)
    if not config.ema:
        state = state.replace(ema=None)
    state = parallel.replicate(mesh, state)
    loop = _Loop(config, workdir, record or {}, evaluate)
    with loop.open(start, progress), StopSignal() as stop:
        return loop.run(make_step(loss, optimizer, config, mesh), state, start, batch, mesh, stop)


def _agree_on_start(start, workdir):
    """Refuses hosts that would train from different steps."""
    if jax.process_count() > 1:
        starts = multihost_utils.process_allgather(np.int32(start))
        if len(set(starts.tolist())) > 1:
            raise ValueError(
                f"the hosts found different checkpoints, of steps {starts.tolist()}: "
                f"{workdir.path} must be one directory that all of them share"
            )


def _restore(workdir, state):
    restored = checkpoint.restore(workdir.checkpoints, _trees(state))
    return TrainState(
        **restored.trees["state"], **{n: restored.trees[n] for n in ("params", "ema")}
    )


def _whole(state: TrainState) -> TrainState:
    """With an average, which is the parameters themselves where none is kept."""
    return state.replace(ema=state.params) if state.ema is None else state


def _trees(state: TrainState) -> dict:
    state = _whole(state)
    rest = {"optimizer": state.optimizer, "step": state.step, "skipped": state.skipped}
    return {"params": state.params, "ema": state.ema, "state": rest}


class _Loop:
    """The part of `fit` that has side effects: records, checkpoints, the progress bar."""

    def __init__(self, config, workdir, record, evaluate):
        self.config, self.workdir, self.record = config, workdir, record
        self.evaluate = evaluate
        self.main = jax.process_index() == 0

    @contextlib.contextmanager
    def open(self, start, progress):
        """Opens the records and the bar for the time of the loop."""
        hidden = not (self.main and (sys.stderr.isatty() if progress is None else progress))
        total = self.config.steps
        self.log = MetricsLog(self.workdir.path / "metrics.jsonl", start) if self.main else None
        with tqdm(total=total, initial=start, desc="training", unit="step", disable=hidden) as bar:
            self.bar = bar
            try:
                yield
            finally:
                if self.log is not None:
                    self.log.close()

    def run(self, step_fn, state, start, batch, mesh, stop):
        """Takes the steps from `start` to the last."""
        flags = lambda: np.full(len(mesh.local_devices), stop.signum or 0, np.int32)  # noqa: E731
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
            every = self.config.evaluate_every
            if self.evaluate and every and done % every == 0:
                with self._apart():
                    report = self.evaluate(_whole(state))
                    self._write({"step": done} | _prefixed("eval/", report))
        seconds = time.perf_counter() - began - self.aside
        rate = (self.config.steps - start) * self.config.batch / seconds
        return Trained(_whole(state), start, self.compile_seconds, seconds, rate)

    def _program(self, step_fn, arguments):
        """The step compiled for a batch of these shapes, of which there are few."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1]))
        if shapes not in self.programs:
            with self._apart():
                began = time.perf_counter()
                self.programs[shapes] = step_fn.lower(*arguments).compile()
                self.compile_seconds += time.perf_counter() - began
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
        if skipped > self.config.max_skipped:
            saved = checkpoint.steps(self.workdir.checkpoints)
            left = "holds the last finite parameters" if saved else "is still empty"
            raise NotFinite(
                f"loss or gradient not finite in {skipped} steps in a row, up to step {step} of "
                f"seed {self.config.seed} (loss {metrics['loss']}); training stopped, and "
                f"{self.workdir.checkpoints} {left}. "
                "Try a lower --train.learning-rate in another --workdir"
            )
        if skipped:
            print(
                f"step {step}: loss or gradient not finite, update skipped "
                f"({skipped} in a row, seed {self.config.seed})",
                file=sys.stderr,
            )
        self.bar.update(step - self.bar.n)
        if step % self.config.log_every == 0 or step == self.config.steps:
            now = time.perf_counter()
            rate = (step - self.last_step) * self.config.batch / (now - self.last_time)
            self.last_step, self.last_time = step, now
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}")
            self._write({"step": step} | metrics | {"examples_per_second": round(rate, 2)})
        return signum

    def _write(self, record):
        if self.log is not None:
            self.log.write(record)

    def _save(self, state, step):
        checkpoint.save(
            self.workdir.checkpoints, step, _trees(state), self.record, keep=self.config.keep
        )


def _prefixed(prefix, metrics):
    return {prefix + name: value for name, value in metrics.items()}


class StopSignal:
    """Catches SIGTERM and SIGINT while open: the first is remembered, a second ends the process.

    Attributes:
      signum: the signal that came, or None.
    """

    def __init__(self):
        self.signum: int | None = None
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum, _frame):
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        name = signal.Signals(signum).name
        message = f"\n{name}: finishing the step and saving; once more to stop at once\n"
        os.write(sys.stderr.fileno(), message.encode())
