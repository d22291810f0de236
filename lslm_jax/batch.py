"""The contract between data and models: what one batch is.

Legend of the shapes: B rows (global batch), T positions. Data fills a Batch with NumPy arrays, training places it on
the mesh, models and losses read it. A part that a family or a setting does not need is None.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the mesh


class Batch(NamedTuple):
    """One global batch of rows. Padding is told by weight and segment, never by a token id.

    Attributes:
      tokens_BT: int32, what the model reads.
      targets_BT: int32, what it should say at each position.
      weights_BT: float32, how much each target counts: 0 for padding, 1 otherwise.
      positions_BT: int32, place of each token within its piece of a document, from 0. None: 0..T-1 in every row.
      segments_BT: int32, which document of its row a token belongs to, from 1; 0 is padding. Attention never crosses
        segments. None: each row is one segment (padding, if any, at its end, where causality hides it).
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    positions_BT: Array | None = None
    segments_BT: Array | None = None
