"""The cycles of a TPU program, counted in its machine code.

A TensorCore is in order and scheduled by the compiler: it issues one bundle of instructions in a
cycle, and stops only where it waits for a copy (DMA) or for a matrix unit. So its time follows
from the text of its bundles, which libtpu can dump for every fusion of XLA and every Pallas
kernel. The scalar unit alone decides which way a program goes: it is interpreted here, with its
registers, predicates and memory, while vectors are not. A copy takes its bytes over the bandwidth
and a latency; a matrix unit takes one row (or two) in a cycle, whatever the schedule hoped.

Two constants are fitted to the timings of matrix products on a v5e in the documentation of JAX
(docs/pallas/tpu/matmul), see tests/kernels/test_tpu_compiler.py. What comes out is an estimate
from machine code, and no measurement.
"""

import collections
import dataclasses
import functools
import operator
import pathlib
import re
from collections.abc import Callable

from kernels.machine.chips import Chip

__all__ = ["Walk", "walk"]

_LATENCY = 810  # cycles from the start of a copy to its first byte
_SLACK = 64  # cycles that the input of a matrix unit can be ahead of it
_DELAY = 4  # bundles after a branch that are issued before it is taken
_GRANULE = 32  # bytes, in which copies are counted
_TABLE = "-final_hlo-static-per-bundle-utilization.txt"
_LONGEST = 50_000_000  # bundles; a program that runs longer has been misunderstood

_WORD = 0xFFFFFFFF
_PARAMETER = 0x7A5A5A5  # stands for the address of any argument
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:LH|LB|LE|PB|PF|CT)? *: *>* *\{", re.M)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_SCALAR = re.compile(r"(?:(%[sp]\w+)[^=]*= )?(?:%?\w+ = )?([a-z]\w*(?:[.-]\w+)*)\s*(.*)$", re.S)
_GUARD = re.compile(r"\((!?%p\w+)\)(?:, |\s+|$)(.*)$", re.S)
_MATMUL = re.compile(r"\bvmatmul\S*?\.mxu(\d)")
_STORED = re.compile(r"(\[smem:.*?\]\]?)(?: \((!?%p\w+)\),)?\s+(\S+)$")
_BASE = re.compile(r"(?<=\w) \[#allocation\w+\]$")  # a remark on what an address is of
_IGNORED = ("int_to_ptr", "sphi", "pphi", "shalt", "inlined_call", "vsync", "vtrace", "compiler")


@dataclasses.dataclass(frozen=True)
class Walk:
    """What one kernel or fusion does from its first bundle to its last.

    Attributes:
      cycles: from start to end.
      bundles: issued ones; the other cycles are waits.
      copy_wait: cycles for which it waits for copies.
      matrix_wait: cycles for which it waits for matrix units.
      matrix: cycles for which the busiest matrix unit works.
      hbm_bytes: copied from and to HBM.
      spills: vector registers that were stored for want of room, as often as that happened.
      slots: the share of its places in the bundles that each unit has used, by the name of the
        unit: MXU, XLU (across lanes), VALU, VPOP (results of the MXU), EUP (exponentials), VLOAD,
        VSTORE and SALU. What is near 1 is what the program waits for.
      unknown: what was not understood, with the number of times; empty for most programs.
    """

    cycles: int
    bundles: int
    copy_wait: int
    matrix_wait: int
    matrix: int
    hbm_bytes: int
    spills: int
    slots: dict[str, float]
    unknown: dict[str, int]


def walk(path: pathlib.Path, chip: Chip, scalar: int | None = None) -> Walk:
    """Follows the program in a file `*-final_bundles.txt`.

    Args:
      path: of the file.
      chip: that it was compiled for.
      scalar: the value of all numbers that the scalar unit gets from arguments, lengths say. With
        None they are not known, and a copy that depends on one counts as made.

    Raises:
      ValueError: the file has no bundles.
    """
    core = _Core(chip, scalar)
    program, regions = _parse(path.read_text(encoding="utf-8", errors="replace"), core)
    if not program:
        raise ValueError(f"{path} has no bundles")
    core.run(program, regions)
    slots, spills = _slots(path, core.counts)
    return Walk(
        cycles=round(core.now),
        bundles=core.issued,
        copy_wait=round(core.copy_wait),
        matrix_wait=round(core.matrix_wait),
        matrix=round(max(core.matrix_rows) / chip.rows),
        hbm_bytes=core.hbm_bytes,
        spills=spills,
        slots=slots,
        unknown=dict(core.unknown),
    )


def _slots(path, counts):
    """Used places of each unit, and stored registers, from the table that is dumped beside it."""
    stem = re.match(r"(.*)-\d+-final_bundles\.txt", path.name)[1]
    found = [
        table
        for table in path.parent.iterdir()
        if table.name.startswith(f"{stem}-") and table.name.endswith(_TABLE)
    ]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} tables of used slots beside it, not one")
    lines = found[0].read_text(encoding="utf-8").splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    places = [int(number) for number in lines[2].split()]
    rows = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    if len(rows) != len(counts):
        raise ValueError(f"{found[0]} has {len(rows)} rows for {len(counts)} bundles")
    used = dict.fromkeys(units, 0)
    for row, count in zip(rows, counts, strict=True):
        if count:
            for unit, number in zip(units, row, strict=True):
                used[unit] += number * count
    issued = sum(counts)
    capacity = dict(zip(units, places, strict=True))
    shares = {unit: used[unit] / issued / capacity[unit] for unit in units if ":" not in unit}
    return shares, used["VSTORE:SPILL"]


