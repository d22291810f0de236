"""Batches that a run leaves out, after a step it went back to.

WORKDIR/detours.json lists them. They are part of what a run reads: another run that finds the same list at its start
reads the same batches, hence trains the same, bit for bit.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from lslm_jax.errors import DataError
from lslm_jax.runtime import atomic_io


class Detour(NamedTuple):
    """One stretch that is left out.

    Attributes:
      after: step after which it would have come.
      batches: how long it is.
      times: how often the run went back to that step.
    """

    after: int
    batches: int
    times: int = 1


class Rows(Protocol):
    """Something that knows the rows of every batch."""

    def rows(self, step: int, slots: np.ndarray | None = None, steps: int = 1) -> np.ndarray:
        """Source, epoch and number, int64 [rows, 3], of some slots of the batches from that after `step` steps on."""
        ...

    def sizes(self) -> list[int]:
        """Rows of each source; none where there is no end to them."""
        ...


def at(step: int, detours: Sequence[Detour]) -> int:
    """Which batch is read after so many steps."""
    return step + sum(detour.batches for detour in detours if step >= detour.after)


def rows(data: Rows, detours: Sequence[Detour], step: int, slots: np.ndarray, steps: int) -> np.ndarray:
    """What `data.rows` says of the batches that are read after `step` to `step + steps - 1` steps."""
    cuts = sorted({detour.after for detour in detours if step < detour.after < step + steps})
    pieces = itertools.pairwise([step, *cuts, step + steps])
    return np.concatenate([data.rows(at(first, detours), slots, end - first) for first, end in pieces])


def extend(detours: Sequence[Detour], after: int, step: int) -> list[Detour]:
    """The detours of a run that goes back from `step` to `after` and leaves out all that it read in between."""
    kept = [detour for detour in detours if detour.after < after]
    times = 1 + sum(detour.times for detour in detours if detour.after == after)
    return [*kept, Detour(after, at(step, detours) - at(after, kept), times)]


def read(workdir: epath.Path) -> list[Detour]:
    """Those of a run; DataError where the file is damaged."""
    path = _file(workdir)
    return parse(atomic_io.read_json(path).get("detours"), path) if path.exists() else []


def parse(value: Any, path: epath.Path) -> list[Detour]:
    """Detours from JSON; DataError where it is anything else."""
    try:
        found = [Detour(*map(operator.index, detour)) for detour in value]
    except TypeError as error:
        raise DataError(f"{path} does not hold detours, each a step and a number of batches") from error
    if any(min(detour) < 0 for detour in found):
        raise DataError(f"{path} holds a negative number")
    return found


def write(workdir: epath.Path, detours: Sequence[Detour], back_to: int | None = None) -> None:
    """Puts them on file, with the step to which the run is yet to go back."""
    content = {"detours": [list(detour) for detour in detours]}
    atomic_io.write_json(_file(workdir), content | ({} if back_to is None else {"back_to": back_to}))


def back_to(workdir: epath.Path) -> int | None:
    """The step to which a run is yet to go back; None for none. DataError where the file is damaged."""
    path = _file(workdir)
    step = atomic_io.read_json(path).get("back_to") if path.exists() else None
    if step is not None and not (isinstance(step, int) and step >= 0):
        raise DataError(f"{path} does not hold the step to go back to: {step!r}")
    return step


def _file(workdir: epath.Path) -> epath.Path:
    return epath.Path(workdir) / "detours.json"
