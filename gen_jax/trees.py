"""Trees of arrays by the names of their leaves."""

import hashlib
from typing import Any

import jax
import numpy as np

__all__ = ["digest", "named_leaves"]


def digest(tree: Any) -> str:
    """A hash of every leaf of a tree of arrays: its place, dtype, shape and bits."""
    total = hashlib.blake2b(digest_size=16)
    for name, leaf in named_leaves(tree).items():
        value = np.asarray(leaf)
        total.update(f"{name} {value.dtype.str}{value.shape}".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree in its order, by their places in it, as in "blocks.0.kernel"."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
