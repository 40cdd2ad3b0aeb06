"""Arguments of a command line as fields of a configuration, and what is said of those that are not.

Nothing here imports jax.
"""

import contextlib
import copy
import dataclasses
import difflib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gen_jax import config as config_lib

__all__ = [
    "check_options",
    "has_field",
    "refusals_in_one_line",
    "take",
    "take_choices",
    "unchecked",
    "with_choices",
]

C = TypeVar("C")


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Turns the box that tyro draws around what it refuses into the message of a ValueError."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as end:
        if end.code in (0, None):
            raise
        message = _inside_of_box(drawn.getvalue()).removeprefix("Error parsing ")
        raise ValueError(f"{message} (see --help)") from None
    sys.stderr.write(drawn.getvalue())


def _inside_of_box(text):
    """What stands between the title of a box and its first rule; the whole text of no box."""
    if not text.startswith("╭"):
        return " ".join(text.split())
    lines = [line.strip("│╰╯─ ") for line in text.splitlines()[1:]]
    return " ".join(lines[: lines.index("")])


def take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, or None, and the arguments without it.

    Raises:
      ValueError: the option comes without a value.
    """
    rest, value, items = [], None, iter(argv)
    for item in items:
        if item == option:
            value = next(items, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
        elif item.startswith(f"{option}="):
            value = item.split("=", 1)[1]
        else:
            rest.append(item)
    return value, rest


def take_choices(argv: list[str], kind: type) -> tuple[dict[str, type], list[str]]:
    """The options chosen by name, as classes by field, and the arguments without them.

    Args:
      argv: the arguments.
      kind: the class of the configuration, whose fields may be a `config.Choice`.

    Raises:
      ValueError: a name is none of the options of its field.
    """
    chosen = {}
    for field, kinds in config_lib.choices_of(kind).items():
        name, argv = take(argv, f"--{field}")
        if name is None:
            continue
        if ":" in name:  # importing it makes it known
            name = getattr(config_lib.resolve(name), "name", name)
            kinds = config_lib.choices_of(kind)[field]
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown --{field} {name!r}; did you mean {close[0]}? It is one of "
                f"{', '.join(kinds)}, or MODULE:CLASS"
            )
        chosen[field] = kinds[name]
    return chosen, argv


def with_choices(config: C, chosen: Mapping[str, type]) -> C:
    """The configuration with these options, each at its defaults where it is another than now."""
    changed = {f: kind() for f, kind in chosen.items() if type(getattr(config, f)) is not kind}
    return unchecked(config, changed)


def unchecked(config: C, fields: Mapping[str, Any]) -> C:
    """The configuration with these fields, which may need others that the arguments give."""
    changed = copy.copy(config)
    for field, value in fields.items():
        object.__setattr__(changed, field, value)
    return changed


def check_options(argv: list[str], config: Any) -> None:
    """Refuses an option that is no field of the configuration, and says which is closest.

    Raises:
      ValueError: there is one.
    """
    names = []
    for key, value in config_lib.flatten(config_lib.to_dict(config)).items():
        prefix, _, field = key.replace("_", "-").rpartition(".")
        prefix = f"--{prefix}." if prefix else "--"
        names += [prefix + field] + ([f"{prefix}no-{field}"] if isinstance(value, bool) else [])
    for item in argv:
        option = item.split("=", 1)[0].replace("_", "-")
        if not item.startswith("--") or option == "--help" or option in names:
            continue
        asked = _negated_where_it_counts(option.lower())
        close = [name for name in names if name == asked or _acronym(name) == asked]
        close += difflib.get_close_matches(asked, names, n=1, cutoff=0.0)
        raise ValueError(f"unknown option {item}; did you mean {close[0]}? (--help lists all)")


def _negated_where_it_counts(option):
    """--no-group.field as --group.no-field."""
    group, dot, field = option.removeprefix("--no-").rpartition(".")
    return f"--{group}.no-{field}" if dot and option.startswith("--no-") else option


def _acronym(name):
    prefix, dot, field = name.rpartition(".")
    return prefix + dot + "".join(word[0] for word in field.split("-") if word)


def has_field(config: Any, name: str) -> bool:
    """Whether a configuration has a field."""
    return any(field.name == name for field in dataclasses.fields(config))
