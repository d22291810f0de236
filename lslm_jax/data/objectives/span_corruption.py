"""Span corruption (T5, Raffel et al., 2020): sentinels stand for spans of a text, and the target spells the spans."""

from typing import NamedTuple

import numpy as np

from lslm_jax.data import index_shuffle
from lslm_jax.data.batch import Batch
from lslm_jax.data.objectives.causal_lm import shift
from lslm_jax.errors import ConfigError

SPAN_EXTRA = 1
"""Slots a document has beyond its tokens: d1 .. dn eos."""


class Lengths(NamedTuple):
    """Of rows to be corrupted, in tokens: of the raw text, and how many of them lie in how many spans; int64 [B]."""

    raw: np.ndarray
    noise: np.ndarray
    spans: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """Of what is left, with a sentinel for each span and eos."""
        return self.raw - self.noise + self.spans + 1

    @property
    def target(self) -> np.ndarray:
        """Of the spans, each after its sentinel, and eos."""
        return self.noise + self.spans + 1


def lengths(raw: np.ndarray | int, mask_rate: float, span_length: float) -> Lengths:
    """How much of a text is corrupted: one span of one token at least, and never all of it."""
    raw = np.asarray(raw)
    noise = np.minimum(np.maximum(np.rint(raw * mask_rate).astype(np.int64), 1), raw - 1)
    spans = np.maximum(np.rint(noise / span_length).astype(np.int64), 1)
    return Lengths(raw, noise, np.minimum(spans, np.minimum(noise, raw - noise)))


def raw_length(source_len: int, seq_len: int, mask_rate: float, span_length: float, num_sentinels: int) -> int:
    """Length of the texts that fill a source row once they are corrupted: the longest that fit.

    Args:
      source_len: tokens of a source row, S.
      seq_len: tokens of a target row, T.
      mask_rate: share of the tokens that lie in spans.
      span_length: mean length of a span.
      num_sentinels: spans that can be told apart.

    Raises:
      ConfigError: the target does not fit, or there are more spans than sentinels.
    """
    if source_len < 3:
        raise ConfigError(
            f"data.source_len={source_len} is too short for task.objective=span_corruption: use 3 or more"
        )
    raw = 2
    while lengths(raw + 1, mask_rate, span_length).source <= source_len:
        raw += 1
    full = lengths(raw, mask_rate, span_length)
    if full.target > seq_len:
        raise ConfigError(
            f"data.seq_len={seq_len} is too short for the spans of a source row of {source_len} tokens: it needs "
            f"data.seq_len={full.target} (with task.mask_rate={mask_rate} and task.span_length={span_length})"
        )
    if full.spans > num_sentinels:
        raise ConfigError(
            f"a source row of {source_len} tokens has {full.spans} corrupted spans, the vocabulary {num_sentinels} "
            "sentinels: use a smaller data.source_len or a greater task.span_length"
        )
    return raw


def corrupt(
    ids_BR: np.ndarray,
    sizes: Lengths,
    keys: np.ndarray,
    sentinel_ids: np.ndarray,
    bos_id: int,
    eos_id: int,
    source_len: int,
    seq_len: int,
) -> Batch:
    """Cuts spans out of texts: the source has sentinel i in place of span i, the target spells sentinel i, span i.

    Args:
      ids_BR: int32, the texts, each at the beginning of its row.
      sizes: of each row.
      keys: uint64 [B], what each row's draw depends on.
      sentinel_ids: int32, at least as many as there are spans.
      bos_id: read in the target's first slot.
      eos_id: ends source and target.
      source_len: S.
      seq_len: T.
    """
    noise_BR, first_BR = draw_spans(sizes, keys, ids_BR.shape[1])
    sentinels_BR = sentinel_ids[np.cumsum(first_BR, axis=1, dtype=np.int32) - 1]
    real_BR = np.arange(ids_BR.shape[1]) < sizes.raw[:, None]
    row = np.arange(len(ids_BR))

    source_BS = np.zeros((len(row), source_len), np.int32)
    kept = real_BR & (first_BR | ~noise_BR)
    source_BS[_left(kept)] = np.where(first_BR, sentinels_BR, ids_BR)[kept]
    source_BS[row, sizes.source - 1] = eos_id

    targets_BT = np.zeros((len(row), seq_len), np.int32)
    of_tokens, of_sentinels = _target_cells(noise_BR, first_BR)
    targets_BT[of_tokens] = ids_BR[noise_BR]
    targets_BT[of_sentinels] = sentinels_BR[first_BR]
    targets_BT[row, sizes.target - 1] = eos_id

    segments_BT = (np.arange(seq_len) < sizes.target[:, None]).astype(np.int32)
    return Batch(
        tokens_BT=shift(targets_BT, bos_id) * segments_BT,
        targets_BT=targets_BT,
        weights_BT=segments_BT.astype(np.float32),
        segments_BT=segments_BT,
        source_BS=source_BS,
        source_segments_BS=(np.arange(source_len) < sizes.source[:, None]).astype(np.int32),
    )


