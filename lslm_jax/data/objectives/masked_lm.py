"""Masked language modelling (BERT, Devlin et al., 2018): some tokens are hidden, and guessed from all others."""

import math
from collections.abc import Callable

import numpy as np

from lslm_jax.data import index_shuffle
from lslm_jax.data.batch import Batch
from lslm_jax.data.objectives.causal_lm import read
from lslm_jax.data.packing import Layout
from lslm_jax.data.shards import Shards

MASKED_EXTRA = 2
"""Slots a document has beyond its tokens: bos d1 .. dn eos."""

WordStarts = Callable[[np.ndarray], np.ndarray]
"""Tells which of consecutive tokens [n] begin a word, bool [n]."""


def num_predictions(seq_len: int, mask_rate: float) -> int:
    """Places for predictions in each row, P: as many as a row full of tokens needs."""
    return max(1, math.ceil(seq_len * mask_rate))


def masked(
    layout: Layout,
    shards: Shards,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    keys: np.ndarray,
    mask_rate: float,
    mask_documents: bool = True,
    word_starts: WordStarts | None = None,
) -> Batch:
    """Hides a share of each row's tokens, never bos or eos, and predicts them at their places.

    Of those chosen 80 % are replaced by the mask, 10 % by a random token, and 10 % stay as they are.

    Args:
      layout: of documents with MASKED_EXTRA more slots than tokens.
      shards: their tokens.
      bos_id: stands in a document's first slot.
      eos_id: in its last.
      mask_id: hides a token.
      keys: uint64 [B], what each row's draw depends on.
      mask_rate: share of a row's tokens that are predicted, but one at least where there is one.
      mask_documents: whether attention stays within documents.
      word_starts: tells which of a text's tokens begin a word, where whole words are hidden: as many as stay within
        the share, and of a row in which none does, one. Where a row cuts a word its part counts as one.

    Raises:
      DataError: a token is outside the vocabulary of the shards.
    """
    ids_BT, text_BT = _lay(layout, shards, bos_id, eos_id)
    size = num_predictions(ids_BT.shape[1], mask_rate)
    tokens_B = text_BT.sum(axis=1)
    counts_B = np.minimum(np.maximum(np.rint(mask_rate * tokens_B).astype(np.int64), 1), tokens_B)
    if word_starts is None:
        places_BP = index_shuffle.choose(keys, text_BT, counts_B)
    else:
        begins_BT = layout.positions_BT == 0
        begins_BT[:, 1:] |= ~text_BT[:, :-1]
        begins_BT[text_BT] |= word_starts(ids_BT[text_BT])
        begins_BT &= text_BT
        places_BP = choose_words(keys, text_BT, begins_BT, counts_B, size)
    batch = _hide(ids_BT, places_BP, size, mask_id, shards.vocab_size, keys)
    if mask_documents:
        return batch._replace(positions_BT=layout.positions_BT, segments_BT=layout.segments_BT)
    return batch._replace(segments_BT=(layout.segments_BT > 0).astype(np.int32))


