"""Configurations: frozen dataclasses, from the command line and from JSON.

Importing this loads nothing heavy, so that a mistyped option is refused before jax starts.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop; the defaults are those of DDPM on CIFAR-10."""

    steps: int = 800_000
    """Updates of the parameters in all, counting those before a resume."""
    batch: int = 128
    """Examples in one update, over all devices and hosts."""
    accumulate: int = 1
    """Slices that a batch is cut into, one after the other, to save memory."""
    learning_rate: float = 2e-4
    """Peak rate of Adam."""
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
    """Decoupled decay (AdamW), of parameters of two or more axes only; 0 for none."""
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
    keep: int = 3
    """Checkpoints kept, the newest ones."""
    max_skipped: int = 3
    """Updates in a row that may be skipped for a loss or gradient that is not finite."""

    def __post_init__(self):
        positive = ("steps", "batch", "accumulate", "log_every", "checkpoint_every", "keep")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = ("warmup", "evaluate_every", "max_skipped")
        for name in (*counts, "clip_norm", "learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite, not negative, got {getattr(self, name)}")
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


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How several hosts find each other; the defaults are one host alone."""

    coordinator: str = ""
    """host:port of process 0; empty for one process, "auto" where a cluster tells by itself."""
    processes: int = 1
    """Number of processes."""
    index: int = 0
    """Number of this process."""

    def __post_init__(self):
        if not 0 <= self.index < self.processes:
            raise ValueError(f"index must be in [0, {self.processes}), got {self.index}")
        if self.processes > 1 and not self.coordinator:
            raise ValueError("several processes need a coordinator, host:port of process 0")


def to_dict(config: Any) -> dict:
    """A dataclass of dataclasses as nested dictionaries, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping) -> T:
    """The inverse of `to_dict`; a field that is missing takes its default.

    Raises:
      ValueError: a key is unknown, or a value is not of the field's type or range.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no fields {unknown}; were they of another version?")
    try:
        return kind(**{name: _read(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be read from {dict(values)}: {error}") from error


def _read(hint, value):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if typing.get_origin(hint) is tuple else value


def added(kind: type, stored: Mapping) -> dict[str, Any]:
    """Dotted keys and defaults of the fields that a stored configuration is too old to have."""
    found = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in stored:
            if isinstance(stored[field.name], Mapping):
                found[field.name] = added(hints[field.name], stored[field.name])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return flatten(json.loads(json.dumps(found, default=dataclasses.asdict)))


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
