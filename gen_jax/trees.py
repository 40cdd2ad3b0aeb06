"""Trees of arrays by the names of their leaves."""

from typing import Any

import jax

__all__ = ["named_leaves"]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree in its order, by their places in it, as in "blocks.0.kernel"."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
