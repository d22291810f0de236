"""Conversations in rows: all of one is read, what the assistant says in it is predicted.

A conversation of n tokens fills n - 1 slots: it is read as d1 .. dn-1 and predicted as d2 .. dn, and tokens of answers
count. It begins and ends with what its template puts there. It is kept whole, for an answer without what is before it
would be another thing; one too long for a row is cut at the row's end.
"""

import numpy as np

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.data.example_packing import Fitting
from lslm_jax.data.objectives.causal_lm import read
from lslm_jax.data.packing import Pieces, lay_out
from lslm_jax.data.row_dataset import Rows
from lslm_jax.data.shards import Shards
from lslm_jax.errors import InputMissing


class ChatRows(Rows):
    """Conversations packed whole, or one a row. Packed as a stream they would be cut anywhere: that is as with bins.

    On disk an example is its tokens and as many marks, and two numbers: the place of the first token of an answer and
    how many such tokens there are. One with no answer before the row's end is left out.
    """

    def __init__(self, shards: Shards, config: Config):
        super().__init__(shards)
        self._seq_len, self._mask = config.data.seq_len, config.data.mask_documents
        self._shown = np.flatnonzero(shards.numbers[:, 0] <= self._seq_len)
        if not len(self._shown):
            raise InputMissing(f"no answer of {shards.directory} begins within data.seq_len={self._seq_len}")
        sizes = np.minimum(self._slots(self._shown), self._seq_len)
        self._fitting = Fitting(sizes[:, None], (self._seq_len,), config.data.packing == "pad")
        self.num_rows, self.num_slots = self._fitting.num_rows, self._fitting.num_slots
        self.cells = self._fitting.cells

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        row, example = self._placed(rows)
        length = np.minimum(self._slots(example), self._seq_len)
        layout = lay_out(Pieces(row, example, np.zeros_like(example), length), len(rows), self._seq_len)
        real_BT = layout.document_BT >= 0
        token_BT = np.where(real_BT, self.shards.starts[2 * layout.document_BT] + layout.offset_BT, 0)
        # Marks lie behind their tokens, as far as these are many.
        count_BT = np.where(real_BT, self._slots(layout.document_BT) + 1, 0)
        marks_BT = np.where(real_BT, read(self.shards, token_BT + count_BT + real_BT), 0)
        return Batch(
            tokens_BT=np.where(real_BT, read(self.shards, token_BT), 0),
            targets_BT=read(self.shards, token_BT + real_BT) * marks_BT,
            weights_BT=marks_BT.astype(np.float32),
            positions_BT=layout.positions_BT if self._mask else None,
            segments_BT=layout.segments_BT if self._mask else None,
        )

    def max_segments(self) -> int:
        return self._fitting.max_segments() if self._mask else 1

    def examples(self, rows: np.ndarray) -> np.ndarray:
        row, example = self._placed(rows)
        return example[np.searchsorted(row, np.arange(len(rows)))]

    @property
    def num_examples(self) -> int:
        return len(self._shown)

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        row, example = self._placed(rows)
        length = np.minimum(self._slots(example), self._seq_len)
        return lay_out(Pieces(row, example, np.zeros_like(example), length), len(rows), self._seq_len).document_BT

    def num_bytes(self, rows: np.ndarray) -> int:
        """Bytes of the answers; of one that is cut, the share of its tokens that is left."""
        _, example = self._placed(rows)
        num_bytes = self.shards.num_bytes[example]
        for i in np.flatnonzero(self._slots(example) > self._seq_len):
            marks = int(self.shards.starts[2 * example[i] + 1])
            left = self.shards.take(np.arange(marks, marks + self._seq_len + 1)).sum()
            num_bytes[i] = num_bytes[i] * left // int(self.shards.numbers[example[i], 1])
        return int(num_bytes.sum())

    def remark(self) -> str:
        long = int((self._slots(np.arange(self.shards.num_examples)) > self._seq_len).sum())
        if not long:
            return ""
        lost = self.shards.num_examples - len(self._shown)
        return (
            f"{self.shards.directory}: {long:,} of {self.shards.num_examples:,} conversations are longer than "
            f"data.seq_len={self._seq_len} and cut there, {lost:,} of them before any answer"
        )

    def _placed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Conversations as they stand in a batch: row of the batch, number of the example."""
        row, number = self._fitting.placed(rows)
        return row, self._shown[number]

    def _slots(self, examples: np.ndarray) -> np.ndarray:
        """Slots of each conversation: one less than its tokens."""
        return self.shards.starts[2 * examples + 1] - self.shards.starts[2 * examples] - 1