def documents_of_targets(document_BR: np.ndarray, sizes: Lengths, keys: np.ndarray, seq_len: int) -> np.ndarray:
    """The document that each target cell of `corrupt` belongs to, [B, T]; -1 in padding.

    A sentinel belongs to the document in which its span begins, eos to that of the last span.

    Args:
      document_BR: of each token of the texts.
      sizes, keys, seq_len: as `corrupt` has them.
    """
    noise_BR, first_BR = draw_spans(sizes, keys, document_BR.shape[1])
    found_BT = np.full((len(document_BR), seq_len), -1)
    of_tokens, of_sentinels = _target_cells(noise_BR, first_BR)
    found_BT[of_tokens] = document_BR[noise_BR]
    found_BT[of_sentinels] = document_BR[first_BR]
    row = np.arange(len(document_BR))
    found_BT[row, sizes.target - 1] = found_BT[row, sizes.target - 2]
    return found_BT


def _target_cells(
    noise_BR: np.ndarray, first_BR: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The target cells, as (row, place), of the tokens in spans and of the sentinels before them."""
    row = np.nonzero(noise_BR)[0]
    place = np.cumsum(noise_BR.astype(np.int32) + first_BR, axis=1)[noise_BR] - 1
    begins = first_BR[noise_BR]
    return (row, place), (row[begins], place[begins] - 1)


def draw_spans(sizes: Lengths, keys: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens lie in spans, and which of these begin one; bool [B, width].

    What is kept and what is cut out are each divided at random into as many parts as there are spans, and these take
    turns. So a text begins with what is kept, ends with a span, and no two spans touch.
    """
    kept = _divide(index_shuffle.combine(keys, 0), sizes.raw - sizes.noise, sizes.spans)
    noise = _divide(index_shuffle.combine(keys, 1), sizes.noise, sizes.spans)
    row, span = np.nonzero(np.arange(kept.shape[1] - 1) < sizes.spans[:, None])
    change = np.zeros((len(keys), width + 1), np.int8)
    before = kept[row, span + 1]
    change[row, before + noise[row, span]] = 1
    change[row, before + noise[row, span + 1]] = -1
    return np.cumsum(change[:, :-1], axis=1, dtype=np.int8) > 0, change[:, :-1] > 0


def _divide(keys: np.ndarray, items_B: np.ndarray, parts_B: np.ndarray) -> np.ndarray:
    """Bounds of `parts` parts of so many items, none empty, all divisions equally likely: int64 [B, parts + 1]."""
    inner = np.arange(int(items_B.max(initial=1)) - 1) < items_B[:, None] - 1
    cuts = index_shuffle.choose(keys, inner, np.maximum(parts_B - 1, 0)) + 1
    ends_B1 = items_B[:, None]
    return np.concatenate([np.zeros_like(ends_B1), np.minimum(cuts, ends_B1), ends_B1], axis=1)


def _left(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the chosen cells of each row go when they move together to its left end."""
    return np.nonzero(kept)[0], np.cumsum(kept, axis=1, dtype=np.int32)[kept] - 1
