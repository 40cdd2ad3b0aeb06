"""Memory of the host: what a compiled program takes there, and what is left.

Where memory runs out on a CPU, the kernel or XLA ends the process without a word. What does not fit
is refused here instead, when it is compiled. Nothing is checked where a device has memory of its
own, whose allocator raises an error, nor where nobody says what a program takes or what is left.
"""

import contextlib
import math
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

__all__ = ["available", "check", "check_arrays", "check_call", "readable"]

_CHECKED: set[Any] = set()  # functions with structures, shapes and dtypes of their arguments
_MOST_CHECKED = 256


def check(what: str, program: Any) -> None:
    """Refuses a compiled program for CPUs that does not fit in what is left of their memory.

    Args:
      what: the program is, as in "a step of training".
      program: of `jax.stages.Compiled`; its arguments are taken to be in memory already.

    Raises:
      MemoryError: it does not fit; the message says what it takes and what is left.
    """
    import jax  # late: what is left of memory is asked without it

    from gen_jax import operations

    result = jax.tree.leaves(program.output_shardings)[0]
    analysis = program.memory_analysis()
    if any(device.platform != "cpu" for device in result.device_set) or analysis is None:
        return
    more = operations.peak_memory(program) - analysis.argument_size_in_bytes
    _refuse(what, len(result.addressable_devices) * more)


def check_call(what: str, function: Any, *arguments: Any) -> None:
    """Checks the program of a jitted function as `check` does, before it is first called.

    It is compiled once for both, and not looked at again for arguments of the same shapes. Inside
    of another program nothing is checked: that one counts.

    Args:
      what: the program is.
      function: of `jax.jit`.
      arguments: of the call.

    Raises:
      MemoryError: as `check` does.
    """
    import jax

    leaves, structure = jax.tree.flatten(arguments)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    kinds = [(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves]
    call = function, structure, tuple(kinds)
    if call not in _CHECKED:
        check(what, function.lower(*arguments).compile())
        if len(_CHECKED) == _MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED.add(call)


def check_arrays(what: str, tree: Any, copies: int) -> None:
    """Refuses arrays that do not fit in what is left of the memory of CPUs, before they are made.

    Args:
      what: the arrays are, as in "the state of training".
      tree: of arrays, or of their shapes and dtypes.
      copies: how many of each there will be, one for each device.

    Raises:
      MemoryError: they do not fit; the message says what they take and what is left.
    """
    import jax

    if jax.default_backend() == "cpu":
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        _refuse(what, copies * sum(sizes))


def _refuse(what, taken):
    left = available()
    if taken > left:
        raise MemoryError(f"{what} takes {readable(taken)} more, and {readable(left)} are left")


def available(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Bytes that this process may still take: of the machine, its control groups, and ulimit -v.

    Args:
      root: where proc and sys are.

    Returns:
      The least of those that can be read, not below 0; infinity where there are none.
    """
    return float(max(0, min(_rooms(root), default=math.inf)))


def readable(number: int | float) -> str:
    """A number of bytes in the unit that makes it short."""
    power = min(max(int(number).bit_length() - 1, 0) // 10, 3)
    return f"{number / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def _rooms(root: pathlib.Path) -> Iterator[int]:
    process = root / "proc/self"
    with contextlib.suppress(OSError):
        yield 1024 * _fields(root / "proc/meminfo")["MemAvailable"]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            pages = int((process / "statm").read_text().split()[0])
            yield most - pages * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        for line in (process / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                names = "memory.max", "memory.current", "inactive_file"
                yield from _rooms_of_groups(root / "sys/fs/cgroup", path, *names)
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _rooms_of_groups(root / "sys/fs/cgroup/memory", path, *names)


def _rooms_of_groups(mount, path, most, used, unused):
    """What a group and those around it leave; a container may see the outermost alone."""
    inner = mount / path.lstrip("/")
    for folder in (inner, *inner.parents):
        if not folder.is_relative_to(mount):
            return
        with contextlib.suppress(OSError):  # the root of version 2 has no limit
            limit = (folder / most).read_text().strip()
            if limit != "max":
                files = _fields(folder / "memory.stat")[unused]  # which the kernel can drop
                yield int(limit) - int((folder / used).read_text()) + files


def _fields(path):
    """Names and numbers of a file of lines as "name: number unit"."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
