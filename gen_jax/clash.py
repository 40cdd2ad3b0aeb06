"""The name of our package `kernels` is also that of a Hugging Face package: which one is found?"""

import importlib.util
import os
import sys

__all__ = ["check_kernels"]

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def check_kernels() -> None:
    """Checks that `import kernels` gives the package of gen_jax. It imports nothing.

    Raises:
      ImportError: it gives another package, or none; one sentence says where it is found and what
        to do.
    """
    module = sys.modules.get("kernels")
    if module is not None:
        places = list(getattr(module, "__path__", []))
    else:
        spec = importlib.util.find_spec("kernels")
        places = list((spec and spec.submodule_search_locations) or [])
        if spec is not None and not places:
            places = [spec.origin or "an unknown place"]
    if any(os.path.isdir(os.path.join(place, "group_norm_silu")) for place in places):
        return
    if not places:
        raise ImportError(
            "gen_jax needs its package `kernels`, which is not found: "
            f"put {_ROOT} on the path, or install gen_jax"
        )
    raise ImportError(
        f"`import kernels` finds {places[0]}, the Hugging Face package of that name or a folder, "
        f"and not the package of gen_jax: put {_ROOT} first on the path, or uninstall the other one"
    )
