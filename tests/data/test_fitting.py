"""Whole examples in rows: each once, none beyond its limits, and rows are full."""

import numpy as np
import pytest

from lslm_jax.data.example_packing import Fitting, cut, fit


@pytest.mark.parametrize("limits", [(30,), (30, 20), (7, 50)])
@pytest.mark.parametrize("alone", [True, False])
def test_every_example_stands_in_one_row_and_no_row_is_too_full(limits, alone):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, np.array(limits) + 1, (int(rng.integers(1, 300)), len(limits)))
        fitting = Fitting(sizes, limits, alone)
        row, example = fitting.placed(np.arange(fitting.num_rows))
        assert sorted(example) == list(range(len(sizes)))
        assert (np.diff(row) >= 0).all() and set(row) == set(range(fitting.num_rows))
        filled = np.array([np.bincount(row, sizes[example, k]) for k in range(len(limits))])
        assert (filled <= np.array(limits)[:, None]).all()
        assert fitting.max_segments() == np.bincount(row).max()
        assert fitting.num_slots == filled.sum()
        if alone:
            np.testing.assert_array_equal(example, np.arange(len(sizes)))


def test_rows_are_the_same_asked_for_alone_or_together():
    sizes = np.random.default_rng(0).integers(1, 20, (500, 2))
    fitting = Fitting(sizes, (40, 40), alone=False)
    rows = np.random.default_rng(1).permutation(fitting.num_rows)
    together = fitting.placed(rows)
    for i in range(len(rows)):
        np.testing.assert_array_equal(fitting.placed(rows[i : i + 1]).example, together.example[together.row == i])
    assert len(fitting.placed(rows[:0]).row) == 0


def test_many_groups_are_numbered_without_gaps():
    sizes = np.random.default_rng(0).integers(1, 65, (300_000, 2))
    rows = fit(sizes, (64, 64))
    assert len(np.unique(rows)) == rows.max() + 1
    assert (np.bincount(rows, sizes[:, 0]) <= 64).all() and (np.bincount(rows, sizes[:, 1]) <= 64).all()


def sentences(rng, count, ratio, spread):
    """Sizes of sentences and their translations, as in corpora: log-normal, and alike but not the same."""
    source = np.clip(rng.lognormal(np.log(22), 0.6, count), 2, 128)
    target = np.clip(source * ratio * rng.lognormal(0, spread, count), 2, 128)
    return np.stack([source, target], axis=1).astype(np.int64)


@pytest.mark.parametrize(("ratio", "spread"), [(1.0, 0.2), (1.3, 0.2), (0.8, 0.4)])
def test_rows_of_short_sentences_are_full(ratio, spread):
    sizes = sentences(np.random.default_rng(0), 20_000, ratio, spread)
    rows = fit(sizes, (128, 128))
    assert max(sizes.sum(axis=0)) / (128 * (rows.max() + 1)) > 0.95


def test_of_two_texts_the_longer_is_cut_first():
    def one_by_one(first, second, room):
        while first + second > room:
            first, second = (first - 1, second) if first > second else (first, second - 1)
        return first, second

    for first in range(12):
        for second in range(12):
            for room in range(14):
                got = cut(np.array([first]), np.array([second]), room)
                assert tuple(int(length[0]) for length in got) == one_by_one(first, second, room)
