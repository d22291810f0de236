"""What the model reads and what it should say, from a layout of documents: next-token prediction, and what all share.

An objective is a function of a layout or of lengths, the shards, the special ids and, where it draws at random, a key
for each row. It also says how many slots a document has beyond its tokens.
"""

import numpy as np

from lslm_jax.data.batch import Batch
from lslm_jax.data.packing import Layout
from lslm_jax.data.shards import Shards
from lslm_jax.errors import DataError

CAUSAL_EXTRA = 1
"""Slots a document has beyond its tokens: it reads bos d1 .. dn and says d1 .. dn eos."""


def causal(layout: Layout, shards: Shards, bos_id: int, eos_id: int, mask_documents: bool = True) -> Batch:
    """Next-token prediction within each document: slot k reads token k - 1 and predicts token k.

    Args:
      layout: of documents with CAUSAL_EXTRA more slots than tokens.
      shards: their tokens.
      bos_id: read in a document's first slot.
      eos_id: predicted in its last.
      mask_documents: whether attention stays within documents; otherwise segments and positions are None.

    Raises:
      DataError: a token is outside the vocabulary of the shards.
    """
    real_BT = layout.document_BT >= 0
    targets_BT = said(layout, shards, eos_id)
    tokens_BT = shift(targets_BT, bos_id)
    # Pieces read what stands before them in their document; it may not be in the row.
    begins = np.nonzero(((layout.positions_BT == 0) | (layout.offset_BT == 0)) & real_BT)
    tokens_BT[begins] = bos_id
    inside = tuple(index[layout.offset_BT[begins] > 0] for index in begins)
    tokens_BT[inside] = read(shards, shards.starts[layout.document_BT[inside]] + layout.offset_BT[inside] - 1)
    tokens_BT[~real_BT] = 0
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=targets_BT,
        weights_BT=real_BT.astype(np.float32),
        positions_BT=layout.positions_BT if mask_documents else None,
        segments_BT=layout.segments_BT if mask_documents else None,
    )


def said(layout: Layout, shards: Shards, eos_id: int) -> np.ndarray:
    """Ids of documents with one slot more than tokens: token k in slot k, eos in the last, 0 in padding."""
    real_BT = layout.document_BT >= 0
    start_BT = shards.starts[layout.document_BT]
    last_BT = shards.starts[layout.document_BT + 1] - start_BT == layout.offset_BT
    at_BT = np.where(real_BT, start_BT + layout.offset_BT, 0)
    # The last document's eos has no token under it.
    ids_BT = read(shards, np.minimum(at_BT, shards.num_tokens - 1))
    ids_BT[last_BT] = eos_id
    ids_BT[~real_BT] = 0
    return ids_BT


def shift(ids_BT: np.ndarray, bos_id: int) -> np.ndarray:
    """What is read where `ids_BT` is said: the id before, and at first bos."""
    tokens_BT = np.empty_like(ids_BT)
    tokens_BT[:, :1] = bos_id
    tokens_BT[:, 1:] = ids_BT[:, :-1]
    return tokens_BT


def read(shards: Shards, index: np.ndarray) -> np.ndarray:
    """Ids at places of the whole split, int32, of the shape of `index`.

    Raises:
      DataError: one is outside the vocabulary of the shards.
    """
    ids = shards.take(index)
    if ids.size and ids.max() >= shards.vocab_size:
        bad = ids >= shards.vocab_size
        document = np.searchsorted(shards.starts, index[bad][0], "right") - 1
        where = f"document {document} of {shards.directory}"
        raise DataError(f"token {ids[bad][0]} in {where}, vocabulary {shards.vocab_size}")
    return ids
