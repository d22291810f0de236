"""Rows from documents: which slots of which documents make row i.

A document of n tokens has n + extra slots; what stands in a slot is the objective's business (with causal language
modelling, slot k reads token k - 1 and predicts token k, so there is one more slot than tokens). A packer deals every
slot of every document to exactly one row of T cells. It knows only the documents' lengths, answers for any rows in any
order, and its work grows with the rows asked for, not with the data.
"""

import abc
import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 22  # documents or slots looked at together where all must be seen


class Layout(NamedTuple):
    """What each cell of a batch of rows holds, int arrays [B, T].

    Attributes:
      document_BT: index of the document, -1 for padding.
      offset_BT: slot within the document.
      segments_BT: which piece of its row, from 1; 0 for padding.
      positions_BT: place within the piece, from 0.
    """

    document_BT: np.ndarray
    offset_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray


class Pieces(NamedTuple):
    """Runs of slots as they stand in a batch, row after row and from left to right; int64 arrays [P].

    Attributes:
      row: row of the batch (not of the set), from 0.
      document: index of the document.
      offset: first slot within the document.
      length: number of slots.
    """

    row: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray


class Packer(abc.ABC):
    """Deals documents to rows.

    Attributes:
      seq_len: cells in a row, T.
      num_slots: of all documents together.
      num_rows: rows in the whole set.
    """

    num_rows: int

    def __init__(self, starts: np.ndarray, extra: int, seq_len: int):
        """Packs the documents whose tokens are starts[d]:starts[d + 1].

        Args:
          starts: int64 [N + 1]; may be memory-mapped.
          extra: slots a document has beyond its tokens, at least 1.
          seq_len: cells in a row, T.
        """
        self._starts = starts
        self._extra = extra
        self.seq_len = seq_len
        self.num_documents = len(starts) - 1
        self.num_slots = int(starts[-1]) + extra * self.num_documents

    @abc.abstractmethod
    def pieces(self, rows: np.ndarray) -> Pieces:
        """Pieces of `rows`, int64 [B], each in [0, num_rows)."""

    @abc.abstractmethod
    def max_segments(self) -> int:
        """Greatest number of pieces in any row of the set."""

    @property
    def fill(self) -> float:
        """Share of cells that are not padding."""
        return self.num_slots / max(1, self.num_rows * self.seq_len)

    def layout(self, rows: np.ndarray) -> Layout:
        """Cells of `rows`, int64 [B], each in [0, num_rows)."""
        return lay_out(self.pieces(rows), len(rows), self.seq_len)

    def slots(self, documents: np.ndarray) -> np.ndarray:
        """Number of slots of each document."""
        return self._starts[documents + 1] - self._starts[documents] + self._extra

    def _slots_by_chunk(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index of the first document, slots of each) over the whole set, in bounded memory."""
        for first in range(0, self.num_documents, _CHUNK):
            yield first, np.diff(self._starts[first : first + _CHUNK + 1]) + self._extra


class Stream(Packer):
    """All slots one after another in document order, cut at row ends; only the very last row has padding.

    Nothing is kept in memory: a row's documents are found by bisection.
    """

    def __init__(self, starts: np.ndarray, extra: int, seq_len: int):
        super().__init__(starts, extra, seq_len)
        self.num_rows = -(-self.num_slots // seq_len)

    def pieces(self, rows: np.ndarray) -> Pieces:
        begin = rows * self.seq_len
        end = np.minimum(begin + self.seq_len, self.num_slots)
        first, last = self._document_at(np.stack([begin, end - 1]))
        row, within = enumerate_runs(last - first + 1)
        document = first[row] + within
        start = self._start(document)
        left = np.maximum(start, begin[row])
        right = np.minimum(self._start(document + 1), end[row])
        return Pieces(row, document, left - start, right - left)

    def max_segments(self) -> int:
        most, num_rows = 0, -(-_CHUNK // self.seq_len)
        for first in range(0, self.num_rows, num_rows):
            begin = np.arange(first, min(first + num_rows, self.num_rows)) * self.seq_len
            end = np.minimum(begin + self.seq_len, self.num_slots)
            # Neighbouring rows share their documents: one stretch of starts answers for the whole chunk.
            low, high = self._document_at(np.array([begin[0], end[-1] - 1]))
            starts = self._start(np.arange(low, high + 1))
            counts = np.searchsorted(starts, end - 1, "right") - np.searchsorted(starts, begin, "right") + 1
            most = max(most, int(counts.max()))
        return most

    def _start(self, document: np.ndarray) -> np.ndarray:
        """First slot of each document, counted over the whole set."""
        return self._starts[document] + self._extra * document

    def _document_at(self, slot: np.ndarray) -> np.ndarray:
        """The document that holds each slot: the last whose first slot is not beyond it."""
        low, high = np.zeros_like(slot), np.full_like(slot, self.num_documents)
        for _ in range(self.num_documents.bit_length()):
            middle = (low + high) // 2
            right = self._start(middle) <= slot
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low


class Bins(Packer):
    """Pieces packed whole into rows by best-fit decreasing; documents longer than a row are first cut into rows.

    The packing works on the histogram of lengths, so its cost does not depend on the number of documents: it decides
    which mixtures of lengths ("plans") make how many rows. Documents of each length are then dealt to the plans.
    """

    def __init__(self, starts: np.ndarray, extra: int, seq_len: int):
        super().__init__(starts, extra, seq_len)
        counts = self._number_items()
        self._lay_plans(best_fit_decreasing(counts), counts)

    def pieces(self, rows: np.ndarray) -> Pieces:
        plan = np.searchsorted(self._plan_rows, rows, "right") - 1
        in_plan = rows - self._plan_rows[plan]
        row_of_run, within = enumerate_runs(self._plan_runs[plan + 1] - self._plan_runs[plan])
        run = self._plan_runs[plan[row_of_run]] + within
        run_of_piece, copy = enumerate_runs(self._run_copies[run])
        row, run = row_of_run[run_of_piece], run[run_of_piece]
        item = self._run_items[run] + in_plan[row] * self._run_copies[run] + copy
        document, offset = self._locate(item)
        return Pieces(row, document, offset, self._run_sizes[run])

    def max_segments(self) -> int:
        return int(np.add.reduceat(self._run_copies, self._plan_runs[:-1]).max())

    def _number_items(self) -> np.ndarray:
        """Numbers the pieces: first the full rows of long documents, then what is left of each document, by length.

        Returns:
          How many pieces there are of each length, int64 [T + 1].
        """
        rest_type = np.uint16 if self.seq_len <= 1 << 16 else np.int64  # NumPy sorts 16 bits in linear time
        rest = np.empty(self.num_documents, rest_type)
        long, full = [], []
        for first, slots in self._slots_by_chunk():
            count, rest[first : first + len(slots)] = np.divmod(slots, self.seq_len)
            where = np.flatnonzero(count)
            long.append(first + where)
            full.append(count[where])
        self._full_documents = np.concatenate(long)
        self._full_ends = np.cumsum(np.concatenate(full))
        order = np.argsort(rest, kind="stable")
        self._rest_documents = order[np.count_nonzero(rest == 0) :].astype(np.min_scalar_type(self.num_documents))
        self._num_full = int(self._full_ends[-1]) if len(self._full_ends) else 0
        counts = np.bincount(rest, minlength=self.seq_len + 1)
        counts[0], counts[-1] = 0, self._num_full
        return counts

    def _locate(self, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Document and first slot of each item."""
        document = np.empty_like(item)
        offset = np.empty_like(item)
        full = item < self._num_full
        which = np.searchsorted(self._full_ends, item[full], "right")
        document[full] = self._full_documents[which]
        before = np.where(which > 0, self._full_ends[which - 1], 0)
        offset[full] = (item[full] - before) * self.seq_len
        document[~full] = self._rest_documents[item[~full] - self._num_full]
        offset[~full] = self.slots(document[~full]) // self.seq_len * self.seq_len
        return document, offset

    def _lay_plans(self, plans: "list[Plan]", counts: np.ndarray) -> None:
        """Numbers the rows plan by plan, and gives each run of a plan its range of items."""
        rows = np.array([plan.rows for plan in plans], np.int64)
        self._plan_rows = np.cumsum(np.concatenate([[0], rows]))
        self.num_rows = int(self._plan_rows[-1])
        self._plan_runs = np.cumsum([0, *(len(plan.runs) for plan in plans)])
        runs = [run for plan in plans for run in plan.runs]
        self._run_sizes, self._run_copies = np.array(runs, np.int64).reshape(-1, 2).T
        next_item = np.cumsum(np.concatenate([counts[-1:], counts[:-1]]))
        next_item[-1] = 0  # full rows come first
        self._run_items = np.empty(len(runs), np.int64)
        row_counts = np.repeat(rows, np.diff(self._plan_runs))
        for i, (size, copies) in enumerate(runs):
            self._run_items[i] = next_item[size]
            next_item[size] += copies * row_counts[i]


