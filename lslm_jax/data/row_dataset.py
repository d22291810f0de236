"""One prepared split as numbered rows: what an objective makes of it. Rows of documents are here; others beside it."""

import abc
from collections.abc import Mapping

import numpy as np

from lslm_jax.config import Config
from lslm_jax.data import index_shuffle, packing
from lslm_jax.data.batch import Batch
from lslm_jax.data.objectives import causal_lm, masked_lm, span_corruption
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.special_tokens import Special
from lslm_jax.errors import ConfigError, InputMissing

_PACKERS = {"stream": packing.Stream, "bins": packing.Bins, "pad": packing.Pad}


class Rows(abc.ABC):
    """A split, as rows.

    Attributes:
      shards: its examples.
      num_rows: rows in the split.
      num_slots: cells of all rows together that are not padding.
      cells: of one row, source and target together.
    """

    num_rows: int
    num_slots: int
    cells: int

    def __init__(self, shards: Shards):
        if not shards.num_tokens:
            raise InputMissing(f"there are no tokens in {shards.name}")
        self.shards = shards

    @abc.abstractmethod
    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        """The rows of these numbers, int64 [B], with a key for each, uint64 [B], that its random draws depend on.

        Raises:
          DataError: a token is outside the vocabulary.
        """

    @abc.abstractmethod
    def max_segments(self) -> int:
        """Greatest number of segments in any row, of the target and, where there is one, of the source."""

    @abc.abstractmethod
    def examples(self, rows: np.ndarray) -> np.ndarray:
        """The example that each row shows, the first where it shows several; int64 [B]."""

    @property
    def num_examples(self) -> int:
        """Examples that the rows show."""
        return self.shards.num_examples

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        """The example that each target cell of the rows belongs to, int64 [B, T]; -1 in padding."""
        return self.examples(rows)[:, None]

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """The first token of the context that each row shows, int64 [B]: 0 but where rows are windows over it."""
        return np.zeros_like(rows)

    def remark(self) -> str:
        """What a user should know of the examples, in a line; empty where there is nothing to say."""
        return ""

    def num_bytes(self, rows: np.ndarray) -> int:
        """Bytes of text that these rows, int64 [B], predict."""
        return int(self.shards.num_bytes[self.examples(rows)].sum())

    def _cut_remark(self, cuts: Mapping[str, int], setting: str) -> str:
        """A line on texts that are longer than a row; empty where none is.

        Args:
          cuts: number of cut texts by what they are.
          setting: the key and value that limit them.
        """
        counts = " and ".join(f"{count:,} {what}" for what, count in cuts.items() if count)
        if not counts:
            return ""
        return (
            f"warning: {self.shards.name}: of {self.shards.num_examples:,} examples, {counts} are longer than "
            f"{setting} allows and are cut: what is beyond is neither read nor scored"
        )


class DocumentRows(Rows):
    """Rows of plain text: documents laid out by a packer.

    Attributes:
      packer: which documents make a row.
    """

    def __init__(self, shards: Shards, packer: packing.Packer, mask_documents: bool):
        super().__init__(shards)
        self.packer = packer
        self.num_rows, self.num_slots, self.cells = packer.num_rows, packer.num_slots, packer.seq_len
        self._mask = mask_documents

    def max_segments(self) -> int:
        return self.packer.max_segments() if self._mask else 1

    def examples(self, rows: np.ndarray) -> np.ndarray:
        pieces = self.packer.pieces(rows)
        return pieces.document[np.searchsorted(pieces.row, np.arange(len(rows)))]

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        return self.packer.layout(rows).document_BT

    def num_bytes(self, rows: np.ndarray) -> int:
        """Bytes of text that these rows predict.

        A document's bytes are spread evenly over its slots and rounded so that all rows add up to all bytes exactly.
        """
        pieces = self.packer.pieces(rows)
        size, slots = self.shards.num_bytes[pieces.document], self.packer.slots(pieces.document)
        return int(((pieces.offset + pieces.length) * size // slots - pieces.offset * size // slots).sum())


class CausalRows(DocumentRows):
    """Each token is predicted from those before it."""

    def __init__(self, shards: Shards, config: Config, special: Special):
        pack = _PACKERS[config.data.packing]
        packer = pack(shards.starts, causal_lm.CAUSAL_EXTRA, config.data.seq_len)
        super().__init__(shards, packer, config.data.mask_documents)
        self._special = special

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        special = self._special
        return causal_lm.causal(self.packer.layout(rows), self.shards, special.bos_id, special.eos_id, self._mask)


class MaskedRows(DocumentRows):
    """Some tokens are hidden, and predicted from all others."""

    def __init__(self, shards: Shards, config: Config, special: Special, word_starts: masked_lm.WordStarts | None):
        if special.mask_id is None:
            family = f"model.family={config.model.family}"
            raise ConfigError(f"task.objective=masked needs a mask, which {family} with this tokenizer lacks")
        pack = _PACKERS[config.data.packing]
        packer = pack(shards.starts, masked_lm.MASKED_EXTRA, config.data.seq_len)
        super().__init__(shards, packer, config.data.mask_documents)
        self._ids = special.bos_id, special.eos_id, special.mask_id
        self._rate, self._word_starts = config.task.mask_rate, word_starts

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        layout = self.packer.layout(rows)
        return masked_lm.masked(layout, self.shards, *self._ids, keys, self._rate, self._mask, self._word_starts)


class SpanRows(DocumentRows):
    """Spans of a stream of text are cut out, and spelt from what is left."""

    def __init__(self, shards: Shards, config: Config, special: Special):
        task, data = config.task, config.data
        self._lengths = data.source_len or data.seq_len, data.seq_len
        self._rates = task.mask_rate, task.span_length
        raw = span_corruption.raw_length(*self._lengths, *self._rates, len(special.sentinel_ids))
        super().__init__(shards, packing.Stream(shards.starts, span_corruption.SPAN_EXTRA, raw), mask_documents=False)
        full = span_corruption.lengths(raw, *self._rates)
        last = span_corruption.lengths(self.num_slots - (self.num_rows - 1) * raw, *self._rates)
        self.cells = sum(self._lengths)
        self.num_slots = int((self.num_rows - 1) * (full.source + full.target) + last.source + last.target)
        self._sentinels = np.array(special.sentinel_ids, np.int32)
        self._ids = special.bos_id, special.eos_id

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        layout = self.packer.layout(rows)
        ids_BR = causal_lm.said(layout, self.shards, self._ids[1])
        return span_corruption.corrupt(ids_BR, self._sizes(layout), keys, self._sentinels, *self._ids, *self._lengths)

    def example_of_cells(self, rows: np.ndarray) -> np.ndarray:
        """As of any rows; the spans are those of evaluations, which draw by the number of the row."""
        layout = self.packer.layout(rows)
        keys = index_shuffle.combine(0, rows)
        return span_corruption.documents_of_targets(layout.document_BT, self._sizes(layout), keys, self._lengths[1])

    def _sizes(self, layout: packing.Layout) -> span_corruption.Lengths:
        return span_corruption.lengths((layout.document_BT >= 0).sum(axis=1), *self._rates)
