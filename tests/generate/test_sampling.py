import functools

import jax
import numpy as np
import pytest

from lslm_jax.config import GenerateConfig
from lslm_jax.generate import sampling

V = 50
top_k = jax.jit(sampling.top_k, static_argnames="k")
top_p, min_p = jax.jit(sampling.top_p), jax.jit(sampling.min_p)


@pytest.fixture
def logits_BV():
    logits_BV = 3 * np.random.default_rng(0).standard_normal((6, V)).astype(np.float32)
    logits_BV[:, -5:] = -np.inf  # the padding of a vocabulary
    return logits_BV


def kept(filtered_BV):
    return [set(np.flatnonzero(row > -np.inf)) for row in np.asarray(filtered_BV)]


def softmax(row):
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


@functools.partial(jax.jit, static_argnames="settings")
def draws(logits_BV, settings):
    """Ten thousand draws from each row."""
    keys = sampling.row_keys(0, range(10_000))
    one_row = jax.vmap(lambda key, row_V: sampling.sample(row_V[None], key[None], settings)[0], (0, None))
    return jax.vmap(one_row, (None, 0))(keys, logits_BV)


def draw(logits_BV, **settings):
    return np.asarray(draws(logits_BV, GenerateConfig(**settings)))


@functools.partial(jax.jit, static_argnames=("rows", "settings"))
def sample(logits_BV, rows, step, settings):
    return sampling.sample(logits_BV, sampling.step_keys(sampling.row_keys(5, rows), step), settings)


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_top_k_keeps_the_k_likeliest(logits_BV, k):
    filtered = kept(top_k(logits_BV, k))
    assert filtered == [set(np.argsort(-row)[: min(k, V - 5)]) for row in logits_BV]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_hold_p(logits_BV, p):
    for row, tokens in zip(logits_BV, kept(top_p(logits_BV, p)), strict=True):
        order, probability = np.argsort(-row), np.sort(softmax(row))[::-1]
        enough = 1 + np.searchsorted(np.cumsum(probability), p)
        assert tokens == set(order[:enough])


def test_top_p_keeps_no_more_than_it_needs_among_equals():
    assert kept(top_p(np.zeros((1, 10), np.float32), 0.35)) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.999])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits_BV, p):
    for row, tokens in zip(logits_BV, kept(min_p(logits_BV, p)), strict=True):
        assert tokens == set(np.flatnonzero(softmax(row) >= p * softmax(row).max()))


def test_a_repetition_penalty_lowers_what_was_seen_and_nothing_else(logits_BV):
    seen_BV = np.random.default_rng(1).random((6, V)) < 0.5
    expected = np.where(seen_BV, np.where(logits_BV > 0, logits_BV / 1.3, logits_BV * 1.3), logits_BV)
    np.testing.assert_allclose(jax.jit(sampling.penalize)(logits_BV, seen_BV, 1.3), expected, rtol=1e-6)
    assert (expected <= logits_BV).all() and (
        expected[seen_BV & (logits_BV > -np.inf)] < logits_BV[seen_BV & (logits_BV > -np.inf)]
    ).all()


def test_temperature_zero_takes_the_likeliest(logits_BV):
    ids_B = sample(logits_BV, range(6), 0, GenerateConfig(temperature=0.0))
    np.testing.assert_array_equal(ids_B, logits_BV.argmax(axis=-1))


def test_the_smallest_temperatures_are_as_good_as_zero(logits_BV):
    ids_B = sample(logits_BV, range(6), 0, GenerateConfig(temperature=1e-38))
    np.testing.assert_array_equal(ids_B, logits_BV.argmax(axis=-1))


def test_tokens_come_as_often_as_their_probability_says(logits_BV):
    drawn_BN = draw(logits_BV, temperature=0.7)
    for row, ids_N in zip(logits_BV, drawn_BN, strict=True):
        frequency = np.bincount(ids_N, minlength=V) / len(ids_N)
        np.testing.assert_allclose(frequency, softmax(row / 0.7), atol=0.02)


def test_filters_follow_one_another_in_the_order_users_know(logits_BV):
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.15}
    expected = min_p(top_p(top_k(logits_BV / 1.5, 20), 0.8), 0.15)
    assert [set(ids_N) for ids_N in draw(logits_BV, **settings)] == kept(expected)


def test_the_strictest_filters_leave_the_likeliest_token(logits_BV):
    drawn_BN = draw(logits_BV, top_k=1, top_p=0.0, min_p=0.99)
    np.testing.assert_array_equal(drawn_BN, np.broadcast_to(logits_BV.argmax(-1)[:, None], drawn_BN.shape))


def test_what_a_row_draws_depends_on_its_number_and_the_step_alone(logits_BV):
    def at(rows, step):
        return sample(logits_BV[:1].repeat(len(rows), 0), rows, step, GenerateConfig()).tolist()

    together = at(range(40), 3)
    assert at((17,), 3) == together[17:18]
    assert len(set(together)) > 5
    assert at(range(40), 4) != together
