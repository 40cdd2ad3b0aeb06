"""JSON that knows whether it is what was written; importing this loads no jax."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gen_jax.bounded import parse_json

__all__ = ["seal", "unseal"]


def seal(content: Mapping[str, Any]) -> dict[str, str]:
    """The content as text, and a digest of it: an object of JSON again."""
    body = json.dumps(content)
    return {"body": body, "digest": _digest(body)}


def unseal(sealed: Any) -> dict[str, Any] | None:
    """The content that was sealed; None where it is another than was sealed.

    Raises:
      KeyError, TypeError, AttributeError, ValueError: it is nothing that `seal` returns.
    """
    body = sealed["body"]
    return parse_json(body) if _digest(body) == sealed["digest"] else None


def _digest(body):
    return hashlib.sha256(body.encode()).hexdigest()
