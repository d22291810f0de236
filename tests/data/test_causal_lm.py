"""Objectives: what the model reads and what it should say."""

import numpy as np
import pytest
from etils import epath

from lslm_jax.data.objectives.causal_lm import CAUSAL_EXTRA, causal
from lslm_jax.data.packing import Bins, Pad, Stream
from lslm_jax.data.shards import Shards, ShardWriter

BOS, EOS = 1, 2


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    writer = ShardWriter(epath.Path(tmp_path), 1000, 300)
    for i, length in enumerate([0, *rng.integers(0, 60, 50), 200, 0]):
        writer.add([rng.integers(3, 1000, length)], 1, i + 1)
    writer.finish()
    return Shards.open(tmp_path)


@pytest.mark.parametrize("packer_class", [Stream, Bins, Pad])
def test_each_document_reads_bos_and_its_tokens_and_says_its_tokens_and_eos(shards, packer_class):
    packer = packer_class(shards.starts, CAUSAL_EXTRA, 32)
    layout = packer.layout(np.arange(packer.num_rows))
    batch = causal(layout, shards, BOS, EOS)
    for document in range(shards.num_documents):
        ids = shards.take(np.arange(*shards.starts[document : document + 2]))
        cells = np.nonzero(layout.document_BT == document)
        cells = tuple(np.array(cells)[:, np.argsort(layout.offset_BT[cells])])
        np.testing.assert_array_equal(batch.tokens_BT[cells], [BOS, *ids])
        np.testing.assert_array_equal(batch.targets_BT[cells], [*ids, EOS])


def test_padding_counts_for_nothing_and_holds_zeros(shards):
    packer = Pad(shards.starts, CAUSAL_EXTRA, 32)
    batch = causal(packer.layout(np.arange(packer.num_rows)), shards, BOS, EOS)
    np.testing.assert_array_equal(batch.weights_BT, batch.segments_BT > 0)
    assert batch.weights_BT.sum() == packer.num_slots
    assert (batch.tokens_BT[batch.weights_BT == 0] == 0).all() and (batch.targets_BT[batch.weights_BT == 0] == 0).all()


def test_a_batch_has_the_types_of_the_contract_and_no_segments_where_documents_see_each_other(shards):
    layout = Stream(shards.starts, CAUSAL_EXTRA, 32).layout(np.arange(3))
    batch = causal(layout, shards, BOS, EOS)
    assert [part.dtype for part in batch if part is not None] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    unmasked = causal(layout, shards, BOS, EOS, mask_documents=False)
    assert unmasked.segments_BT is None and unmasked.positions_BT is None
    np.testing.assert_array_equal(unmasked.tokens_BT, batch.tokens_BT)
