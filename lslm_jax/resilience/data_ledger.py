"""What a run has read, on file, so that `audit` can prove that no row was lost or read twice in an epoch.

WORKDIR/ledger/PROCESS.jsonl holds what each process read. Each start of the run adds a line that tells from which step
on, and which rows of every batch that process took; each line after it tells the sha256 of the rows of some steps:
their source, epoch and number; and, as `fed`, that of the arrays which were given to these steps. A run that goes on
from a checkpoint repeats the steps behind it; what it read of them before stays on the ledger, and must have been the
same. Steps that a kill took from the ledger count as repeated where a later start did them again.
"""

import bisect
import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lslm_jax.data.batch import Batch
from lslm_jax.data.skipped_batches import Detour, Rows, at, parse, rows
from lslm_jax.errors import DataError, InputMissing, first_line
from lslm_jax.runtime import atomic_io

_PIECE = 1 << 16  # rows that are looked up at once
_MAX_ROWS = 1 << 24  # of a batch


class Ledger:
    """The ledger of one process, written from one start of the run to its end."""

    def __init__(
        self,
        workdir: epath.Path,
        process: int,
        attempt: int,
        start: int,
        data: Rows,
        slots: np.ndarray,
        detours: Sequence[Detour] = (),
    ):
        """Adds the line of a start.

        Args:
          workdir: the run directory.
          process: whose ledger it is.
          attempt: how often the run was started before.
          start: steps that are done.
          data: what is read.
          slots: which rows of each batch the process takes.
          detours: what is left out of `data`.
        """
        self._path = _file(workdir, process)
        self._data, self._slots, self._detours = data, slots, detours
        self._attempt, self._first, self._last, self._skipped = attempt, start + 1, start, []
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="ledger")  # no step waits for a hash
        self._fed: dict[int, Future[bytes]] = {}
        with atomic_io.saving(self._path):
            if self._path.exists() and (whole := _whole_lines(self._path)) != self._path.read_bytes():
                atomic_io.write(self._path, whole)
        self._lines = atomic_io.Lines(self._path)
        line: dict[str, Any] = {"attempt": attempt, "from": start, "slots": _ranges(slots)}
        if size := getattr(data, "batch_size", 0):
            line |= {"batch_size": size} | ({"offset": data.offset} if data.offset else {})  # type: ignore[attr-defined]
        self._lines.add(json.dumps(line | ({"detours": [list(detour) for detour in detours]} if detours else {})))

    def feed(self, step: int, batch: Batch) -> None:
        """Takes the arrays that are given to a step, before they leave the host; they must not change afterwards."""
        self._fed[step] = self._hashing.submit(_content, batch)

    def add(self, step: int, skipped: bool) -> None:
        """A step is done, or was skipped as its loss or gradient was not finite."""
        self._last = step
        if skipped:
            self._skipped.append(step)

    def write(self) -> None:
        """Puts on file what was added since."""
        if self._last < self._first:
            return
        digest = _digest(self._data, self._detours, self._slots, self._first, self._last)
        line = {"steps": [self._first, self._last], "sha256": digest, "of": self._attempt}
        fed = [self._fed.pop(step) for step in range(self._first, self._last + 1) if step in self._fed]
        if len(fed) == self._last + 1 - self._first:
            line["fed"] = hashlib.sha256(b"".join(each.result() for each in fed)).hexdigest()
        self._lines.add(json.dumps(line | ({"skipped": self._skipped} if self._skipped else {})))
        self._first, self._skipped = self._last + 1, []

    def sync(self) -> None:
        """Writes, and puts the file where a later run, and an audit, will look for it."""
        self.write()
        self._lines.sync()

    def close(self) -> None:
        """Writes, and ends."""
        self.write()
        self._hashing.shutdown()
        self._lines.close()


def _content(batch: Batch) -> bytes:
    """Sha256 of the arrays of a batch, with their names, types and shapes."""
    hasher = hashlib.sha256()
    for name, part in batch._asdict().items():
        if part is not None:
            array = np.ascontiguousarray(part)
            hasher.update(f"{name} {array.dtype.str} {array.shape};".encode())
            hasher.update(array.data)
    return hasher.digest()


def attempts(workdir: epath.Path) -> int:
    """How often a run was started."""
    path = _file(workdir, 0)
    return sum("attempt" in line for line in _lines(path)) if path.exists() else 0


class _Start(NamedTuple):
    """What one process read from one start on."""

    begin: int
    slots: np.ndarray
    detours: list[Detour]
    spans: list[dict[str, Any]]
    batch_size: int | None = None
    offset: int = 0

    def of(self, data: Any) -> Any:
        """The data as this start read them: rows of a batch, the process's own, the place of the first."""
        mine = copy.copy(data)
        mine.slots = self.slots
        if hasattr(mine, "offset"):
            mine.offset, mine.batch_size = self.offset, self.batch_size or mine.batch_size
        return mine


