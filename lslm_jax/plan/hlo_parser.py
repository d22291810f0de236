"""A compiled program as XLA prints it, read back: its instructions, and how often each of them runs in a step."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\) -> .*\{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.$-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """One array of a shape; `local` where it lies in a memory next to the cores, not in the device's main one."""

    dtype: str
    dims: tuple[int, ...]
    local: bool

    @property
    def size(self) -> int:
        """Its bytes; 0 of what is no array."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return int(np.prod(self.dims, dtype=np.int64)) * bits // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: unique in its computation.
      opcode: as `all-gather-start`.
      arrays: its result; several where that is a tuple.
      operands: names of what it reads; of a constant or a parameter, its value or number.
      attributes: the rest of the line.
      root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of its result."""
        return sum(array.size for array in self.arrays)


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


class Run(NamedTuple):
    """An instruction, how often a step runs it, what else is in its computation, whether it is part of a fusion."""

    instruction: Instruction
    times: int
    among: Computation
    fused: bool


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, held = "", None, ""
    for line in text.splitlines():
        header = None if line.startswith((" ", "}")) else _HEADER.match(line)
        begins = _START.match(line)
        if (header or begins or line.strip() == "}") and held and current is not None:
            instruction = _instruction(held)
            current[instruction.name] = instruction
            held = ""
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif begins:
            held = line
        elif held and line.strip() != "}":
            held += line  # an attribute may have line breaks in it
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _START.match(line)
    assert match is not None
    rest = line[match.end() :]
    shape_end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opens = rest.index("(", shape_end)
    opcode = rest[shape_end:opens].strip()
    closes = opens + _closing(rest[opens:])
    operands = re.sub(r"/\*.*?\*/", "", rest[opens + 1 : closes - 1])
    names = re.findall(r"%([\w.$-]+)", operands) or ([operands.strip()] if operands.strip() else [])
    return Instruction(match[2], opcode, arrays(rest[:shape_end]), tuple(names), rest[closes:], bool(match[1]))


def _closing(text: str) -> int:
    """Where the parenthesis that a text begins with is closed again, and the next character is."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape: `f32[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such."""
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), re.search(r"S\([1-9]", layout) is not None)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def runs(program: Program) -> Iterator[Run]:
    """Every instruction that a step runs, fusions and what is in them as well."""
    yield from _runs(program, program.entry, 1, False)


def _runs(program: Program, name: str, times: int, fused: bool) -> Iterator[Run]:
    among = program.computations[name]
    for instruction in among.values():
        yield Run(instruction, times, among, fused)
        loops = trip_count(program, instruction, among) if instruction.opcode == "while" else 1
        if instruction.opcode in ("while", "call", "fusion", "conditional", "async-start"):
            inside = fused or instruction.opcode == "fusion"
            for called in called_by(instruction):
                yield from _runs(program, called, times * loops, inside)


def called_by(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; of a conditional all branches, of a loop its body."""
    branches = _BRANCHES.search(instruction.attributes)
    listed = re.findall(r"%?([\w.$-]+)", branches[1]) if branches else []
    return _CALLS.findall(instruction.attributes) + listed


def trip_count(program: Program, loop: Instruction, among: Computation) -> int:
    """How often a loop runs: as the compiler knows, or as its counter says, from its start by its step to its bound."""
    if known := _KNOWN.search(loop.attributes):
        return int(known[1])
    condition, body = (program.computations[_named(loop, key)] for key in ("condition", "body"))
    compared = next((i for i in condition.values() if i.root and i.opcode == "compare"), None)
    if compared is None or "direction=LT" not in compared.attributes:
        return 1
    counter, bound = (condition[name] for name in compared.operands)
    limit = _constant(condition, bound)
    place = re.search(r"index=(\d+)", counter.attributes)
    if limit is None or place is None:
        return 1
    begun = _part(among, among[loop.operands[0]], int(place[1]))
    after = _part(body, next(i for i in body.values() if i.root), int(place[1]))
    added = [_constant(body, body[name]) for name in after.operands if name in body] if after else []
    step = next((n for n in added if n), 1)
    start = (_constant(among, begun) if begun else 0) or 0
    return max(0, -(-(limit - start) // step))


def _named(instruction: Instruction, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.$-]+)", instruction.attributes)
    assert match is not None, f"{instruction.name} has no {key}"
    return match[1]


def _part(among: Computation, instruction: Instruction, index: int) -> Instruction | None:
    """What a tuple was made of, as far as that can be seen."""
    return among.get(instruction.operands[index]) if instruction.opcode == "tuple" else None


def _constant(among: Computation, instruction: Instruction) -> int | None:
    """A whole number, or a copy of one; None for anything else."""
    while instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in among:
        instruction = among[instruction.operands[0]]
    value = instruction.operands[0] if instruction.opcode == "constant" else ""
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def groups(attributes: str, size: int) -> np.ndarray:
    """Which devices a collective joins, [groups, devices of each]: by their place in the mesh, laid end to end.

    Args:
      attributes: of its instruction.
      size: devices of the mesh.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return np.array([pair for pair in _lists(pairs[1]) if pair[0] != pair[1]], int).reshape(-1, 2)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        return _mesh_groups(named[1], named[2], named[3])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        return np.array(_lists(listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])
    return np.arange(size)[None]  # none said: all


def _lists(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: numbers from 0 laid out like this, turned, end to end."""
    dims, turned = (re.findall(r"\d+", part) for part in (text + "T").split("T")[:2])
    numbers = np.arange(np.prod([int(n) for n in dims])).reshape([int(n) for n in dims])
    return (numbers.transpose([int(n) for n in turned]) if turned else numbers).ravel()


def _mesh_groups(axes: str, order: str | None, joined: str) -> np.ndarray:
    """Groups along axes of a mesh that the program names itself: `'a'=2,'b'=4`, an order of devices, `'b':(1)2`.

    An axis in parts is `name:(size of the parts before)size`.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape, place = [], {}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", joined)
    for name, size in sizes.items():
        before, part = next(((int(a), int(b)) for other, a, b in wanted if other == name and a), (1, size))
        place[name] = len(shape) + 1
        shape += [before, part, size // (before * part)]
    along = [place[name] for name, _, _ in wanted]
    devices = _iota(order) if order else np.arange(np.prod(shape))
    laid = np.moveaxis(devices.reshape(shape), along, range(-len(along), 0))
    return laid.reshape(-1, int(np.prod([shape[axis] for axis in along])))
