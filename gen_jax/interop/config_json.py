"""config.json of diffusers and transformers: how it is read, and refused; this loads no jax."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CONFIG", "DEEPEST", "LARGEST", "Refusals", "is_count", "read_json", "refusal"]

CONFIG = "config.json"
# Larger sizes are no networks: memory, or the compiler, would end the process.
LARGEST, DEEPEST = 2**20, 2**10


def read_json(path: pathlib.Path) -> Any:
    """The content of a file of JSON.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def is_count(value: Any, most: int = LARGEST) -> bool:
    """Whether a value of config.json is a size, or a number of layers, that a network may have."""
    return type(value) is int and 1 <= value <= most


def refusal(options: Mapping, key: str, supported: str) -> str:
    """What is said of an option whose value is not supported."""
    return f"{key}={json.dumps(options[key])} (supported: {supported})"


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
