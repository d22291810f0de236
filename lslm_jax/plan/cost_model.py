"""What a compiled step costs one device: operations, bytes of its memory, bytes to other devices; loops multiplied out.

All are counted in the program that XLA made, so that what it computes twice, copies or sends needlessly counts too.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lslm_jax.plan import hlo_parser, matmul_flops
from lslm_jax.plan.hlo_parser import Computation, Instruction, Program, Run

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "optimization-barrier", "async-start", "async-update", "async-done"),
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Collective(NamedTuple):
    """One kind of exchange over the same axes, all of a step together.

    Attributes:
      kind: one of COLLECTIVES.
      axes: of the mesh, along which its groups lie.
      group: devices in one.
      count: how often a step runs it.
      bytes: that a device sends in a step.
      seconds: that this takes at least.
      network: whether it leaves the slice, or the host.
      blocking: of the seconds, those in which nothing else can run.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int
    seconds: float
    network: bool
    blocking: float


class Cost(NamedTuple):
    """Of one step, on one device.

    Attributes:
      flops: of matrix products and kernels, which are attention and, on TPUs, products of rows in groups.
      kernel_flops: those of kernels among them.
      bytes: read from and written to its memory.
      cycles: that the TPU compiler expects of all but collectives and kernels; 0 elsewhere.
      collectives: those of a step, most bytes first.
    """

    flops: float
    kernel_flops: float
    bytes: int
    cycles: int
    collectives: list[Collective]


def measure(program: Program, network: "Network", seen: float, routed: float) -> Cost:
    """Adds up a step.

    Args:
      program: from `hlo.parse`.
      network: that its devices are joined by.
      seen: share of a row that a query sees on average, of which attention kernels make use.
      routed: share of the rows that lie before a device's experts which go to them if all get the same; kernels over
        groups of rows work on no others.
    """
    flops, kernel, moved, cycles = 0.0, 0.0, 0, 0
    joined: dict[tuple, list[float]] = {}
    for run in hlo_parser.runs(program):
        instruction, times = run.instruction, run.times
        flops += times * matmul_flops.flops(run)
        kernel += times * (seen * matmul_flops.attention(run) + routed * matmul_flops.grouped(run))
        if not run.fused:
            moved += times * _moved(program, run)
            cycles += times * sum(map(int, _CYCLES.findall(instruction.attributes)))
        kind = _between_slices(instruction) or instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sent = network.send(kind, _operand_bytes(run), instruction.attributes)
            blocking = not (run.fused or instruction.opcode == "send" or instruction.opcode.endswith("-start"))
            totals = joined.setdefault((kind, sent.axes, sent.group, sent.network), [0, 0, 0.0, 0.0])
            for i, more in enumerate((1, sent.bytes, sent.seconds, sent.seconds * blocking)):
                totals[i] += times * more
    found = [
        Collective(kind, axes, group, int(count), int(size), seconds, outside, blocking)
        for (kind, axes, group, outside), (count, size, seconds, blocking) in joined.items()
    ]
    return Cost(flops + kernel, kernel, moved, cycles, sorted(found, key=lambda each: -each.bytes))


def _between_slices(instruction: Instruction) -> str:
    """The kind of a collective between slices, which the TPU compiler hands to a runtime of its own; or nothing."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return named[1].lower().replace("_", "-") if named and instruction.opcode == "send" else ""


class Sent(NamedTuple):
    """What one collective sends: see `Collective`."""

    axes: tuple[str, ...]
    group: int
    bytes: float
    seconds: float
    network: bool


class Network:
    """The mesh and the links between its devices."""

    def __init__(self, mesh: Any, domains: np.ndarray, link: Callable[[np.ndarray], float], slow: float):
        """Takes what is known of them.

        Args:
          mesh: the jax mesh.
          domains: number of the slice or host of each of its devices, laid end to end.
          link: bytes/s one way that a device has to these others of its domain, given by their places; 0: unknown.
          slow: bytes/s one way of a device to other domains.
        """
        self._names, self._shape = mesh.axis_names, mesh.devices.shape
        self._domains, self._link, self._slow = domains, link, slow
        self._groups: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}

    def send(self, kind: str, operand: int, attributes: str) -> Sent:
        """What a device sends in one collective.

        Rings, inside a domain and between domains: of g devices, each passes on g - 1 parts. The time is that of the
        slower of the two, both used as well as can be; so it is a bound.

        Args:
          kind: one of COLLECTIVES.
          operand: bytes that a device puts in.
          attributes: of the instruction.
        """
        groups, axes = self._joined(attributes)
        if groups.size == 0:
            return Sent((), 1, 0.0, 0.0, False)
        one = groups[0]
        g = len(one)
        many = max(
            len(np.unique(self._domains[group])) for group in (groups if kind == "collective-permute" else [one])
        )
        near = g / many
        if kind == "collective-permute":
            inside, outside = (0, operand) if many > 1 else (operand, 0)
        elif kind == "all-to-all":
            inside, outside = operand * (near - 1) / g, operand * (many - 1) / many
        else:
            whole = operand * {"all-gather": g, "reduce-scatter": 1, "all-reduce": 2}[kind]
            inside, outside = whole * (near - 1) / near, whole * (many - 1) / many / near
        link = self._link(one[self._domains[one] == self._domains[one[0]]])
        seconds = max(inside / link if link else 0.0, outside / self._slow if self._slow else 0.0)
        return Sent(axes, g, inside + outside, seconds, many > 1)

    def _joined(self, attributes: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Groups of a collective, and the axes of the mesh along which their devices differ."""
        slices = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', attributes)
        key = re.sub(r".*?((?:replica_groups|source_target_pairs)=.*)", r"\1", attributes, flags=re.DOTALL)[:4096]
        key = slices[0] if slices else key
        if key not in self._groups:
            groups = self._across(slices[1]) if slices else hlo_parser.groups(attributes, int(np.prod(self._shape)))
            places = np.stack(np.unravel_index(groups, self._shape))  # [axes, groups, devices of each]
            differ = (places != places[:, :, :1]).any(axis=(1, 2)) if groups.size else np.zeros(len(self._shape), bool)
            axes = tuple(name for name, varies in zip(self._names, differ, strict=True) if varies)
            self._groups[key] = groups, axes
        return self._groups[key]

    def _across(self, slices: str) -> np.ndarray:
        """Each device of a slice with its like in others: `1,2` or `1:4`, numbered from 1."""
        ends = [list(map(int, part.split(":"))) for part in slices.split(",")]
        wanted = np.unique(self._domains)[[n - 1 for part in ends for n in range(part[0], part[-1] + 1)]]
        return np.stack([np.flatnonzero(self._domains == domain) for domain in wanted], axis=1)