def audit(workdir: epath.Path, data: Rows, batch_size: int) -> dict[str, Any]:
    """Compares the ledger of a run with what seed and data say, over all its starts.

    Args:
      workdir: the run directory.
      data: what the run read, with nothing left out.
      batch_size: rows of a batch, of all processes.

    Returns:
      `steps` that count, `starts` of the run, `repeated_steps` behind a checkpoint, `skipped_steps`, how many
      `batches_left_out` by detours, and the whole and begun `epochs` of each source, in which every row was read, or
      left out, once.

    Raises:
      InputMissing: there is no ledger.
      DataError: a step is missing, or other rows were read, or other arrays trained on, than those that were due.
    """
    starts = _starts(workdir)
    done, repeated, ends = 0, 0, [0]
    skipped: set[int] = set()
    last: _Start | None = None
    for attempt in sorted(starts):
        parts = starts[attempt]
        begin = parts[0].begin
        later = min((starts[other][0].begin for other in starts if other > attempt), default=None)
        if begin not in ends:
            raise DataError(
                f"{workdir}/ledger does not tell what was read up to step {begin}, where start {attempt} began"
            )
        last = parts[0]
        del ends[bisect.bisect(ends, begin) :]
        repeated += done - begin
        skipped = {step for step in skipped if step <= begin}
        ends += _check(workdir, data, last.batch_size or batch_size, attempt, parts, later)
        done = ends[-1]
        skipped |= {step for span in parts[0].spans for step in span.get("skipped", ()) if step <= done}
    detours = last.detours if last else []
    # Positions of the data order are contiguous over all batch sizes.
    size = (last.batch_size if last else None) or batch_size
    rows_read = (last.offset if last else 0) + at(done, detours) * size
    return {
        "steps": done,
        "starts": len(starts),
        "repeated_steps": repeated,
        "skipped_steps": sorted(skipped),
        "batches_left_out": at(done, detours) - done,
        "epochs": _count(last._replace(offset=0).of(data) if last else data, rows_read, size),
    }


def _check(
    workdir: epath.Path, data: Rows, batch_size: int, attempt: int, parts: list[_Start], later: int | None
) -> list[int]:
    """The last step of each span of a start, all of whose processes read what was due.

    `later` is the earliest step from which a later start went on: what is missing behind it was done again.
    """
    if not all(part.spans for part in parts):  # ended before it had read anything that counts
        return []
    taken = np.unique(np.concatenate([part.slots for part in parts]))
    if not np.array_equal(taken, np.arange(batch_size)):
        raise DataError(f"{workdir}/ledger: start {attempt} took {len(taken)} of the {batch_size} rows of a batch")
    for process, part in enumerate(parts):
        step, has_fed = part.begin, any("fed" in span for span in part.spans)
        for span in part.spans:
            first, last = span["steps"]
            if first != step + 1:
                if later is not None and later <= step:
                    del part.spans[part.spans.index(span) :]
                    break
                raise DataError(
                    f"{_file(workdir, process)} does not tell what was read in steps {step + 1} to {first - 1}"
                )
            if _digest(part.of(data), part.detours, part.slots, first, last) != span["sha256"]:
                raise DataError(f"{_file(workdir, process)}: steps {first} to {last} read other rows than were due")
            if has_fed and "fed" not in span:  # starts of earlier versions have none
                raise DataError(f"{_file(workdir, process)} does not tell what steps {first} to {last} trained on")
            if has_fed and _digest_of_batches(part.of(data), part.detours, first, last) != span["fed"]:
                raise DataError(
                    f"{_file(workdir, process)}: steps {first} to {last} trained on other arrays than their rows make"
                )
            step = last
    shortest = min((part.spans for part in parts), key=len)
    return [span["steps"][1] for span in shortest]


def _digest_of_batches(data: Any, detours: Sequence[Detour], first: int, last: int) -> str:
    """The sha256 that `Ledger.feed` and `write` put on file, of batches that are made anew."""
    contents = (_content(data.batch(at(step - 1, detours))) for step in range(first, last + 1))
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _count(data: Rows, num_rows: int, batch_size: int) -> list[float]:
    """Epochs of each source in the first rows of the data order.

    Raises:
      DataError: an epoch holds a row twice, or has lost one.
    """
    sizes = data.sizes()
    steps, rest = divmod(num_rows, batch_size)
    pieces = _pieces(data, (), np.arange(batch_size), 0, steps)
    if rest:
        pieces = itertools.chain(pieces, _pieces(data, (), np.arange(rest), steps, steps + 1))
    seen = [np.zeros(size, bool) for size in sizes]
    epochs = [0] * len(sizes)
    for first, found in pieces if sizes else ():
        # What is of one source and epoch, in order; np.unique sorts, so that epochs come one after the other.
        for source, epoch in np.unique(found[:, :2], axis=0):
            if epoch > epochs[source]:
                if not seen[source].all():
                    raise DataError(f"epoch {epochs[source]} of source {source} lacks {(~seen[source]).sum()} rows")
                seen[source][:] = False
                epochs[source] = epoch
            places = np.flatnonzero((found[:, 0] == source) & (found[:, 1] == epoch))
            taken = found[places, 2]
            is_first = np.zeros(len(taken), bool)
            is_first[np.unique(taken, return_index=True)[1]] = True
            if (twice := seen[source][taken] | ~is_first).any():
                at = np.flatnonzero(twice)[0]
                step = first + places[at] // batch_size + 1
                raise DataError(f"row {taken[at]} of source {source} was read twice in epoch {epoch}, at step {step}")
            seen[source][taken] = True
    return [round(float(epoch + some.mean()), 6) for epoch, some in zip(epochs, seen, strict=True)]


