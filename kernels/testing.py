"""Cases of an operation: what every implementation computes, is tested on and is timed on.

The folder of an operation has a file `cases.py` with `SUITES`, one `Suite` for each operation in
it. The tests run `check` on every case with every implementation; `kernels.bench` times them.
"""

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels  # noqa: F401  it registers the operations
from kernels import dispatch
from kernels.dispatch import Implementation, fill_static, split_static

__all__ = [
    "Case",
    "Suite",
    "check",
    "check_peer",
    "gpus_are_interpreted",
    "interpreted_elsewhere",
    "is_for_gpus",
    "program",
    "suites",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Arguments of an operation, and how closely results agree.

    Attributes:
      name: a few words that are unique in the suite.
      arguments: positional arguments from a seed. Arrays have the same shapes for every seed, and
        Python numbers, which are static, the same values.
      options: keyword arguments.
      seeds: the number of seeds, from 0 on, that a check runs through; it compiles once.
      atol: the absolute tolerance of floats, or one for each of the results; 0 asks for equality.
      rtol: the relative tolerance of floats.
      dtype: of all floats in the result.
      gradient: places of the positional arguments whose gradients are compared with those of the
        reference, to ten times the tolerance.
      donated: places among the arrays of the arguments whose memory an estimated program may
        take for its results.
      scalar: the value of the numbers among the arguments that decide what a kernel does, as an
        estimate assumes it; None where there are none.
      large: whether the interpreter of GPUs would take more than seconds, so that it is left out.
    """

    name: str
    arguments: Callable[[int], tuple]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    atol: float | tuple[float, ...] = 0.0
    rtol: float = 0.0
    dtype: str = "float32"
    gradient: tuple[int, ...] = ()
    donated: tuple[int, ...] = ()
    scalar: int | None = None
    large: bool = False

    def __str__(self):
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """All cases of one operation.

    Attributes:
      op: its name in the registry.
      call: its public function, or one that passes positional arguments on to keywords of it;
        it takes `implementation` as well.
      cases: what the tests run; small.
      timed: what `kernels.bench` runs, after a check of each; of sizes that matter.
      definition: the results by NumPy in float64, independent of the reference; or None.
      peers: functions of jax that people would write instead, timed beside the implementations
        with the same arguments and options.
      estimated: what `kernels.estimate` compiles for chips that are not there, without running it.
    """

    op: str
    call: Callable
    cases: tuple[Case, ...]
    timed: tuple[Case, ...] = ()
    definition: Callable | None = None
    peers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    estimated: tuple[Case, ...] = ()

    def implementations(self) -> Mapping[str, Implementation]:
        """All registered implementations by name, the reference first."""
        return dispatch.operations()[self.op].implementations()

    def estimated_for(self, kernel: str) -> bool:
        """Whether there are estimates of a kernel of this name, "tpu" or "gpu"."""
        return bool(self.estimated) and kernel in self.implementations()


def suites() -> dict[str, Suite]:
    """The suites of all operations by name."""
    packages = {operation.package for operation in dispatch.operations().values()}
    modules = [importlib.import_module(f"{package}.cases") for package in sorted(packages)]
    found = [suite for module in modules for suite in module.SUITES]
    return {suite.op: suite for suite in sorted(found, key=lambda suite: suite.op)}


def program(run: Callable, case: Case, seed: int = 0) -> tuple[Callable, list]:
    """A jitted function of the arrays among the arguments of a case, and these arrays.

    Args:
      run: takes the arguments and the options.
      case: whose Python numbers become static.
      seed: of the arrays.
    """
    arrays, rest = split_static(case.arguments(seed))
    return jax.jit(lambda *arrays: run(*fill_static(arrays, rest), **case.options)), arrays


def check(suite: Suite, case: Case, implementation: str) -> str | None:
    """Compares one implementation with the definition and with the reference.

    The reference itself is compared with the definition alone. A kernel of another platform runs
    in the interpret mode of Pallas.

    Returns:
      None where the implementation computes the case, and else the reason for which it refuses,
      or for which it cannot be interpreted.

    Raises:
      AssertionError: results differ in structure, shape, dtype or by more than the tolerance.
    """
    run = functools.partial(suite.call, implementation=implementation)
    what = f"{suite.op}, {case}, {implementation}"
    entry = suite.implementations()[implementation]
    if is_for_gpus(entry) and not entry.runs_here:
        if case.large:
            return "takes long in the interpreter of GPUs"
        if not gpus_are_interpreted():
            return "needs jax 0.12, whose interpreter of GPUs knows transposed operands"
    jitted, _ = program(run, case)
    with interpreted_elsewhere(entry):
        for arguments, reference, definition in _expected(suite, case):
            try:
                is_reference = implementation == "reference"  # and has been computed
                got = reference if is_reference else jitted(*split_static(arguments)[0])
            except dispatch.Refusal as refusal:
                return refusal.reason
            if definition is not None:
                _assert_close(got, definition, case, f"{what}: not as defined", exact_type=False)
            _assert_close(got, reference, case, f"{what}: not the reference")
            for leaf in jax.tree.leaves(got):
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    assert leaf.dtype == case.dtype, f"{what}: {leaf.dtype}"
        if case.gradient and implementation != "reference":
            # Ten times the tolerance: a gradient is a sum over more rounded values.
            loose = dataclasses.replace(case, atol=10 * np.max(case.atol), rtol=10 * case.rtol)
            arguments = case.arguments(0)
            reference = functools.partial(suite.call, implementation="reference")
            got, expected = (_gradient(run, case, arguments) for run in (run, reference))
            _assert_close(got, expected, loose, f"{what}: gradient")
    return None


def check_peer(suite: Suite, case: Case, peer: str) -> None:
    """Compares the values of a peer with those of the reference.

    Raises:
      AssertionError: results differ in structure, shape or by more than the tolerance.
    """
    jitted, _ = program(suite.peers[peer], case)
    for arguments, reference, _ in _expected(suite, case):
        got = jitted(*split_static(arguments)[0])
        what = f"{suite.op}, {case}, {peer}: not the reference"
        _assert_close(got, reference, case, what, exact_type=False)


@functools.lru_cache(maxsize=1)
def _expected(suite, case):
    """For each seed the arguments, the results of the reference, and those of the definition."""
    reference, _ = program(functools.partial(suite.call, implementation="reference"), case)
    expected = []
    for seed in range(case.seeds):
        arguments = case.arguments(seed)
        definition = None
        if suite.definition is not None:
            definition = suite.definition(*arguments, **case.options)
        expected.append((arguments, reference(*split_static(arguments)[0]), definition))
    return expected


@contextlib.contextmanager
def interpreted_elsewhere(entry: Implementation) -> Iterator[None]:
    """Where the backend is not one of its platforms, Pallas interprets the implementation."""
    if entry.runs_here:
        yield
    elif is_for_gpus(entry):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        mode = plgpu.force_gpu_interpret_mode if gpus_are_interpreted() else contextlib.nullcontext
        with dispatch.any_platform(), mode(), warnings.catch_warnings():
            # It multiplies with NumPy, which warns of infinity times zero.
            warnings.filterwarnings("ignore", "invalid value encountered in matmul")
            yield
    else:
        from jax.experimental.pallas import tpu as pltpu

        with dispatch.any_platform(), pltpu.force_tpu_interpret_mode():
            yield


def is_for_gpus(entry: Implementation) -> bool:
    """Whether it is a Pallas kernel for GPUs."""
    return entry.only_on is not None and "cuda" in entry.only_on


def gpus_are_interpreted() -> bool:
    """Whether the Pallas that is installed interprets the kernels for GPUs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return hasattr(plgpu, "force_gpu_interpret_mode")


def _gradient(run, case, arguments):
    """Of a weighted sum of all floats in the result."""

    def total(*varied):
        filled = list(arguments)
        for place, value in zip(case.gradient, varied, strict=True):
            filled[place] = value
        leaves = jax.tree.leaves(run(*filled, **case.options))
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(
            jnp.vdot(jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)), leaf.ravel())
            for leaf in floats
        )

    varied = [arguments[place] for place in case.gradient]
    return jax.jit(jax.grad(total, argnums=tuple(range(len(varied)))))(*varied)


def _assert_close(got, expected, case, what, exact_type=True):
    if isinstance(case.atol, tuple):
        assert len(got) == len(expected) == len(case.atol), what
        parts = zip(got, expected, case.atol, strict=True)
    else:
        parts = [(got, expected, case.atol)]
    for one, other, atol in parts:
        if exact_type:
            assert jax.tree.structure(one) == jax.tree.structure(other), what
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert a.shape == np.shape(b), f"{what}: {a.shape} is not {np.shape(b)}"
            assert not exact_type or a.dtype == b.dtype, f"{what}: {a.dtype} is not {b.dtype}"
            if not jnp.issubdtype(a.dtype, jnp.floating):
                np.testing.assert_array_equal(a, b, err_msg=what)
            else:
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                np.testing.assert_allclose(a, b, rtol=case.rtol, atol=atol, err_msg=what)