def _operand_bytes(run: Run) -> int:
    return sum(run.among[name].size for name in run.instruction.operands if name in run.among)


def _moved(program: Program, run: Run) -> int:
    """Bytes of the device's memory that an instruction reads and writes; of slices, only what they are of."""
    instruction, among = run.instruction, run.among
    opcode = instruction.opcode
    if opcode in _FREE or (opcode.endswith("-start") and not _is_collective(opcode)):
        return 0
    written = _outside(instruction)
    if opcode in ("copy-done", "dynamic-slice", "slice", "gather"):
        return 2 * written
    if opcode.endswith("-done"):
        return 0
    if opcode == "dynamic-update-slice":
        return 2 * _outside(among[instruction.operands[1]])
    if opcode == "fusion" and (called := hlo_parser.called_by(instruction)):
        return _fusion(program.computations[called[0]], instruction, among)
    read = sum(_outside(among[name]) for name in instruction.operands if name in among)
    return read + (0 if _is_collective(opcode) else written)


def _is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start") in COLLECTIVES


def _outside(instruction: Instruction) -> int:
    return sum(array.size for array in instruction.arrays if not array.local)


def _fusion(inside: Computation, fusion: Instruction, among: Computation) -> int:
    parameters = {int(i.operands[0]): i for i in inside.values() if i.opcode == "parameter"}
    total = 0
    for number, name in enumerate(fusion.operands):
        if name in among and number in parameters and _outside(among[name]):
            total += min(_outside(among[name]), _read(inside, parameters[number]))
    root = next(i for i in inside.values() if i.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for array, result in zip(fusion.arrays, results, strict=False):
        update = _behind(inside, result)
        changed = inside[update.operands[1]].size if update.opcode == "dynamic-update-slice" else array.size
        total += 0 if array.local else changed
    return total


def _behind(inside: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "convert", "copy") and instruction.operands[0] in inside:
        instruction = inside[instruction.operands[0]]
    return instruction


def _read(inside: Computation, parameter: Instruction) -> int:
    """Bytes of an operand that a fusion reads."""
    total = 0
    for user in inside.values():
        if parameter.name not in user.operands or user.opcode == "parameter":
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.size
        elif user.opcode == "bitcast":
            total += _read(inside, user)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return parameter.size
    return total


def tori(coordinates: np.ndarray, rings: Sequence[bool], link: float) -> Callable[[np.ndarray], float]:
    """Bytes/s of a TPU to others of its slice: both directions of each dimension they differ in, if it is a ring.

    Args:
      coordinates: of each device of the mesh in its slice.
      rings: whether each dimension of a slice is one.
      link: bytes/s one way of one link.
    """
    ways = np.where(rings, 2, 1)

    def speed(group: np.ndarray) -> float:
        where = coordinates[group]
        return link * float(ways[(where != where[:1]).any(axis=0)].sum())

    return speed


def kinds(collectives: list[Collective]) -> Iterator[tuple[str, int, int]]:
    """Name, count and bytes of each kind, all axes together."""
    for kind in COLLECTIVES:
        of_kind = [each for each in collectives if each.kind == kind]
        if of_kind:
            yield kind, sum(each.count for each in of_kind), sum(each.bytes for each in of_kind)