def _parse(text, core):
    """For each bundle its rows for the matrix units and its scalar work; the start of regions."""
    starts = list(_BUNDLE.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)] * bool(starts)
    program, regions = [], {}
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        raw = text[start.end() : end]
        for region in _REGION.findall(raw):
            regions.setdefault(int(region), place)
        code = _COMMENT.sub("", raw).rsplit("}", 1)[0]
        parts = [part.strip() for part in code.split(";;")]
        program.append((_rows(parts), tuple(filter(None, map(core.understand, parts)))))
    return program, regions


def _rows(parts):
    """((matrix unit, rows of the left operand), ...): eight of float32, sixteen of bfloat16."""
    rows = collections.Counter()
    for part in parts:
        found = _MATMUL.search(part)
        if found:
            packed = ".bf16" in found[0] and ".lmr." not in found[0]
            rows[int(found[1])] += 16 if packed else 8
    return tuple(rows.items())


def _signed(word):
    return word - (1 << 32) if word & 0x80000000 else word


_ARITHMETIC = {
    "sadd": operator.add,
    "scalar_lea": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sshll": lambda x, y: x << (y & 31),
    "sshrl": lambda x, y: x >> (y & 31),
    "sshra": lambda x, y: _signed(x) >> (y & 31),
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "smin": min,
    "smax": max,
}
_COMPARISON = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
# Of the three values of a predicate: None is one that is not known.
_LOGIC = {
    "por": lambda x, y: True if x or y else None if None in (x, y) else False,
    "pand": lambda x, y: False if False in (x, y) else None if None in (x, y) else True,
    "pxor": lambda x, y: None if None in (x, y) else x != y,
}
_LOGIC["pnor"] = lambda x, y: _negated(_LOGIC["por"](x, y))
_LOGIC["pnand"] = lambda x, y: _negated(_LOGIC["pand"](x, y))


def _negated(value):
    return None if value is None else not value