def _digest(data: Rows, detours: Sequence[Detour], slots: np.ndarray, first: int, last: int) -> str:
    """The sha256 of the rows of steps first to last."""
    hasher = hashlib.sha256()
    for _, found in _pieces(data, detours, slots, first - 1, last):
        hasher.update(found.astype("<i8").tobytes())
    return hasher.hexdigest()


def _pieces(
    data: Rows, detours: Sequence[Detour], slots: np.ndarray, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of the batches after start to before stop steps, many steps at once; each with its first step."""
    many = max(1, _PIECE // len(slots))
    for step in range(start, stop, many):
        yield step, rows(data, detours, step, slots, min(many, stop - step))


def _starts(workdir: epath.Path) -> dict[int, list[_Start]]:
    """What the processes of each start read, by its number."""
    if not _file(workdir, 0).exists():
        raise InputMissing(f"{workdir} has no ledger of what was read")
    found: dict[int, list[_Start]] = {}
    for process in itertools.count():
        path = _file(workdir, process)
        if not path.exists():
            return found
        mine: dict[int, _Start] = {}
        number = 0
        try:
            for line in _lines(path):
                if "attempt" in line:
                    # A start that ended before process 0 had put it on its ledger has the number of the next one.
                    number = _count_of(line, "attempt")
                    mine[number] = _start_of(line, path)
                else:  # `of`: lines of an older process may lie behind the start of a newer one
                    mine[line.get("of", number)].spans.append(_checked_span(line))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {first_line(error)}") from error
        for number, start in mine.items():
            found.setdefault(number, []).append(start)
    return found


def _start_of(line: dict[str, Any], path: epath.Path) -> _Start:
    """Parses the line of a start; ValueError, TypeError or KeyError where it is damaged."""
    ranges = [
        (atomic_io.is_count(first) and atomic_io.is_count(end) and first < end <= _MAX_ROWS)
        for first, end in line["slots"]
    ]
    if not ranges or not all(ranges):
        raise ValueError(f"slots {line['slots']}")
    slots = np.concatenate([np.arange(first, end) for first, end in line["slots"]])
    size = _count_of(line, "batch_size") if "batch_size" in line else None
    if size is not None and not 0 < size <= _MAX_ROWS:
        raise ValueError(f"batch_size {size}")
    offset = line.get("offset", 0)
    if not isinstance(offset, int) or abs(offset) >= 1 << 62:
        raise ValueError(f"offset {offset}")
    return _Start(_count_of(line, "from"), slots, parse(line.get("detours", []), path), [], size, offset)


def _checked_span(line: dict[str, Any]) -> dict[str, Any]:
    """The line of some steps; ValueError, TypeError or KeyError where it is damaged."""
    first, last = line["steps"]
    skipped = line.get("skipped", [])
    if not (atomic_io.is_count(first) and atomic_io.is_count(last) and 1 <= first <= last):
        raise ValueError(f"steps {line['steps']}")
    if not (isinstance(skipped, list) and all(atomic_io.is_count(step) and first <= step <= last for step in skipped)):
        raise ValueError(f"skipped {skipped}")
    if not all(isinstance(line.get(name, ""), str) for name in ("sha256", "fed")) or "sha256" not in line:
        raise ValueError("sha256")
    return line


def _count_of(line: dict[str, Any], name: str) -> int:
    if not atomic_io.is_count(line[name]):
        raise ValueError(f"{name} {line[name]}")
    return line[name]


def _lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            entry = atomic_io.parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is damaged: {first_line(error)}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}:{number} is damaged: it is not a JSON object")
        yield entry


def _whole_lines(path: epath.Path) -> bytes:
    """Without what a kill left of a line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _file(workdir: epath.Path, process: int) -> epath.Path:
    return epath.Path(workdir) / "ledger" / f"{process}.jsonl"


def _ranges(slots: np.ndarray) -> list[list[int]]:
    """[first, end) of each run of numbers."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(slots, cuts)]
