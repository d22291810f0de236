"""Random batches of every kind for benchmarks: full rows, nothing to read, no end."""

from typing import Any

import numpy as np

from lslm_jax.config import Config
from lslm_jax.data import index_shuffle
from lslm_jax.data.batch import Batch
from lslm_jax.data.objectives.masked_lm import num_predictions

_DOCUMENTS = 8  # at most, in a row


def facts(config: Config) -> dict[str, Any]:
    """What the manifest of random tokens would say."""
    words = {"vocab_size": config.tokenizer.vocab_size, "sha256": "", "bos_id": 0, "eos_id": 0}
    return {"tokenizer": words, "sha256": "", "labels": ["0", "1"]}


class SyntheticInput:
    """Random ids, in up to eight documents a row where several share one and are kept apart.

    Attributes:
      num_rows: 0, as there is no end to them.
      fill: 1, as there is no padding.
      slots: which rows of a batch this process takes.
      batch_size, offset: as those of `pipeline.TrainInput`.
    """

    num_rows = 0
    fill = 1.0

    def __init__(self, config: Config, vocab_size: int, rows: np.ndarray | None = None):
        self._config = config
        self._vocab_size = vocab_size
        self.batch_size, self.offset = config.train.batch_size, 0
        self.slots = np.arange(config.train.batch_size) if rows is None else rows
        self._seq_len, self._source_len = config.data.seq_len, config.data.source_len or config.data.seq_len
        self._make = {
            "causal": self._causal,
            "masked": self._masked,
            "span_corruption": self._pairs,
            "seq2seq": self._pairs if config.model.family == "encoder_decoder" else self._prefixed,
        }.get(config.task.objective, self._head)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step."""
        return self._make(index_shuffle.combine(self._config.seed, self.rows(step)[:, 2]))

    def rows(self, step: int, slots: np.ndarray | None = None, steps: int = 1) -> np.ndarray:
        """Source, epoch and number, int64 [rows, 3], of this process's rows of batches, or of other slots of them."""
        slots = self.slots if slots is None else slots
        number = index_shuffle.positions(step, steps, self.batch_size, slots, self.offset)
        return np.stack([np.zeros_like(number), np.zeros_like(number), number], axis=1)

    def sizes(self) -> list[int]:
        """None: there is no end to them."""
        return []

    def remarks(self) -> list[str]:
        """Nothing."""
        return []

    def epoch(self, step: int) -> float:
        """0: nothing is seen twice."""
        return 0.0

    def max_segments(self) -> int:
        """Greatest number of segments in any row, of the target and, where there is one, of the source."""
        objective, data = self._config.task.objective, self._config.data
        together = data.mask_documents if objective in ("causal", "masked") else objective == "seq2seq"
        if data.packing == "pad" or not together:
            return 1
        return min(_DOCUMENTS, self._seq_len, self._source_len)

    def _causal(self, keys: np.ndarray) -> Batch:
        ids = self._draw(keys, 0, self._seq_len + 1, self._vocab_size)
        weights = np.ones((len(keys), self._seq_len), np.float32)
        batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weights)
        if not self._config.data.mask_documents:
            return batch
        positions, segments = self._documents(keys, 1, self._seq_len)
        return batch._replace(positions_BT=positions, segments_BT=segments)

    def _masked(self, keys: np.ndarray) -> Batch:
        batch = self._causal(keys)
        size = num_predictions(self._seq_len, self._config.task.mask_rate)
        every, counts = np.ones(batch.tokens_BT.shape, bool), np.full(len(keys), size)
        places = index_shuffle.choose(index_shuffle.combine(keys, 2), every, counts).astype(np.int32)
        targets, weights = np.take_along_axis(batch.targets_BT, places, 1), np.ones(places.shape, np.float32)
        segments = np.ones_like(batch.tokens_BT) if batch.segments_BT is None else batch.segments_BT
        return batch._replace(targets_BT=targets, weights_BT=weights, segments_BT=segments, places_BP=places)

    def _pairs(self, keys: np.ndarray) -> Batch:
        batch = self._causal(keys)
        positions, segments = self._documents(keys, 1, self._seq_len)
        source_positions, source_segments = self._documents(keys, 3, self._source_len)
        batch = batch._replace(
            segments_BT=segments,
            source_BS=self._draw(keys, 4, self._source_len, self._vocab_size),
            source_segments_BS=source_segments,
        )
        if self._config.task.objective == "span_corruption":
            return batch._replace(positions_BT=None)
        return batch._replace(positions_BT=positions, source_positions_BS=source_positions)

    def _prefixed(self, keys: np.ndarray) -> Batch:
        """A source, which does not count, is about the first half of each document."""
        batch = self._causal(keys)
        positions, segments = self._documents(keys, 1, self._seq_len)
        weights = (positions >= self._seq_len // (2 * self.max_segments())).astype(np.float32)
        return batch._replace(positions_BT=positions, segments_BT=segments, weights_BT=weights)

    def _head(self, keys: np.ndarray) -> Batch:
        objective, length = self._config.task.objective, self._seq_len
        tokens = self._draw(keys, 0, length, self._vocab_size)
        labels = max(1, self._config.model.num_labels)
        if objective == "regression":
            targets = self._draw(keys, 5, 1, 1 << 20).astype(np.float32) / (1 << 20)
        elif objective == "qa":
            targets = np.sort(self._draw(keys, 5, 2, length), axis=1)
        else:
            targets = self._draw(keys, 5, length if objective == "tagging" else 1, labels)
        types = None
        if self._config.model.token_types > 1:
            cut = self._draw(keys, 6, 1, length)
            types = (np.arange(length) > cut).astype(np.int32)
        weights = np.ones(targets.shape, np.float32)
        return Batch(tokens, targets, weights, segments_BT=np.ones_like(tokens), types_BT=types)

    def _draw(self, keys: np.ndarray, use: int, length: int, below: int) -> np.ndarray:
        """Random int32 [B, length]; numbers of different uses are independent."""
        draws = index_shuffle.combine(keys[:, None], use, np.arange(length))
        return (draws % np.uint64(below)).astype(np.int32)

    def _documents(self, keys: np.ndarray, use: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segments of rows cut at random places, always into as many documents."""
        begins = np.zeros((len(keys), length), bool)
        begins[:, 0] = True
        cuts = index_shuffle.choose(
            index_shuffle.combine(keys, use), ~begins, np.full(len(keys), self.max_segments() - 1)
        )
        np.put_along_axis(begins, cuts, True, axis=1)
        place = np.arange(length, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        return positions, np.cumsum(begins, axis=1, dtype=np.int32)
