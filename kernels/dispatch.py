"""The registry of implementations, and the choice among them.

An operation has a folder in this package. Every Python file of that folder is a possible backend:
it registers what it implements with `register`, and is imported when the operation is first
called. The file `reference.py` registers the specification.

`kernels.<op>(..., implementation=None)` takes the default of the platform that the program is
compiled for; a name forces one implementation, which then runs or raises, and nothing else does.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

__all__ = [
    "EVERYWHERE",
    "PLATFORMS",
    "Implementation",
    "Operation",
    "Refusal",
    "any_platform",
    "fill_static",
    "leave_out",
    "operations",
    "platform",
    "prefer",
    "register",
    "split_static",
]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
EVERYWHERE = ("everywhere",)

_OPERATIONS: dict[str, "Operation"] = {}
_REGISTRY: dict[str, dict[str, "Implementation"]] = {}
_check_platform = True
_left_out: frozenset[str] = frozenset()
_preferred: frozenset[str] = frozenset()


def platform() -> str:
    """The default backend as programs are lowered for it: JAX calls CUDA and ROCm both "gpu"."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


class Refusal(NotImplementedError):
    """A forced implementation that exists cannot take these arguments.

    Attributes:
      reason: words that follow the name of the implementation.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def _never_refuses(*arguments, **options) -> None:
    return None


def _always(*arguments, **options) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One entry of the registry. All functions take the arguments of the operation.

    Attributes:
      op: the name of the operation.
      name: what `implementation=` calls it.
      run: computes the operation.
      default_on: the platforms on which it is the default, or EVERYWHERE.
      default_when: whether it is the default for these arguments, where it does not refuse them.
      only_on: the platforms that it can be compiled for; None for all.
      refusal: the reason, as words that follow the name, why it cannot take these arguments, or
        None when it can. It reads shapes, dtypes and static options, and no values of arrays.
    """

    op: str
    name: str
    run: Callable
    default_on: tuple[str, ...] = ()
    default_when: Callable[..., bool] = _always
    only_on: tuple[str, ...] | None = None
    refusal: Callable[..., str | None] = _never_refuses

    def __post_init__(self):
        named = () if self.default_on == EVERYWHERE else self.default_on
        for platform in (*named, *(self.only_on or ())):
            if platform not in PLATFORMS:
                raise ValueError(
                    f"{self.op}: {self.name!r} is for {platform!r}, which is none of "
                    f"{', '.join(PLATFORMS)}"
                )
        if self.only_on is not None and not set(self.default_on) <= set(self.only_on):
            raise ValueError(f"{self.op}: {self.name!r} is the default where it cannot run")

    def reason(self, *arguments, **options) -> str | None:
        """Why a forced call raises: the refusal, or that it is not for this platform."""
        if _check_platform and not self.runs_here:
            return f"is compiled for {' and '.join(self.only_on)} only"
        return self.refusal(*arguments, **options)

    @property
    def runs_here(self) -> bool:
        """Whether it can be compiled for the default backend."""
        return self.only_on is None or platform() in self.only_on


def register(op: str, name: str, **entry: Any) -> Callable[[Callable], Callable]:
    """Decorates the function that implements `op` under `name`; see `Implementation`.

    Args:
      op: the name of the operation.
      name: the name of the implementation, which no other one of this operation has.
      **entry: `default_on`, `default_when`, `only_on`, `refusal` of `Implementation`.

    Raises:
      ValueError: a platform is unknown, or another function has this name.
    """

    def decorate(run: Callable) -> Callable:
        entries = _REGISTRY.setdefault(op, {})
        other = entries.get(name)
        if other is not None and _origin(other.run) != _origin(run):
            raise ValueError(f"{op} has two implementations {name!r}")
        entries[name] = Implementation(op, name, run, **entry)
        return run

    return decorate


def _origin(function):
    return function.__module__, function.__qualname__


@contextlib.contextmanager
def _set(**values):
    """The variables of this module have these values for a while."""
    before = {name: globals()[name] for name in values}
    globals().update(values)
    try:
        yield
    finally:
        globals().update(before)


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
    """Lets `implementation=` force a backend of another platform than the default one.

    This is for lowering a program for a platform that is absent, and for the interpret mode of
    Pallas. The choice of a default needs no such help: it is made when the program is lowered.
    """
    with _set(_check_platform=False):
        yield


@contextlib.contextmanager
def leave_out(*names: str) -> Iterator[None]:
    """Implementations of these names are no defaults, so that one can see what they are worth."""
    with _set(_left_out=frozenset(names)):
        yield


@contextlib.contextmanager
def prefer(*names: str) -> Iterator[None]:
    """Implementations of these names are the defaults wherever they take the arguments.

    This is how kernels that are no defaults are tried in a sampling loop.

    Raises:
      ValueError: no operation has an implementation of this name.
    """
    known = {name for operation in _OPERATIONS.values() for name in operation.implementations()}
    if unknown := set(names) - known:
        raise ValueError(f"no operation has an implementation {min(unknown)!r}")
    with _set(_preferred=frozenset(names)):
        yield


