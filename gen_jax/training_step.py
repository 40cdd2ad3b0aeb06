"""One step of training: what is trained, its state, and the update on all devices.

`Trainable` says how one batch changes a state. The step adds what all of them share: keys of the
examples, agreement of the devices, the moving average, and the guard against values that are not
finite.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, no_type_check, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from gen_jax import keys, parallel
from gen_jax.config import TrainConfig
from gen_jax.trees import named_leaves

__all__ = ["TrainState", "Trainable", "abstract_state", "init_state", "make_step"]

_OURS = ("examples_per_second", "skipped", "step", "stop")  # names that the loop gives to metrics


@runtime_checkable
class Trainable(Protocol):
    """What `fit` trains: a state, and how one batch changes it; hashable, as models are.

    It may also have `replace_averaged(state, tree) -> state`, the state at the start with another
    tree in the place of `averaged`, for training from given values (see `fit`), an attribute
    `accumulate`, the number of slices that it cuts its share of the batch into (1 without it), and
    an attribute `shared`, names of entries of the batch that are not one for each example.

    Attributes:
      rules: how devices agree on the entries of the state that an update changes on each device by
        itself: by the name of the entry, "mean" (the entry, of floats, is averaged over devices) or
        "sum" (the changes are: old + sum of (new - old)). An entry that is not named, or is "same",
        must be equal on every device already; that is checked when the update is traced.
    """

    rules: Mapping[str, str]

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """The state before the first step: trees of arrays by name; all that training carries.

        It is traced where only the shapes are needed.
        """

    def update(
        self, state: dict[str, Any], batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The state after one step, and metrics of it.

        It is written for one device's share of the batch; `parallel.mean` and `parallel.sum` join
        the devices, and `trainables.mean_gradients` does so for gradients.

        Args:
          state: of the same structure, shapes and dtypes before and after.
          batch: arrays [B, ...], B examples of this device.
          keys: one per example, for all that is random in the step.

        Returns:
          The new state, and scalars by name, among them "loss"; metrics that differ from device to
          device are averaged. The loop keeps the new state where all metrics, and all entries that
          have a rule, are finite.
        """

    def averaged(self, state: dict[str, Any]) -> Any:
        """The part of the state that the moving average is taken of and samples come from."""


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step.

    Attributes:
      state: of the Trainable.
      ema: moving average of `Trainable.averaged(state)`, the same structure; None inside the loop
        where `TrainConfig.ema` is 0, and it is that tree itself.
      step: int32, updates tried so far.
      skipped: int32, updates skipped in a row, up to now, for values that were not finite.
    """

    state: dict[str, Any]
    ema: Any
    step: Any
    skipped: Any


def init_state(config: TrainConfig, trainable: Trainable, initial: Any | None = None) -> TrainState:
    """The state before the first step; the average starts at what it is taken of.

    Args:
      config: its seed.
      trainable: what is to be trained.
      initial: what to start from in the place of `trainable.averaged`, or None.

    Raises:
      ValueError: the trainable cannot start from given values, or these are of another structure,
        shape or dtype than its own.
    """
    if initial is not None:
        expected = trainable.averaged(abstract_state(config, trainable).state)
        _check_like("initial", expected, initial)
    return _beginning(config, trainable)(initial)


def abstract_state(config: TrainConfig, trainable: Trainable) -> TrainState:
    """Shapes and dtypes of `init_state`, as `jax.ShapeDtypeStruct`; nothing is computed."""
    return _beginning(config, trainable).eval_shape(None)


@functools.lru_cache(maxsize=16)  # so that it is traced once for shapes and values
def _beginning(config, trainable):
    # One program, which runs once: on CPUs LLVM's optimisations take longer than they save.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(functools.partial(_begin, config, trainable), compiler_options=options)


def _begin(config, trainable, initial):
    state = trainable.init(keys.root(config.seed, "init"))
    if initial is not None:
        state = trainable.replace_averaged(state, initial)
    state = jax.tree.map(jnp.asarray, state)
    ema = jax.tree.map(jnp.copy, trainable.averaged(state))
    return TrainState(state, ema, step=jnp.int32(0), skipped=jnp.int32(0))


def make_step(trainable: Trainable, config: TrainConfig, mesh: Mesh) -> Callable:
    """The compiled update: (TrainState, batch, stop) -> (TrainState, metrics).

    `batch` is split over the mesh (see `parallel.split`); `stop` is int32 [devices], and the
    metric "stop" is its maximum, by which all hosts agree to stop after the same step. The state
    is donated (see `parallel.map_devices`); where its `ema` is None, none is kept.

    Raises:
      ValueError: a rule of the trainable is unknown; when it is traced, its update is not as
        `Trainable.update` says.
    """
    for name, rule in trainable.rules.items():
        if rule not in ("mean", "sum", "same"):
            raise ValueError(f"the rule of {name!r} must be 'mean', 'sum' or 'same', got {rule!r}")
    step = functools.partial(_device_step, trainable, config)
    return parallel.map_devices(
        mesh, step, (P(), P(parallel.AXIS), P(parallel.AXIS)), (P(), P()), donate=(0,)
    )


def _device_step(trainable, config, state, batch, stop):
    shared = getattr(trainable, "shared", ())
    size = next(len(value) for name, value in batch.items() if name not in shared)
    first = jax.lax.axis_index(parallel.AXIS) * size
    step_key = jax.random.fold_in(keys.root(config.seed, "train"), state.step)
    examples = keys.of_items(step_key, first + jnp.arange(size))
    new, metrics = trainable.update(state.state, batch, examples)
    metrics = _joined_metrics(metrics)
    new = _joined_state(trainable.rules, state.state, jax.tree.map(jnp.asarray, new))

    finite = _all_finite(metrics) & _all_finite({name: new[name] for name in trainable.rules})
    ema = state.ema
    if ema is not None:
        decay = config.ema
        if config.ema_warmup:
            decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema = _moving_average(ema, trainable.averaged(new), decay)
    new, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (new, ema), (state.state, state.ema)
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    stop = jax.lax.pmax(stop.max(), parallel.AXIS)
    state = TrainState(new, ema, state.step + 1, skipped)
    return state, metrics | {"skipped": skipped, "stop": stop}


def _joined_metrics(metrics):
    """Scalars that are equal on every device."""
    if "loss" not in metrics:
        raise ValueError(f"the metrics of an update need a 'loss', got {sorted(metrics)}")
    joined = {}
    for name, value in metrics.items():
        if name in _OURS or jnp.shape(value) != ():
            raise ValueError(
                f"the metric {name!r} must be a scalar, and have another name than "
                f"{', '.join(_OURS)}; its shape is {list(jnp.shape(value))}"
            )
        value = jnp.asarray(value)
        joined[name] = parallel.mean(value) if parallel.is_varying(value) else value
    return joined


def _joined_state(rules, old, new):
    """The state that all devices have after an update, by the rules of its entries."""
    _check_like("the state after an update", old, new)
    unknown = [name for name in rules if name not in old]
    if unknown:
        raise ValueError(f"there are rules of {unknown}, but the state has {sorted(old)}")
    return {
        name: jax.tree.map_with_path(
            functools.partial(_joined_leaf, name, rules.get(name, "same")), old[name], new[name]
        )
        for name in old
    }


def _joined_leaf(name, rule, path, old, new):
    place = name + jax.tree_util.keystr(path)
    if rule == "sum":
        if new.dtype == bool:
            raise ValueError(f"the rule 'sum' is of numbers, but {place} is bool")
        return old + parallel.sum(new - old)
    if rule == "mean":
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            raise ValueError(f"the rule 'mean' is of floats, but {place} is {new.dtype}")
        return parallel.mean(new)
    if parallel.is_varying(new):
        raise ValueError(
            f"an update may give {place} another value on each device: join them in the update by "
            f"parallel.mean or parallel.sum, or give {name!r} one of the rules 'mean' and 'sum'"
        )
    return new


def _all_finite(tree):
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, finite, True)


def _moving_average(average, tree, decay):
    """Of the leaves that are floats; the others are those of the tree."""

    def one(old, new):
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        step_size = 1 - decay
        return (step_size * new + (1.0 - step_size) * old).astype(old.dtype)

    return jax.tree.map(one, average, tree)


def _check_like(what, expected, given):
    """Raises a ValueError where a tree is not of the structure, shapes and dtypes of another."""
    expected, given = named_leaves(expected), named_leaves(given)
    for name in sorted(expected.keys() ^ given.keys()):
        raise ValueError(f"{what} {'lacks' if name in expected else 'has an unknown'} {name}")
    for name, leaf in expected.items():
        kinds = [(jnp.shape(one), jnp.result_type(one)) for one in (leaf, given[name])]
        if kinds[0] != kinds[1]:
            texts = [f"{dtype}{list(shape)}" for shape, dtype in kinds]
            raise ValueError(f"{what} has {name} as {texts[1]}, not {texts[0]}")
