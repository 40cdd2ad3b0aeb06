"""Configurations: frozen dataclasses that check themselves, from the command line and from JSON.

Importing this module loads nothing heavy, so that a mistyped option is refused before jax starts.
"""

import dataclasses
import functools
import importlib
import json
import math
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

__all__ = [
    "LARGEST_BATCH",
    "AnyText",
    "Choice",
    "DistributedConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "added",
    "check_fields",
    "choices",
    "choices_of",
    "differences",
    "flatten",
    "from_dict",
    "frozen",
    "resolve",
    "to_dict",
]

AnyText = typing.NewType("AnyText", str)
"""Text in which null characters are allowed: no path, and no name."""
LARGEST_BATCH = 2**24  # of more, the indices alone would take the memory of a host


@typing.dataclass_transform(frozen_default=True)
def frozen(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass that refuses, at construction, values its annotations do not allow.

    A field of a number, bool, str, `Literal`, tuple of these, or another class is checked against
    its annotation; floats must be finite, and text has no null characters (see `AnyText`). What the
    annotation does not say (a range, how two fields go together) is for the `__post_init__` of the
    class, which runs after these checks.

    Raises:
      ValueError: at construction; the sentence names the field, the value, and what is allowed.
    """
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self):
        check_fields(self)
        if own is not None:
            own(self)
        elif (inherited := getattr(super(cls, self), "__post_init__", None)) is not None:
            inherited()

    cls.__post_init__ = __post_init__
    made = dataclasses.dataclass(frozen=True)(cls)
    made.__init__.__no_type_check__ = True  # it checks itself, and says what is allowed
    return made


def check_fields(value: Any) -> None:
    """Raises a ValueError where a field of a dataclass is not what its annotation says."""
    hints = _hints(type(value))
    for field in dataclasses.fields(value):
        problem = _problem(hints[field.name], getattr(value, field.name))
        if problem:
            raise ValueError(f"{field.name} must be {problem}, got {getattr(value, field.name)!r}")


@functools.cache
def _hints(kind, extras=False):
    return typing.get_type_hints(kind, include_extras=extras)


def choices_of(kind: type) -> dict[str, dict[str, type]]:
    """The fields of a configuration that are a choice, each with its options by name."""
    found = {name: choices(hint) for name, hint in _hints(kind, True).items()}
    return {
        field.name: found[field.name] for field in dataclasses.fields(kind) if found[field.name]
    }


_NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}


def _problem(hint, value):
    """What the annotation asks for where the value is not of it; else None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(repr, arguments))}"
    if hint in _NUMBERS:
        kind, name = _NUMBERS[hint]
        if not isinstance(value, kind) or isinstance(value, bool):
            return name
        if hint is int and not -(2**63) <= value < 2**63:
            return "a whole number of at most 64 bits"
        return None if hint is int or _is_finite(value) else "finite"
    if origin in (typing.Union, types.UnionType):
        problems = [_problem(argument, value) for argument in arguments]
        return None if None in problems else " or ".join(problems)
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            return f"a tuple of {len(inner)}"
        found = (_problem(one, item) for one, item in zip(inner, value, strict=True))
        return next((f"a tuple of which each entry is {what}" for what in found if what), None)
    if hint is str and isinstance(value, str) and "\0" in value:
        return "text without null characters"
    kind = str if hint is AnyText else origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return None
    if isinstance(value, kind):
        return None
    return "None" if kind is types.NoneType else f"of type {kind.__name__}"


def _is_finite(value):
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any float
        return False


def resolve(name: str | Callable) -> Callable:
    """The object that "module:attribute" names; a callable is itself.

    Raises:
      ValueError: there is no such module or attribute.
    """
    if callable(name):
        return name
    module, _, attribute = name.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ModuleNotFoundError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} names no module:attribute that can be imported") from error


