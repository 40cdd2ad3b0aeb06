"""How often a compiled program runs each of its kernels.

A compiler of TPUs makes machine code once for kernels that are alike, such as those of the layers
of a transformer. The frame of a program says which instruction of the HLO each call is; those
without machine code of their own are matched here with one that is alike.
"""

import collections
import re
from collections.abc import Collection

__all__ = ["count"]

_CALL = re.compile(r"\binlined_call\b[^;{}]*/\* %([\w.\-]+) = ")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_REMARK = re.compile(r", (?:metadata|backend_config|frontend_attributes|sharding)=.*$")
_NAME = re.compile(r"%[\w.\-]+")


def count(frame: str, hlo: str, known: Collection[str]) -> tuple[dict[str, int], int]:
    """The number of calls of each kernel with machine code.

    Args:
      frame: the bundles of the frame, with their comments.
      hlo: the text of the compiled program.
      known: names of the kernels that there is machine code of.

    Returns:
      The number of calls by name, and that of calls of what is like none of them.
    """
    lines, bodies = _read(hlo)
    by_form = {_form(name, lines, bodies): name for name in known if name in lines}
    calls, strange = collections.Counter(), 0
    for name in _CALL.findall(frame):
        own = name if name in known else by_form.get(_form(name, lines, bodies))
        if own is None:
            strange += 1
        else:
            calls[own] += 1
    return dict(calls), strange


def _read(hlo):
    """The right side of each instruction by its name, and the lines of each computation by its."""
    lines, bodies, body = {}, {}, []
    for line in hlo.splitlines():
        computation = _COMPUTATION.match(line)
        instruction = _INSTRUCTION.match(line)
        if computation:
            body = bodies.setdefault(computation[1], [])
        elif instruction:
            lines[instruction[1]] = _REMARK.sub("", instruction[2])
            body.append(lines[instruction[1]])
    return lines, bodies


def _form(name, lines, bodies):
    """What two instructions have in common whose machine code is the same."""
    line = lines.get(name)
    if line is None:
        return None
    operands = [lines.get(operand[1:], "").split(" ")[0] for operand in _NAME.findall(line)]
    called = re.search(r"calls=%([\w.\-]+)", line)
    body = [_NAME.sub("%", inner) for inner in bodies.get(called[1], [])] if called else []
    kernel = name.split(".")[0] if " custom-call(" in line else ""
    return kernel, _NAME.sub("%", line), tuple(operands), tuple(body)