class Operation:
    """What the public function of an operation calls: it finds the implementation and runs it.

    Args:
      name: the name of the operation.
      package: `__name__` of the folder in which its backends are.
    """

    def __init__(self, name: str, package: str):
        self.name = name
        self.package = package
        self._loaded = False
        _OPERATIONS[name] = self

    def implementations(self) -> Mapping[str, Implementation]:
        """All registered implementations by name: the reference, then in the order of files."""
        if not self._loaded:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                if module.name != "cases":
                    importlib.import_module(f"{self.package}.{module.name}")
            self._loaded = True
        entries = sorted(_REGISTRY[self.name].items(), key=lambda item: item[1].run.__module__)
        return {"reference": _REGISTRY[self.name]["reference"], **dict(entries)}

    def __call__(self, implementation: str | None, *arguments: Any, **options: Any) -> Any:
        """Runs the implementation of this name, or the default of the platform for None.

        Raises:
          NotImplementedError: there is no such implementation; the message lists all.
          Refusal: it cannot take these arguments; the message says why, and lists those that can.
        """
        entries = self.implementations()
        if implementation is None:
            return self._run_default(self.defaults(*arguments, **options), arguments, options)
        if implementation not in entries:
            raise NotImplementedError(
                f"{self.name} has no implementation {implementation!r}; known: {', '.join(entries)}"
            )
        reason = entries[implementation].reason(*arguments, **options)
        if reason is not None:
            able = [name for name, e in entries.items() if not e.reason(*arguments, **options)]
            message = f"{self.name}: {implementation} {reason}; available: {', '.join(able)}"
            raise Refusal(message, reason)
        return entries[implementation].run(*arguments, **options)

    def defaults(self, *arguments: Any, **options: Any) -> dict[str, Implementation]:
        """What None stands for with these arguments.

        Of several defaults for one platform those that name the platform come before those that
        are for EVERYWHERE, and then those whose file comes first in the alphabet. The reference
        is the last.

        Returns:
          Under "default" what most platforms take, and under the name of a platform what that
          one takes instead.
        """
        entries = [_as_preferred(entry) for entry in self.implementations().values()]
        entries.sort(key=lambda entry: entry.name not in _preferred)
        able = [
            entry
            for entry in entries
            if entry.default_on
            and entry.name not in _left_out
            and entry.refusal(*arguments, **options) is None
            and entry.default_when(*arguments, **options)
        ]
        everywhere = [entry for entry in able if entry.default_on == EVERYWHERE]
        chosen = {"default": everywhere[0] if everywhere else self.implementations()["reference"]}
        for platform in PLATFORMS:
            for entry in able:
                if platform in entry.default_on:
                    chosen.setdefault(platform, entry)
        return chosen

    def or_else(self, otherwise: Callable, *arguments: Any, **options: Any) -> Any:
        """Runs the default of the platform or, where that is the reference, a function like it.

        This is for a caller that computes the same already, and better than the reference.
        """
        chosen = self.defaults(*arguments, **options)
        for platform, entry in chosen.items():
            if entry.name == "reference":
                chosen[platform] = dataclasses.replace(entry, run=otherwise)
        return self._run_default(chosen, arguments, options)

    def _run_default(self, chosen, arguments, options):
        if len(chosen) == 1:  # for one and all: the program has no trace of a choice
            return chosen["default"].run(*arguments, **options)
        arrays, rest = split_static((arguments, options))
        # One function for each entry, so that platforms which share it share a branch.
        branches = {entry.name: _branch(entry.run, rest) for entry in chosen.values()}
        branches = {platform: branches[entry.name] for platform, entry in chosen.items()}
        return jax.lax.platform_dependent(*arrays, **branches)


def _as_preferred(entry):
    if entry.name not in _preferred:
        return entry
    platforms = entry.only_on or EVERYWHERE
    return dataclasses.replace(entry, default_on=platforms, default_when=_always)


def _branch(run, rest):
    def branch(*arrays):
        arguments, options = fill_static(arrays, rest)
        return run(*arguments, **options)

    return branch


def operations() -> Mapping[str, Operation]:
    """All operations of the package by name."""
    return dict(sorted(_OPERATIONS.items()))


def split_static(tree: Any) -> tuple[list, Any]:
    """The arrays among the leaves of a tree, and what `fill_static` needs besides.

    Python numbers stay out of the arrays, so that they are static under jit.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    static = [None if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
    return arrays, (structure, is_array, static)


def fill_static(arrays: Any, rest: Any) -> Any:
    """The tree that `split_static` took apart, with these arrays."""
    structure, is_array, static = rest
    arrays = iter(arrays)
    leaves = [next(arrays) if own else leaf for own, leaf in zip(is_array, static, strict=True)]
    return jax.tree.unflatten(structure, leaves)