@frozen
class TrainConfig:
    """The training loop and the optimiser; the defaults are those of DDPM on CIFAR-10."""

    steps: int = 800_000
    """Updates of the parameters in all, counting those before a resume."""
    batch: int = 128
    """Examples in one update, over all devices and hosts."""
    accumulate: int = 1
    """Slices that a batch is cut into, one after the other, to save memory."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Adam; or Muon (Jordan et al. 2024) for matrices and the kernels of convolutions, its steps as
    large as Adam's (2502.16982, section 2.2), and NAdam for all other parameters."""
    learning_rate: float = 2e-4
    """Peak rate of the optimiser."""
    warmup: int = 5000
    """Steps over which the rate rises linearly from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the rate does after the warm-up; cosine falls to `final_rate` at the last step."""
    final_rate: float = 0.0
    """The rate that the cosine ends at, as a share of the peak."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled decay (AdamW), of parameters of two or more axes only (with Muon of what it
    trains); 0 for none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    ema: float = 0.9999
    """Decay of the moving average of the parameters, which samples come from; 0 for no average."""
    ema_warmup: bool = False
    """Let the decay rise as (1 + step) / (10 + step) until it reaches `ema`."""
    seed: int = 0
    """Seed of initial parameters, order of the data, and noise."""
    log_every: int = 100
    """Steps from one record in metrics.jsonl to the next."""
    checkpoint_every: int = 5000
    """Steps from one checkpoint to the next."""
    evaluate_every: int = 0
    """Steps from one evaluation during training to the next; 0 for none."""
    preview_every: int = 0
    """Steps from one picture or text of samples, in the folder previews, to the next; 0: none."""
    preview: int = 16
    """Samples in each."""
    tensorboard: bool = False
    """Also write records and previews for TensorBoard (install gen_jax[tensorboard])."""
    keep: int = 3
    """Checkpoints kept, the newest ones."""
    max_skipped: int = 3
    """Updates in a row that may be skipped for a loss or gradient that is not finite."""

    def __post_init__(self):
        counts = (
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep",
            "preview",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "warmup", "preview"):
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be below 2**31, got {getattr(self, name)}")
        if self.batch > LARGEST_BATCH:
            raise ValueError(f"batch must be at most {LARGEST_BATCH}, got {self.batch}")
        counts = ("warmup", "evaluate_every", "preview_every", "max_skipped")
        for name in (*counts, "clip_norm", "learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate must be in [0, 1], got {self.final_rate}")
        if self.final_rate and self.decay != "cosine":
            raise ValueError(f"final_rate is for decay=cosine; decay is {self.decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide the batch ({self.batch})")


@frozen
class SampleConfig:
    """How many samples to draw; which strategy draws them is a configuration of its own."""

    number: int = 64
    """Samples to draw."""
    seed: int = 0
    """Seed of the samples; sample i depends on the seed and i alone."""
    micro_batch: int = 64
    """Most samples drawn at a time; 1 gives the lowest latency."""
    checkpoint: int = -1
    """Step of the checkpoint to sample and evaluate; -1 for the latest that is whole."""
    of: int = 0
    """Samples of the whole request, of which these are a part that another run takes over; or 0."""
    start: int = 0
    """Number of the first sample of a part."""
    parts: tuple[str, ...] = ()
    """Work directories with parts of this request, which need not be drawn again."""

    def __post_init__(self):
        if self.start < 0 or self.of < 0:
            raise ValueError(f"start and of must not be negative, got {self.start}, {self.of}")
        if self.start and not self.of:
            raise ValueError("start is of a part: give the number of all samples too, as of")
        if self.of and self.start + self.number > self.of:
            raise ValueError(
                f"samples {self.start} to {self.start + self.number - 1} are no part of {self.of}"
            )
        for name in ("number", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name} must be below 2**31, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.checkpoint < -1:
            raise ValueError(f"checkpoint must be a step, or -1, got {self.checkpoint}")


@frozen
class DistributedConfig:
    """How several hosts find each other; the defaults are one host alone."""

    coordinator: str = ""
    """host:port of process 0; empty for one process, "auto" where a cluster tells by itself."""
    processes: int = 1
    """Number of processes."""
    index: int = 0
    """Number of this process."""
    wait: float = 300.0
    """Seconds that processes wait for one another at the start."""
    patience: float = 30.0
    """Seconds of silence after which a process counts as gone, and all others end; one that dies is
    noticed at once."""

    def __post_init__(self):
        for name in ("wait", "patience"):
            if not getattr(self, name) >= 3:
                raise ValueError(f"{name} must be at least 3 s, got {getattr(self, name)}")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator not in ("", "auto") and not (host and port.isdecimal()):
            raise ValueError(f"coordinator must be host:port or auto, got {self.coordinator!r}")
        if not 0 <= self.index < self.processes:
            raise ValueError(f"index must be in [0, {self.processes}), got {self.index}")
        if self.processes > 1 and not self.coordinator:
            raise ValueError("several processes need a coordinator, host:port of process 0")


@frozen
class RunConfig:
    """What the configurations of all runs have; each task adds its own fields.

    Attributes:
      task: the name of the task, that is of its package in `gen_jax.tasks`; kept in config.json.
      pretrained: where parameters to start from are; a field of tasks that can start from some.
      kinds: the classes of all tasks that were imported, by name.
      make_task: "module:function", which makes the `task.Task` once the arguments are accepted.
      commands: what the command line offers; "train", "sample" and "evaluate" make up "all".
      resumable: dotted keys, or prefixes that end in a dot, of fields that may change on resume:
        how long, how often, how to sample; not what is learned.
    """

    workdir: str
    """Directory of the run: records, checkpoints, samples. A run in it is resumed."""
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    init_from: str = ""
    """Work directory of a run of the same kind: training starts from its averaged parameters."""

    task: ClassVar[str]
    pretrained: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type["RunConfig"]]] = {}
    make_task: ClassVar[str]
    commands: ClassVar[tuple[str, ...]] = ("train", "sample", "evaluate")
    resumable: ClassVar[tuple[str, ...]] = (
        "workdir",
        "sample.",
        "sampler",
        "sampler.",
        "evaluate.",
        "distributed.",
        "data.dir",
        "data.max_bytes",
        "data.max_pixels",
        "pretrained",
        "train.log_every",
        "train.checkpoint_every",
        "train.evaluate_every",
        "train.preview_every",
        "train.preview",
        "train.tensorboard",
        "train.keep",
        "train.max_skipped",
    )

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "task" in cls.__dict__:
            cls.kinds[cls.task] = cls

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> Any:
        """Reads the data that the phases need, before anything is written and jax is loaded.

        Args:
          workdir: the work directory, which may not exist yet.
          phases: the commands to come.

        Returns:
          What the function that makes the task gets as `Context.data`.

        Raises:
          ValueError, FileNotFoundError: data or files do not fit; the message says what to do.
        """
        return None

    def published(self, folder: str) -> dict[str, Any]:
        """The fields that a folder of published weights says: the sizes of its network.

        It is called for tasks with a field `pretrained`, before other arguments are read.

        Raises:
          ValueError, FileNotFoundError: the folder cannot be read.
        """
        return {}

    def splits(self, phases: tuple[str, ...]) -> tuple[str, ...]:
        """The splits of the data that the phases need, of "train" and "test"."""
        testing = "evaluate" in phases or ("train" in phases and self.train.evaluate_every)
        return ("train",) * ("train" in phases) + ("test",) * bool(testing)


class Choice:
    """Base of configurations of which one is chosen by name.

    A direct subclass is a choice, say that of a sampler, and annotates a field. Each of its own
    subclasses with a class attribute `name` is one of the options, from its definition on. The
    command line offers them as --field NAME, and their fields as --field.option.
    """

    name: ClassVar[str]
    kinds: ClassVar[dict[str, type]]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if Choice in cls.__bases__:
            cls.kinds = {}
        elif "name" in cls.__dict__:
            if cls.kinds.get(cls.name, cls).__qualname__ != cls.__qualname__:
                raise ValueError(f"{cls.name!r} is the name of {cls.kinds[cls.name].__qualname__}")
            cls.kinds[cls.name] = cls


def choices(hint: Any) -> dict[str, type]:
    """The options of a field with this annotation by name; empty where it is no `Choice`.

    A field whose options are those of several choices is annotated with `Annotated[Choice, A, B]`.
    """
    found = {}
    for kind in (hint, *typing.get_args(hint)):
        is_choice = isinstance(kind, type) and Choice in kind.__bases__
        found |= kind.kinds if is_choice else {}
    return found


def to_dict(config: Any) -> dict:
    """A dataclass of dataclasses as nested dictionaries, tuples as lists.

    A field that is a `Choice` also says which one it is, under "name".
    """
    hints, values = _hints(type(config), True), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            name = {"name": value.name} if choices(hints[field.name]) else {}
            value = name | to_dict(value)
        values[field.name] = value
    return json.loads(json.dumps(values))


def from_dict(kind: type[T], values: Any) -> T:
    """The inverse of `to_dict`; a field that is missing takes its default.

    Raises:
      ValueError: a key is unknown, or a value is not of the field's type or range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} cannot be read from {values!r}: it must be an object")
    hints = _hints(kind, True)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no fields {unknown}; were they of another version?")
    try:
        return kind(**{name: _read(name, hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be read from {dict(values)}: {error}") from error


def _read(field, hint, value):
    if kinds := choices(hint):
        rest = dict(value) if isinstance(value, Mapping) else {}
        name = rest.pop("name", None)
        if name not in kinds:
            raise ValueError(
                f"{field} {name!r} is none of {', '.join(kinds)}; where it is your own, name the "
                f"file that defines it: --{field} MODULE:CLASS"
            )
        return from_dict(kinds[name], rest)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if typing.get_origin(hint) is tuple and isinstance(value, list) else value


def added(kind: type, stored: Mapping) -> dict[str, Any]:
    """Dotted keys and defaults of the fields that a stored configuration is too old to have."""
    found, hints = {}, _hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in stored:
            if isinstance(stored[field.name], Mapping) and dataclasses.is_dataclass(
                hints[field.name]
            ):
                found[field.name] = added(hints[field.name], stored[field.name])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return flatten(json.loads(json.dumps(found, default=to_dict)))


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(stored: Mapping, current: Mapping, free: Sequence[str] = ()) -> list[str]:
    """What has changed between two configurations given as dictionaries.

    Args:
      stored: the older one.
      current: the newer one.
      free: dotted keys, or prefixes that end in a dot, which may change.

    Returns:
      One line "key: stored -> current" for each dotted key that differs.
    """
    old, new = flatten(stored), flatten(current)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if any(key == item or (item.endswith(".") and key.startswith(item)) for item in free):
            continue
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return lines
