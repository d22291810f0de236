"""Packing: no slot is lost or repeated, and each packer keeps its promise about rows."""

import numpy as np
import pytest

from lslm_jax.data.packing import Bins, Pad, Stream, best_fit_decreasing

PACKERS = (Stream, Bins, Pad)


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def random_lengths(seed):
    """Sets of documents small and large, with empty ones and very long ones among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, rng.choice([2, 10, 100]), rng.integers(1, 40))
    return lengths, int(rng.integers(1, 30))


def everything(packer):
    return packer.layout(np.arange(packer.num_rows))


@pytest.mark.parametrize("packer_class", PACKERS)
@pytest.mark.parametrize("extra", [1, 2])
def test_every_slot_of_every_document_stands_in_exactly_one_cell(packer_class, extra):
    for seed in range(60):
        lengths, seq_len = random_lengths(seed)
        packer = packer_class(starts_of(lengths), extra, seq_len)
        layout = everything(packer)
        real = layout.document_BT >= 0
        cells = sorted(zip(layout.document_BT[real], layout.offset_BT[real], strict=True))
        assert cells == [(d, k) for d, length in enumerate(lengths) for k in range(length + extra)]
        assert packer.fill == real.mean()


@pytest.mark.parametrize("packer_class", PACKERS)
def test_rows_are_the_same_asked_for_alone_or_together(packer_class):
    for seed in range(20):
        lengths, seq_len = random_lengths(seed)
        packer = packer_class(starts_of(lengths), 1, seq_len)
        rows = np.random.default_rng(seed).permutation(packer.num_rows)[:9]
        for got, want in zip(packer.layout(rows), everything(packer), strict=True):
            np.testing.assert_array_equal(got, want[rows])
        assert packer.layout(rows[:0]).document_BT.shape == (0, seq_len)


@pytest.mark.parametrize("packer_class", PACKERS)
def test_segments_number_the_pieces_of_a_row_and_positions_count_within_them(packer_class):
    most = 0
    for seed in range(20):
        lengths, seq_len = random_lengths(seed)
        packer = packer_class(starts_of(lengths), 1, seq_len)
        layout = everything(packer)
        for document, offset, segment, position in zip(*layout, strict=True):
            real = document >= 0
            assert (np.diff(real.astype(int)) <= 0).all(), "padding stands at the end"
            assert (segment[~real] == 0).all()
            begins = position[real] == 0
            np.testing.assert_array_equal(segment[real], np.cumsum(begins))
            within = ~begins[1:]
            assert (np.diff(document[real])[within] == 0).all() and (np.diff(offset[real])[within] == 1).all()
        assert packer.max_segments() == layout.segments_BT.max()
        most = max(most, packer.max_segments())
    assert most > 1 or packer_class is Pad


def test_a_stream_has_padding_in_its_last_row_only():
    packer = Stream(starts_of([5, 0, 9, 3]), 1, 8)
    layout = everything(packer)
    assert packer.num_rows == 3
    np.testing.assert_array_equal(layout.document_BT[0], [0, 0, 0, 0, 0, 0, 1, 2])
    np.testing.assert_array_equal(layout.offset_BT[1], [1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(layout.document_BT[2], [2, 3, 3, 3, 3, -1, -1, -1])


def test_a_stream_of_a_trillion_tokens_is_addressed_without_being_held():
    class Documents:
        """starts of 2^31 documents of 500 tokens each."""

        def __len__(self):
            return (1 << 31) + 1

        def __getitem__(self, document):
            return np.asarray(document) * 500

    packer = Stream(Documents(), 1, 1024)
    row = packer.num_rows - 2
    layout = packer.layout(np.array([row]))
    slot = row * 1024 + np.arange(1024)
    np.testing.assert_array_equal(layout.document_BT[0], slot // 501)
    np.testing.assert_array_equal(layout.offset_BT[0], slot % 501)


def test_bins_cut_no_document_that_fits_a_row():
    lengths = np.random.default_rng(0).integers(0, 100, 500)
    layout = everything(Bins(starts_of(lengths), 1, 64))
    for document in np.flatnonzero(lengths < 64):
        rows, columns = np.nonzero(layout.document_BT == document)
        assert len(set(rows)) == 1
        np.testing.assert_array_equal(np.diff(columns), 1)


def test_bins_make_as_many_rows_as_best_fit_piece_by_piece():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 40, rng.integers(1, 200))
        rooms = []
        for size in sorted(sizes, reverse=True):
            fitting = [room for room in rooms if room >= size]
            if fitting:
                rooms.remove(min(fitting))
            rooms.append(min(fitting, default=40) - size)
        plans = best_fit_decreasing(np.bincount(sizes, minlength=41))
        assert sum(plan.rows for plan in plans) == len(rooms)
        left = [40 - sum(size * copies for size, copies in plan.runs) for plan in plans for _ in range(plan.rows)]
        assert sorted(left) == sorted(rooms)


def test_bins_of_usual_documents_are_full():
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.0, 100_000).astype(np.int64)
    assert Bins(starts_of(lengths), 1, 1024).fill > 0.999


def test_padded_rows_hold_one_piece_in_document_order():
    layout = everything(Pad(starts_of([3, 0, 9]), 1, 4))
    np.testing.assert_array_equal(layout.document_BT[:, 0], [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(layout.offset_BT[:, 0], [0, 0, 0, 4, 8])
    np.testing.assert_array_equal(layout.document_BT[1], [1, -1, -1, -1])
