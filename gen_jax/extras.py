"""The optional packages, which are imported here when they are used, and nowhere else."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(package: str, extra: str, user: str) -> ModuleType:
    """Imports a package that an extra of gen_jax installs.

    Args:
      package: its name, or that of one of its modules.
      extra: the extra that installs it, as in gen_jax[extra].
      user: what needs the package, the subject of the error.

    Raises:
      ValueError: the package is not installed; the sentence says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"{user} the package {name}: install gen_jax[{extra}]") from None