class _Core:
    """The scalar unit, the queue of copies and the clocks of the matrix units.

    The work of a bundle is a tuple of functions without arguments. One that computes a value
    returns (memory, place, value), to be stored after the others have read.
    """

    def __init__(self, chip: Chip, scalar: int | None):
        self.chip, self.scalar = chip, scalar
        self.registers, self.predicates, self.scalars = {}, {}, {}
        self.unknown = collections.Counter()
        self.now = self.copy_wait = self.matrix_wait = self.copies_end = 0.0
        self.issued = self.hbm_bytes = 0
        self.matrix_free, self.matrix_rows = [0.0] * 8, [0] * 8
        self.arrivals = collections.defaultdict(collections.deque)
        self.counts = []  # of each bundle, how often it was issued
        self.branch = None  # the region that is gone to, after the delay
        self._allocations = {}

    def run(self, program, regions):
        place, leave = 0, None
        self.counts = counts = [0] * len(program)
        free, rows_of, per_cycle = self.matrix_free, self.matrix_rows, self.chip.rows
        while place < len(program):
            rows, work = program[place]
            counts[place] += 1
            self.issued += 1
            self.now += 1
            if self.issued > _LONGEST:
                self.unknown["longer than any program"] += 1
                return
            for unit, number in rows:
                late = free[unit] - _SLACK - self.now
                if late > 0:
                    self.matrix_wait += late
                    self.now += late
                free[unit] = max(free[unit], self.now) + number / per_cycle
                rows_of[unit] += number
            if work:
                for memory, where, value in [done for do in work if (done := do()) is not None]:
                    memory[where] = value
            place += 1
            if self.branch is not None:
                leave, self.branch = (_DELAY + 1, self.branch), None
            if leave is not None:
                leave = (leave[0] - 1, leave[1])
                if not leave[0]:
                    if leave[1] not in regions:
                        self.unknown[f"no region {leave[1]}"] += 1
                        return
                    place, leave = regions[leave[1]], None

    def understand(self, text: str) -> Callable | None:
        """The work of one instruction, or None for one of the vector units."""
        match = _SCALAR.match(text)
        if not match:
            return None
        into, op, rest = match[1], match[2], match[3].strip()
        if op[0] == "v" or op.startswith(_IGNORED):
            return None
        rest = re.sub(r"\[thread:[^\]]*\],?\s*", "", rest)
        guard = _GUARD.match(rest)
        if guard:
            rest = guard[2].strip()
        condition = self._predicate(guard[1]) if guard else lambda: True
        if op.startswith("sbr"):
            return self._branch(op, rest, condition)
        if op.startswith("dma.done"):
            return self._wait(rest, condition)
        if op.startswith("dma."):
            return self._copy(op, rest, condition)
        if op == "sst":
            place, late, value = _STORED.match(rest).groups()
            condition = self._predicate(late) if late else condition
            return self._store(self.scalars, place, self._value(value), condition)
        if into is None:
            return None
        where = _physical(into)
        if into[1] == "p":
            return self._store(self.predicates, where, self._predicate_of(op, rest), condition)
        return self._store(self.registers, where, self._scalar_of(op, rest), condition)

    @staticmethod
    def _store(memory, where, value, condition):
        return lambda: (memory, where, value()) if condition() is not False else None

    def _branch(self, op, rest, condition):
        target = re.search(r"\$region(\d+)", rest)
        if op != "sbr.rel" or not target:
            return self._not_understood(op)
        region = int(target[1])

        def take():
            taken = condition()
            if taken is None:
                self.unknown["branch on what is not known"] += 1
            elif taken:
                self.branch = region

        return take

    def _wait(self, rest, condition):
        flag, size = map(self._value, rest.split(",")[:2])

        def wait():
            if condition() is False:
                return
            arrivals = self.arrivals[flag()]
            if not arrivals:
                self.unknown["wait for no copy"] += 1
                return
            arrival = arrivals.popleft()
            if not isinstance(arrival, float):  # of a size that is known now
                arrival = arrival(size())
            late = arrival - self.now
            if late > 0:
                self.copy_wait += late
                self.now += late

        return wait

    def _copy(self, op, rest, condition):
        parts = rest.split(",")
        size, flag = self._value(parts[1]), self._value(parts[3])
        in_hbm = "hbm" in op or op == "dma.general"
        per_cycle = self.chip.bytes_per_cycle * (1 if in_hbm else 4)

        def copied(granules, begin):
            if granules is None:
                self.unknown["copy of an unknown size"] += 1
                return begin + _LATENCY
            number = granules * _GRANULE
            self.hbm_bytes += number * in_hbm
            return begin + number / per_cycle + _LATENCY

        def copy():
            if condition() is False:
                return
            granules, begin = size(), max(self.now, self.copies_end)
            if granules is None:  # computed from arguments: the wait for it names it
                self.arrivals[flag()].append(functools.partial(copied, begin=begin))
            else:
                arrival = copied(granules, begin)
                self.copies_end = arrival - _LATENCY
                self.arrivals[flag()].append(arrival)

        return copy

    def _not_understood(self, op):
        def note():
            self.unknown[op] += 1

        return note

    def _value(self, text):
        """A function to a word, or to None where it is not known."""
        text = _BASE.sub("", text.strip())
        if re.fullmatch(r"-?\d+", text):
            return _constant(int(text) & _WORD)
        if re.fullmatch(r"\$?0x[0-9a-f]+", text):
            return _constant(int(text.lstrip("$"), 16))
        if text.startswith("%s"):
            registers, where = self.registers, _physical(text)
            return lambda: registers.get(where)
        allocation = re.match(r"\[#allocation(\w+)(?: \+ (\S+?))?\]", text)
        if not allocation:
            return _constant(None)
        base = self._allocations.setdefault(allocation[1], (len(self._allocations) + 1) << 20)
        if not allocation[2]:
            return _constant(base)
        offset = self._value(allocation[2])
        return lambda: None if offset() is None else (base + offset()) & _WORD

    def _predicate(self, text):
        """A function to True, False or None."""
        text = text.strip().strip("()")
        negative, text = text.startswith("!"), text.lstrip("!")
        if text in ("true", "1", "false", "0"):
            return _constant((text in ("true", "1")) != negative)
        predicates, where = self.predicates, _physical(text)
        if negative:
            return lambda: _negated(predicates.get(where))
        return lambda: predicates.get(where)

    def _predicate_of(self, op, rest):
        parts = [part.strip() for part in rest.split(",")]
        if op.startswith("scmp"):
            compare, unsigned = _COMPARISON[op.split(".")[1]], "u32" in op
            x, y = self._value(parts[0]), self._value(parts[1])

            def compared():
                a, b = x(), y()
                if a is None or b is None:
                    # A result that is to take the place of an argument does so.
                    return True if compare is operator.eq and _PARAMETER in (a, b) else None
                return compare(a, b) if unsigned else compare(_signed(a), _signed(b))

            return compared
        if op in _LOGIC:
            logic, x, y = _LOGIC[op], *map(self._predicate, parts[:2])
            return lambda: logic(x(), y())
        if op == "pneg":
            x = self._predicate(parts[0])
            return lambda: _negated(x())
        if op == "pmov":
            return self._predicate(parts[0])
        return self._unknown_value(op)

    def _scalar_of(self, op, rest):
        choice = re.match(r"\((!?%p\w+), (%s\w+)\), (.*)$", rest)
        if op == "smov" and choice:
            return self._choice(choice[1], choice[3], choice[2])
        if op == "smov":
            return self._value(rest)
        if op == "sld":
            place = re.match(r"(\[smem:.*\])", rest)[1]
            return lambda: self.scalars.get(place, self.scalar)
        if op == "scalar_parameter_address":
            return _constant(_PARAMETER)
        parts = [part.strip() for part in rest.split(",")]
        if op == "scalar_select":
            return self._choice(*parts)
        if op == "inlined_call_operand.hbm":
            return _constant(0x10000000)
        arithmetic = _ARITHMETIC.get(op.split(".")[0])
        if arithmetic is None or len(parts) != 2:
            return self._unknown_value(op)
        x, y = map(self._value, parts)
        # The address of an operand is not known, and does not matter: it counts as 0.
        base = 0 if op.startswith("scalar_lea") and op.endswith((".hbm", ".vmem")) else None

        def computed():
            a, b = x(), y()
            a = base if a is None else a
            return None if a is None or b is None else arithmetic(a, b) & _WORD

        return computed

    def _choice(self, predicate, true, false):
        predicate, true, false = self._predicate(predicate), self._value(true), self._value(false)

        def chosen():
            known = predicate()
            return None if known is None else true() if known else false()

        return chosen

    def _unknown_value(self, op):
        note = self._not_understood(op)

        def nothing():
            note()

        return nothing


def _constant(value):
    return lambda: value


def _physical(name):
    """The register: %s120379_s25 is in s25; one without a place has its own."""
    name = name.lstrip("%")
    return name.rsplit("_", 1)[-1] if "_" in name else "u" + name
