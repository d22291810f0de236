"""What is drawn at random: permutations, choices and mixtures that are computed, not stored."""

import numpy as np
import pytest

from lslm_jax.data.index_shuffle import PATTERN, choose, combine, mixture_pattern, permute
from lslm_jax.errors import ConfigError


def test_every_index_is_sent_to_its_own_for_any_n():
    for n in range(1, 301):
        for seed in (0, 1, 2**63):
            assert sorted(permute(np.arange(n), n, seed)) == list(range(n))


@pytest.mark.parametrize("n", [10**6 + 3, 2**32, 2**48])
def test_samples_of_huge_ranges_neither_meet_nor_leave_the_range(n):
    index = np.unique(np.random.default_rng(0).integers(0, n, 100_000))
    sent = permute(index, n, 7)
    assert len(np.unique(sent)) == len(index)
    assert sent.min() >= 0 and sent.max() < n
    share = np.histogram(sent, 10, (0, n))[0] / len(index)
    np.testing.assert_allclose(share, 0.1, atol=0.01)


def test_every_index_goes_everywhere_over_the_seeds():
    n, seeds = 7, np.arange(70_000)
    for index in range(n):
        share = np.bincount(permute(np.full(len(seeds), index), n, seeds), minlength=n) / len(seeds)
        np.testing.assert_allclose(share, 1 / n, atol=0.01)
    orders = {tuple(permute(np.arange(5), 5, seed)) for seed in range(3000)}
    assert len(orders) == 120


def test_neighbours_are_scattered_and_epochs_differ():
    n = 10_000
    first, second = permute(np.arange(n), n, 0), permute(np.arange(n), n, 1)
    assert np.mean(first == second) < 0.001
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_a_choice_has_as_many_open_places_as_it_should_in_order():
    rng = np.random.default_rng(0)
    for length in (1, 7, 200):
        open_BT = rng.random((50, length)) < 0.6
        counts = rng.integers(0, open_BT.sum(axis=1) + 1)
        keys = rng.integers(0, 1 << 63, 50, np.uint64)
        places = choose(keys, open_BT, counts)
        assert places.shape == (50, counts.max())
        for row, count in enumerate(counts):
            chosen = places[row, :count]
            assert (np.diff(chosen) > 0).all() and open_BT[row, chosen].all() and (places[row, count:] == length).all()
        alone = choose(keys[3:4], open_BT[3:4], counts[3:4])
        np.testing.assert_array_equal(alone[0], places[3, : counts[3]])
    assert choose(keys[:0], open_BT[:0], counts[:0]).shape == (0, 0)


def test_every_set_of_places_is_as_likely_as_any_other():
    places = choose(combine(1, np.arange(60_000)), np.ones((60_000, 5), bool), np.full(60_000, 2))
    _, counts = np.unique(places @ [5, 1], return_counts=True)
    assert len(counts) == 10
    np.testing.assert_allclose(counts / 60_000, 0.1, atol=0.006)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5.0, 2.0, 1.0, 1.0], [1000.0, 1.0]])
def test_every_stretch_of_a_mixture_has_each_sources_share(weights):
    pattern, before = mixture_pattern(weights)
    share = np.array(weights) / sum(weights)
    assert len(pattern) == PATTERN
    np.testing.assert_array_equal(before[-1], np.bincount(pattern))
    np.testing.assert_array_equal(np.diff(before, axis=0).argmax(axis=1), pattern)
    assert np.abs(before[-1] - share * PATTERN).max() < 1
    assert np.abs(before - np.arange(PATTERN + 1)[:, None] * share).max() < len(weights)


def test_a_weight_too_small_for_the_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"data\.mixture: weight 0\.0001 is below 1/4096 of the total"):
        mixture_pattern([1.0, 0.0001])