class Pad(Packer):
    """One piece a row, in document order; documents longer than a row are cut."""

    def __init__(self, starts: np.ndarray, extra: int, seq_len: int):
        super().__init__(starts, extra, seq_len)
        self._ends = np.empty(self.num_documents, np.int64)
        for first, slots in self._slots_by_chunk():
            self._ends[first : first + len(slots)] = -(-slots // seq_len)
        np.cumsum(self._ends, out=self._ends)
        self.num_rows = int(self._ends[-1])

    def pieces(self, rows: np.ndarray) -> Pieces:
        document = np.searchsorted(self._ends, rows, "right")
        before = np.where(document > 0, self._ends[document - 1], 0)
        offset = (rows - before) * self.seq_len
        length = np.minimum(self.seq_len, self.slots(document) - offset)
        return Pieces(np.arange(len(rows)), document, offset, length)

    def max_segments(self) -> int:
        return 1


class Plan(NamedTuple):
    """A mixture of piece lengths that makes a row: `runs` of (length, copies), used for `rows` rows."""

    runs: tuple[tuple[int, int], ...]
    rows: int


def best_fit_decreasing(counts: np.ndarray) -> list[Plan]:
    """Packs pieces into rows: longest first, each into the fullest row that still has room for it.

    Rows that hold the same are moved together. A row takes as many pieces of one length as fit, since after the first
    it is still the fullest that has room.

    Args:
      counts: int [T + 1], how many pieces there are of each length; counts[0] is not looked at.

    Returns:
      Plans which together use every piece once.
    """
    seq_len = len(counts) - 1
    open_plans: dict[int, list[Plan]] = {}  # by room left
    rooms: list[int] = []  # sorted keys of open_plans

    def put(room: int, plan: Plan) -> None:
        if room not in open_plans:
            bisect.insort(rooms, room)
            open_plans[room] = []
        open_plans[room].append(plan)

    for size in (np.flatnonzero(counts[1:])[::-1] + 1).tolist():
        left = int(counts[size])
        while left:
            at = bisect.bisect_left(rooms, size)
            if at == len(rooms):
                put(seq_len, Plan((), left))
            room = rooms[at]
            plan = open_plans[room].pop()
            if not open_plans[room]:
                del open_plans[room], rooms[at]
            copies = min(room // size, left)
            used = min(plan.rows, left // copies)
            left -= used * copies
            put(room - size * copies, Plan((*plan.runs, (size, copies)), used))
            if plan.rows > used:
                put(room, Plan(plan.runs, plan.rows - used))
    return [plan for room in rooms for plan in open_plans[room] if plan.runs]


def enumerate_runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 3]: owners [0, 0, 1, 1, 1] and places within the owner [0, 1, 0, 1, 2]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def lay_out(pieces: Pieces, num_rows: int, seq_len: int) -> Layout:
    """Spreads pieces over the cells of their rows, and closes each row that has room with a piece of padding."""
    row_ends = np.searchsorted(pieces.row, np.arange(num_rows), "right")
    row_begins = np.concatenate([[0], row_ends[:-1]])
    segment = np.arange(len(pieces.row)) - row_begins[pieces.row] + 1
    filled = np.concatenate([[0], np.cumsum(pieces.length)])
    room = seq_len - (filled[row_ends] - filled[row_begins])
    short = np.flatnonzero(room)
    places = row_ends[short]
    length = np.insert(pieces.length, places, room[short])
    document = np.insert(pieces.document, places, -1)
    offset = np.insert(pieces.offset, places, 0)
    segment = np.insert(segment, places, 0)

    shape = num_rows, seq_len
    begins = (np.cumsum(length) - length).astype(np.int32)
    positions = np.arange(num_rows * seq_len, dtype=np.int32) - np.repeat(begins, length)
    return Layout(
        document_BT=np.repeat(document, length).reshape(shape),
        offset_BT=(np.repeat(offset, length) + positions).reshape(shape),
        segments_BT=np.repeat(segment.astype(np.int32), length).reshape(shape),
        positions_BT=positions.reshape(shape),
    )
