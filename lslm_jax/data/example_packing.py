"""Whole examples in rows: which examples make row i, where each has one size, or two that must both fit.

First-fit decreasing, in groups of neighbouring examples that are all packed at once: the work for each example is a
few array operations, and what a group's last row leaves empty is little.
"""

from typing import NamedTuple

import numpy as np

_GROUP = 1024  # examples packed together
_GROUPS = 256  # groups packed at once


class Placed(NamedTuple):
    """Examples as they stand in a batch, row after row; int64 arrays [P]: row of the batch, number of the example."""

    row: np.ndarray
    example: np.ndarray


class Fitting:
    """Deals examples to rows, each whole.

    Attributes:
      num_rows: rows in the whole set.
      num_slots: cells of all rows that are not padding.
      cells: of one row.
    """

    def __init__(self, sizes_NK: np.ndarray, limits: tuple[int, ...], alone: bool):
        """Packs them.

        Args:
          sizes_NK: int, the K sizes of each example, each from 1 to its limit.
          limits: K, what a row holds.
          alone: whether each example has a row of its own.
        """
        self.num_slots = int(sizes_NK.sum(dtype=np.int64))
        self.cells = sum(limits)
        row = np.arange(len(sizes_NK)) if alone else fit(sizes_NK, limits)
        self._ends = np.cumsum(np.bincount(row))
        self._examples = np.argsort(row, kind="stable").astype(np.min_scalar_type(len(row)))
        self.num_rows = len(self._ends)

    def placed(self, rows: np.ndarray) -> Placed:
        """Examples of `rows`, int64 [B], each in [0, num_rows)."""
        begin = np.where(rows > 0, self._ends[rows - 1], 0)
        count = self._ends[rows] - begin
        row = np.repeat(np.arange(len(rows)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return Placed(row, self._examples[begin[row] + within].astype(np.int64))

    def max_segments(self) -> int:
        """Greatest number of examples in any row of the set."""
        return int(np.diff(self._ends, prepend=0).max())


def fit(sizes_NK: np.ndarray, limits: tuple[int, ...]) -> np.ndarray:
    """The row of each example, int64 [N]; rows are numbered without gaps."""
    rows = np.empty(len(sizes_NK), np.int64)
    num_rows, chunk = 0, _GROUP * _GROUPS
    for first in range(0, len(rows), chunk):
        part = sizes_NK[first : first + chunk]
        group = min(_GROUP, len(part))
        lacking = -len(part) % group
        sizes_GMK = np.pad(part, ((0, lacking), (0, 0))).reshape(-1, group, len(limits))
        row_GM = _fit_groups(sizes_GMK, limits)
        # What only fills up the last group takes no room, and so makes no row of its own.
        counts = row_GM.max(axis=1) + 1
        row_GM += (num_rows + np.cumsum(counts) - counts)[:, None]
        rows[first : first + chunk] = row_GM.reshape(-1)[: len(part)]
        num_rows += int(counts.sum())
    return rows


def _fit_groups(sizes_GMK: np.ndarray, limits: tuple[int, ...]) -> np.ndarray:
    """The row of each example within its group: from the largest on, the first that has room for it."""
    num_groups, group, _ = sizes_GMK.shape
    order_GM = np.argsort(-(sizes_GMK / np.array(limits)).max(axis=2), axis=1, kind="stable")
    dtype = np.int16 if max(limits) < 1 << 15 else np.int64  # the smaller the faster
    sizes_KMG = np.take_along_axis(sizes_GMK, order_GM[:, :, None], axis=1).astype(dtype).T
    rooms_KGR = [np.full((num_groups, group), limit, dtype) for limit in limits]
    row_GM = np.empty((num_groups, group), np.int64)
    groups, opened = np.arange(num_groups), 0
    for m in range(group):
        # Of the rows that are still empty the first is enough to look at.
        seen = slice(0, opened + 1)
        fits_GR = rooms_KGR[0][:, seen] >= sizes_KMG[0, m][:, None]
        for room_GR, size_MG in zip(rooms_KGR[1:], sizes_KMG[1:], strict=True):
            fits_GR &= room_GR[:, seen] >= size_MG[m][:, None]
        row_G = fits_GR.argmax(axis=1)
        for room_GR, size_MG in zip(rooms_KGR, sizes_KMG, strict=True):
            room_GR[groups, row_G] -= size_MG[m]
        row_GM[groups, order_GM[:, m]] = row_G
        opened = max(opened, int(row_G.max()) + 1)
    return row_GM


def cut(first: np.ndarray, second: np.ndarray, room: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of two texts that share so much room: the longer is cut first, and from then on both alike."""
    second = np.minimum(second, np.maximum(room - first, room // 2))
    return np.minimum(first, room - second), second
