"""What the options of diffusers' networks of blocks have in common; importing this loads no jax."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from gen_jax.interop.config_json import DEEPEST, LARGEST, MOST_PIXELS, Refusals, is_count

__all__ = ["check_structure", "check_values", "sizes"]


def check_values(
    refusals: Refusals,
    down: Mapping[str, bool],
    up: Mapping[str, bool],
    plain: Callable[[Any], Any] = lambda name: name,
) -> None:
    """Refuses widths, depths and kinds of blocks that do not have the type or range of their kind.

    Args:
      refusals: of the options; it gets more.
      down, up: the kinds of blocks, and whether they have attention.
      plain: the name of a kind from what the file says.
    """
    refusals.unless(
        "layers_per_block",
        lambda value: is_count(value, DEEPEST),
        f"a positive integer up to {DEEPEST}",
    )
    refusals.unless(
        "block_out_channels",
        lambda value: isinstance(value, list) and 0 < len(value) < 20 and all(map(is_count, value)),
        f"a list of at most 19 positive integers up to {LARGEST}",
    )
    for key, kinds in (("down_block_types", down), ("up_block_types", up)):
        refusals.unless(
            key,
            lambda value, kinds=kinds: (
                isinstance(value, list)
                and all(isinstance(name, str) and plain(name) in kinds for name in value)
            ),
            f"a list of {' and '.join(kinds)}",
        )


def check_structure(refusals: Refusals, down: list[bool], up: list[bool]) -> None:
    """Refuses blocks and groups that do not fit the widths, and images that are too large.

    Args:
      refusals: of options whose values are of their kind; it gets more.
      down, up: whether each block has attention.
    """
    widths, groups = (refusals.options[key] for key in ("block_out_channels", "norm_num_groups"))
    refusals.unless("down_block_types", len(down) == len(widths), f"{len(widths)} blocks")
    refusals.unless(
        "up_block_types", up == down[::-1], "attention at the levels of down_block_types"
    )
    refusals.unless(
        "norm_num_groups",
        all(width % groups == 0 for width in widths),
        f"a divisor of every width {widths}",
    )
    most = DEEPEST // len(widths)
    refusals.unless("layers_per_block", lambda value: value <= most, f"at most {most} here")
    refusals.unless(
        "sample_size",
        lambda value: math.prod(sizes(value) or ()) <= MOST_PIXELS,
        f"at most {MOST_PIXELS} pixels",
    )


def sizes(value: Any) -> tuple[Any, ...] | None:
    """(height, width) of a `sample_size`; None for null or what is neither one number nor two."""
    if isinstance(value, list):
        return tuple(value) if len(value) == 2 else None
    return None if value is None else (value, value)
