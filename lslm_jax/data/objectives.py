"""What the model reads and what it should say, from a layout of documents.

An objective is a function of a layout, the shards, the special ids and, where it draws at random, a seed. It also says
how many slots a document has beyond its tokens.
"""

import numpy as np

from lslm_jax.batch import Batch
from lslm_jax.data.packing import Layout
from lslm_jax.data.shards import Shards
from lslm_jax.errors import DataError

CAUSAL_EXTRA = 1
"""Slots a document has beyond its tokens: it reads bos d1 .. dn and says d1 .. dn eos."""


def causal(layout: Layout, shards: Shards, bos_id: int, eos_id: int, mask_documents: bool = True) -> Batch:
    """Next-token prediction within each document: slot k reads token k - 1 and predicts token k.

    Args:
      layout: of documents with CAUSAL_EXTRA more slots than tokens.
      shards: their tokens; at least one.
      bos_id: read in a document's first slot.
      eos_id: predicted in its last.
      mask_documents: whether attention stays within documents; otherwise segments and positions are None.

    Raises:
      DataError: a token is outside the vocabulary of the shards.
    """
    real_BT = layout.document_BT >= 0
    start_BT = shards.starts[layout.document_BT]
    last_BT = shards.starts[layout.document_BT + 1] - start_BT == layout.offset_BT
    at_BT = np.where(real_BT, start_BT + layout.offset_BT, 0)
    # The last document's eos has no token under it.
    ids_BT = shards.take(np.minimum(at_BT, shards.num_tokens - 1))
    targets_BT = np.where(last_BT, np.int32(eos_id), ids_BT)
    targets_BT[~real_BT] = 0
    tokens_BT = np.empty_like(targets_BT)
    tokens_BT[:, 1:] = targets_BT[:, :-1]
    begins = np.nonzero(layout.positions_BT == 0)  # of pieces, which read what stands before them in their document
    before = np.where(layout.offset_BT[begins] > 0, at_BT[begins] - 1, 0)
    tokens_BT[begins] = np.where(layout.offset_BT[begins] > 0, shards.take(before), bos_id)
    tokens_BT[~real_BT] = 0
    if targets_BT.size and max(tokens_BT.max(), targets_BT.max()) >= shards.vocab_size:
        _refuse(targets_BT, tokens_BT, layout, shards)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=targets_BT,
        weights_BT=real_BT.astype(np.float32),
        positions_BT=layout.positions_BT if mask_documents else None,
        segments_BT=layout.segments_BT if mask_documents else None,
    )


def _refuse(targets_BT: np.ndarray, tokens_BT: np.ndarray, layout: Layout, shards: Shards) -> None:
    ids_BT = np.maximum(targets_BT, tokens_BT)
    b, t = np.argwhere(ids_BT >= shards.vocab_size)[0]
    where = f"document {layout.document_BT[b, t]} of {shards.directory}"
    raise DataError(f"token {ids_BT[b, t]} in {where}, vocabulary {shards.vocab_size}")
