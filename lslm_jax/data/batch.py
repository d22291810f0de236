"""The contract between data and models: what one batch is.

Legend of the shapes: B rows (global batch), T positions, S source positions, P predictions. Data fills a Batch with
NumPy arrays, training places it on the mesh, models and losses read it. A part that a family, an objective or a setting
does not need is None.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the mesh


class Batch(NamedTuple):
    """One global batch of rows. Padding is told by weight and segment, never by a token id.

    Attributes:
      tokens_BT: int32, what the model reads; of an encoder-decoder, what its decoder reads.
      targets_BT: int32, what it should say at each position, or [B, P] for the positions in `places_BP`. Of heads on a
        whole row: [B, 1] a class, or a number (float32); [B, 2] the first and the last position of an answer.
      weights_BT: float32, of the shape of the targets; how much each counts: 0 for padding, 1 otherwise.
      positions_BT: int32, place of each token within its piece of a document, from 0. None: 0..T-1 in every row.
      segments_BT: int32, which document of its row a token belongs to, from 1; 0 is padding. Attention never crosses
        segments. None: each row is one segment (padding, if any, at its end, where causality hides it).
      types_BT: int32, 0 for the first and 1 for the second text of a pair.
      places_BP: int32, the position that each target belongs to. None: the targets are those of all positions.
      source_BS: int32, what the encoder of an encoder-decoder reads; likewise its positions and segments. A token of
        the target attends to source tokens of its own segment number.
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    positions_BT: Array | None = None
    segments_BT: Array | None = None
    types_BT: Array | None = None
    places_BP: Array | None = None
    source_BS: Array | None = None
    source_positions_BS: Array | None = None
    source_segments_BS: Array | None = None
