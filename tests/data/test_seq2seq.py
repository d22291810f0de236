"""Pairs: sources and targets stand whole, under the same number, and each target token is said once."""

import numpy as np
import pytest
from tiny_data import BOS, EOS, PACKINGS, VOCAB_SIZE, Case, config_of, examples_of, write_all

from lslm_jax.data.dataloader import open_train
from lslm_jax.data.example_packing import cut

ENCODED = Case("seq2seq", "encoder_decoder", 2)
DECODED = Case("seq2seq", "decoder", 2)
SIZE = VOCAB_SIZE + 100
SOURCE_LEN, SEQ_LEN = 32, 24


def everything(directory, config):
    (source,) = open_train(config, directory, SIZE)._sources
    numbers = np.arange(source.num_rows)
    return source.batch(numbers, numbers.astype(np.uint64))


def pieces(ids, segments, positions):
    """(row, number within the row, ids) of each piece, in order; positions count from 0 in each."""
    for row in range(len(ids)):
        for segment in range(1, segments[row].max() + 1):
            (cells,) = np.nonzero(segments[row] == segment)
            assert (np.diff(cells) == 1).all()
            np.testing.assert_array_equal(positions[row][cells], np.arange(len(cells)))
            yield row, segment, ids[row][cells].tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_encoder_reads_each_source_and_a_decoder_says_its_target(tmp_path, packing):
    examples = write_all(tmp_path, ENCODED)["train"]
    batch = everything(tmp_path, config_of(ENCODED, packing))
    sources = list(pieces(batch.source_BS, batch.source_segments_BS, batch.source_positions_BS))
    read = list(pieces(batch.tokens_BT, batch.segments_BT, batch.positions_BT))
    said = list(pieces(batch.targets_BT, batch.segments_BT, batch.positions_BT))
    np.testing.assert_array_equal(batch.weights_BT, batch.segments_BT > 0)
    assert [piece[:2] for piece in sources] == [piece[:2] for piece in said], "one number, one pair"
    expected = []
    for (source, target), _ in examples:
        source, target = source.tolist(), target.tolist()
        expected.append(([*source[: SOURCE_LEN - 1], EOS], [BOS, *target][:SEQ_LEN], [*target, EOS][:SEQ_LEN]))
    got = [(a[2], b[2], c[2]) for a, b, c in zip(sources, read, said, strict=True)]
    assert sorted(got) == sorted(expected)
    assert (len(batch.tokens_BT) == len(examples)) == (packing == "pad")


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_decoder_reads_source_and_target_and_says_the_target(tmp_path, packing):
    examples = write_all(tmp_path, DECODED)["train"]
    batch = everything(tmp_path, config_of(DECODED, packing, seq_len=48))
    assert (batch.targets_BT[batch.weights_BT == 0] == 0).all()
    parts = (batch.tokens_BT, batch.targets_BT, batch.weights_BT)
    got = [list(pieces(part, batch.segments_BT, batch.positions_BT)) for part in parts]
    got = sorted((a[2], b[2], c[2]) for a, b, c in zip(*got, strict=True))
    expected, too_long = [], 0
    for (source, target), _ in examples:
        reads, says = [BOS, *source.tolist()], [*target.tolist(), EOS]
        kept, said = (int(n[0]) for n in cut(np.array([len(reads)]), np.array([len(says)]), 48))
        too_long += len(reads) + len(says) > 48
        tokens = [*reads[:kept], *[BOS, *target.tolist()][:said]]
        expected.append((tokens, [0] * kept + says[:said], [0.0] * kept + [1.0] * said))
    assert too_long and got == sorted(expected)


@pytest.mark.parametrize("case", [ENCODED, DECODED], ids=lambda case: case.family)
def test_packed_rows_are_fuller_than_padded_ones(tmp_path, case):
    write_all(tmp_path, case)
    fills = [open_train(config_of(case, packing, seq_len=96), tmp_path, SIZE).fill for packing in PACKINGS]
    assert fills[0] == fills[1] > 1.5 * fills[2], "as a stream, pairs are packed as in bins"


def test_tiny_examples_have_what_these_tests_rely_on():
    lengths = np.array([[len(text) for text in texts] for texts, _ in examples_of(ENCODED, 40)])
    assert (lengths == 0).any() and (lengths[:, 0] > SOURCE_LEN).any() and (lengths[:, 1] > SEQ_LEN).any()