def choose_words(
    keys: np.ndarray, text_BT: np.ndarray, begins_BT: np.ndarray, counts_B: np.ndarray, most: int
) -> np.ndarray:
    """Places of whole words drawn at random: each row's words in random order, but for those that are too much.

    Args:
      keys: uint64 [B].
      text_BT: bool, the places that words are made of.
      begins_BT: bool, where words begin; the first place of a row's text is one.
      counts_B: places to be chosen in each row, or somewhat fewer.
      most: places that a word may have if it is the only one, where all have more than the count.

    Returns:
      int64 [B, P], sorted; T in rows that have fewer.
    """
    num_rows, length = text_BT.shape
    first = np.flatnonzero(begins_BT)
    word_of_place = np.cumsum(begins_BT.reshape(-1))[text_BT.reshape(-1)] - 1
    row, place = np.divmod(first, length)
    # Row by row, then by a score that ends in the word's place, so that no two are equal.
    score = index_shuffle.combine(keys[row], place) >> np.uint64(20) << np.uint64(20) | place.astype(np.uint64)
    score = (row.astype(np.uint64) << np.uint64(44)) | (score & np.uint64((1 << 44) - 1))
    mixed = np.argsort(score)
    taken = np.zeros(len(first), bool)
    sizes = np.bincount(word_of_place, minlength=len(first))[mixed]
    taken[mixed] = _fill(row, sizes, counts_B, most)
    places = np.flatnonzero(text_BT)[taken[word_of_place]]
    per_row = np.bincount(places // length, minlength=num_rows)
    chosen = np.full((num_rows, int(per_row.max(initial=0))), length)
    chosen[np.arange(chosen.shape[1]) < per_row[:, None]] = places % length
    return chosen


def _fill(row: np.ndarray, sizes: np.ndarray, counts_B: np.ndarray, most: int) -> np.ndarray:
    """Which words are taken: in the order given, each that its row still has room for."""
    taken = np.zeros(len(row), bool)
    room_B = counts_B.copy()
    waiting = np.arange(len(row))
    while len(waiting := waiting[sizes[waiting] <= room_B[row[waiting]]]):
        rows, size = row[waiting], sizes[waiting]
        ends = np.cumsum(size)
        before_B = np.concatenate([[0], ends])[np.searchsorted(rows, np.arange(len(room_B)))]
        fits = ends - before_B[rows] <= room_B[rows]
        taken[waiting[fits]] = True
        room_B -= np.bincount(rows[fits], size[fits], len(room_B)).astype(np.int64)
        waiting = waiting[~fits]
    lone = np.flatnonzero((room_B == counts_B)[row] & (sizes <= most))
    taken[lone[np.unique(row[lone], return_index=True)[1]]] = True
    return taken


def _lay(layout: Layout, shards: Shards, bos_id: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the cells, 0 in padding, and which of them are tokens of documents."""
    real_BT = layout.document_BT >= 0
    start_BT = shards.starts[layout.document_BT]
    last_BT = shards.starts[layout.document_BT + 1] - start_BT + 1 == layout.offset_BT
    text_BT = real_BT & (layout.offset_BT > 0) & ~last_BT
    ids_BT = np.where(last_BT, np.int32(eos_id), np.int32(bos_id))
    ids_BT[text_BT] = read(shards, (start_BT + layout.offset_BT)[text_BT] - 1)
    ids_BT[~real_BT] = 0
    return ids_BT, text_BT


def _hide(
    ids_BT: np.ndarray, places_BP: np.ndarray, size: int, mask_id: int, vocab_size: int, keys: np.ndarray
) -> Batch:
    """Replaces what stands at the places, up to `size` a row, and predicts it. A place of T is none."""
    num_rows, length = ids_BT.shape
    places = np.full((num_rows, size), length)
    places[:, : places_BP.shape[1]] = places_BP
    used = np.nonzero(places < length)
    cells = used[0], places[used]
    # Numbers beyond the places' own, so that it does not depend on how a place was chosen what becomes of it.
    draw = index_shuffle.combine(keys[used[0]], length + used[1])
    fate, token = draw % np.uint64(10), (draw // np.uint64(10) % np.uint64(vocab_size)).astype(np.int32)
    tokens_BT, targets_BP, weights_BP = ids_BT.copy(), np.zeros(places.shape, np.int32), np.zeros(places.shape, "f4")
    targets_BP[used] = ids_BT[cells]
    weights_BP[used] = 1
    tokens_BT[cells] = np.where(fate < 8, np.int32(mask_id), np.where(fate == 8, token, ids_BT[cells]))
    places_BP = np.where(places < length, places, 0).astype(np.int32)
    return Batch(tokens_BT, targets_BP, weights_BP, places_BP=places_BP)
