"""Target from source: pairs packed whole into rows, for an encoder and a decoder or for a decoder alone.

Where both texts have rows of their own, a pair has the same segment number in both. A decoder reads source and target
one after the other, as one segment.
"""

import numpy as np

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.data.example_packing import Fitting, cut
from lslm_jax.data.objectives.causal_lm import causal, said
from lslm_jax.data.packing import Layout, Pieces, lay_out
from lslm_jax.data.row_dataset import Rows
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.special_tokens import Special

_EXTRA = 1  # slots that each text has beyond its tokens


class _Pairs(Rows):
    """Pairs, each whole in one row. Packed as a stream they would be cut anywhere: that is done as with bins."""

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards)
        self._seq_len = config.data.seq_len
        self._alone = config.data.packing == "pad"
        self._special = special

    def _deal(self, sizes_NK: np.ndarray, limits: tuple[int, ...]) -> None:
        self._fitting = Fitting(sizes_NK, limits, self._alone)
        self.num_rows, self.num_slots = self._fitting.num_rows, self._fitting.num_slots
        self.cells = self._fitting.cells

    def max_segments(self) -> int:
        return self._fitting.max_segments()

    def examples(self, rows: np.ndarray) -> np.ndarray:
        placed = self._fitting.placed(rows)
        return placed.example[np.searchsorted(placed.row, np.arange(len(rows)))]

    def num_bytes(self, rows: np.ndarray) -> int:
        return int(self.shards.num_bytes[self._fitting.placed(rows).example].sum())

    def _slots(self) -> np.ndarray:
        """Slots of source and target of each example, int64 [N, 2]."""
        return np.diff(self.shards.starts).reshape(-1, 2) + _EXTRA

    def _slots_of(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, document = self.shards.starts, 2 * examples
        middle = starts[document + 1]
        return middle - starts[document] + _EXTRA, starts[document + 2] - middle + _EXTRA


class EncodedPairs(_Pairs):
    """The encoder reads s1 .. sn eos, the decoder bos t1 .. tm, and says t1 .. tm eos.

    Sources too long are cut before their eos, targets at the end of the row.
    """

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards, config, special)
        self._source_len = config.data.source_len or config.data.seq_len
        limits = self._source_len, self._seq_len
        slots_NK = self._slots()
        self._num_cut = (slots_NK > limits).sum(axis=0)
        self._deal(np.minimum(slots_NK, limits), limits)

    def remark(self) -> str:
        cuts = {"sources": int(self._num_cut[0]), "targets": int(self._num_cut[1])}
        return self._cut_remark(cuts, f"data.source_len={self._source_len} or data.seq_len={self._seq_len}")

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        row, example = self._fitting.placed(rows)
        length = np.minimum(self._slots_of(example)[1], self._seq_len)
        return lay_out(Pieces(row, example, np.zeros_like(example), length), len(rows), self._seq_len).document_BT

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        row, example = self._fitting.placed(rows)
        source, target = self._slots_of(example)
        nothing = np.zeros_like(example)
        pieces = Pieces(row, 2 * example, nothing, np.minimum(source, self._source_len))
        layout = lay_out(pieces, len(rows), self._source_len)
        source_BS = said(layout, self.shards, self._special.eos_id)
        ends = np.diff(layout.segments_BT, axis=1, append=0) != 0
        source_BS[ends & (layout.segments_BT > 0)] = self._special.eos_id  # of cut sources, too
        pieces = Pieces(row, 2 * example + 1, nothing, np.minimum(target, self._seq_len))
        batch = causal(lay_out(pieces, len(rows), self._seq_len), self.shards, *self._special[:2])
        return batch._replace(
            source_BS=source_BS,
            source_positions_BS=layout.positions_BT,
            source_segments_BS=layout.segments_BT,
        )


class DecodedPairs(_Pairs):
    """A decoder reads bos s1 .. sn bos t1 .. tm, and says t1 .. tm eos from the second bos on.

    Of pairs too long for a row the longer text is cut first.
    """

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards, config, special)
        slots = self._slots()
        source, target = cut(slots[:, 0], slots[:, 1], self._seq_len)
        self._num_cut = int((source < slots[:, 0]).sum()), int((target < slots[:, 1]).sum())
        self._deal((source + target)[:, None], (self._seq_len,))

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        row, example = self._fitting.placed(rows)
        length = np.add(*cut(*self._slots_of(example), self._seq_len))
        return lay_out(Pieces(row, example, np.zeros_like(example), length), len(rows), self._seq_len).document_BT

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        row, example = self._fitting.placed(rows)
        source, target = cut(*self._slots_of(example), self._seq_len)
        layout = lay_out(Pieces(row, example, np.zeros_like(example), source + target), len(rows), self._seq_len)
        # Every cell's pair, counted over the batch; in padding any.
        pair_BT = np.searchsorted(row, np.arange(len(rows)))[:, None] + np.maximum(layout.segments_BT - 1, 0)
        source_BT = source[pair_BT]
        target_BT = (layout.offset_BT >= source_BT) & (layout.segments_BT > 0)
        texts = Layout(
            document_BT=np.where(layout.segments_BT > 0, 2 * layout.document_BT + target_BT, -1),
            offset_BT=layout.offset_BT - source_BT * target_BT,
            segments_BT=layout.segments_BT,
            positions_BT=layout.positions_BT,
        )
        batch = causal(texts, self.shards, *self._special[:2])
        return batch._replace(targets_BT=batch.targets_BT * target_BT, weights_BT=target_BT.astype(np.float32))

    def remark(self) -> str:
        cuts = {"sources": self._num_cut[0], "targets": self._num_cut[1]}
        return self._cut_remark(cuts, f"data.seq_len={self._seq_len}")
