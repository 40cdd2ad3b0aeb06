"""config.json of diffusers and transformers: how it is read, and refused; this loads no jax."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gen_jax.nn.config import DEEPEST, LARGEST

__all__ = [
    "CONFIG",
    "DEEPEST",
    "LARGEST",
    "MOST_PIXELS",
    "Refusals",
    "is_count",
    "naming",
    "refusal",
    "shown",
    "unknown",
]

CONFIG = "config.json"
MOST_PIXELS = 2**24
_SHOWN, _LISTED = 200, 20  # characters of a value, options that are unknown


def is_count(value: Any, most: int = LARGEST) -> bool:
    """Whether a value of config.json is a size, or a number of layers, that a network may have."""
    return type(value) is int and 1 <= value <= most


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Begins what is said of options with the file that has them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refusal(options: Mapping, key: str, supported: str) -> str:
    """What is said of an option whose value is not supported."""
    return f"{key}={shown(options[key])} (supported: {supported})"


def unknown(options: Mapping, known: Iterable[str]) -> list[str]:
    """What is said of the options that are not known; a name with an underscore is passed over."""
    names = sorted(key for key in options.keys() - set(known) if not key.startswith("_"))
    return [f"{shown(key)[1:-1]}={shown(options[key])} (unknown)" for key in names[:_LISTED]]


def shown(value: Any) -> str:
    """A value of config.json in a line, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Refusals:
    """What is said of those options that are not supported, in the order of the checks.

    Args:
      options: of config.json, with defaults for what it leaves out.

    Attributes:
      options: the same.
      problems: one line for each option that was refused.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.options, self.problems = options, []

    def unless(self, key: str, holds: bool | Callable[[Any], bool], supported: str) -> None:
        """Refuses the option of this name unless something holds, or holds of its value."""
        if not (holds(self.options[key]) if callable(holds) else holds):
            self.problems.append(refusal(self.options, key, supported))
