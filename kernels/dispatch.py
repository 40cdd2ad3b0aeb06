"""Which implementation of an operation runs."""

from collections.abc import Callable, Mapping


def select(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """The implementation of `op` named `implementation`, or the default one for None.

    Args:
      op: name of the operation, for the error message.
      implementation: None for the default, or a key of `available`.
      available: implementations by name; must contain "reference".

    Raises:
      NotImplementedError: `implementation` is not available; the message lists what is.
    """
    if implementation is None:
        return available["reference"]
    if implementation not in available:
        raise NotImplementedError(
            f"{op} has no implementation {implementation!r}; available: {', '.join(available)}"
        )
    return available[implementation]
