"""Beam search on toys: tables of random numbers say how likely each token is after all that was drawn before it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.generate import beam_search

EOS = 0
STATES = 997


def toy(seed, vocab):
    """Logits [STATES, V]: a text is in a state that its tokens, in their order, lead to."""
    return 2.0 * np.random.default_rng(seed).standard_normal((STATES, vocab)).astype(np.float32)


def next_state(state, token):
    return (31 * state + 7 * token + 5) % STATES


@functools.partial(jax.jit, static_argnames=("beams", "room"))
def run(table_SV, first_B, limit_B, alpha, *, beams, room):
    """Searches rows that begin in the states `first_B`; the toy's cache is its state, and how often it was read."""

    def step(cache, tokens_BW, count):
        state_BW, reads_BW = cache
        state_BW = next_state(state_BW, tokens_BW)
        logits_BWV = jnp.where((reads_BW + 1 == count)[:, :, None], table_SV[state_BW], jnp.nan)
        return logits_BWV, (state_BW, reads_BW + 1)

    cache = first_B, jnp.zeros_like(first_B)
    settings = {"beams": beams, "room": room, "eos_ids": (EOS,), "length_penalty": alpha}
    return beam_search.search(step, table_SV[first_B], cache, limit_B, **settings)


def search(table_SV, first, limit, *, beams, alpha, room=None):
    """For each row its pool: tokens and score, the best first."""
    found = run(table_SV, np.array(first), np.array(limit), alpha, beams=beams, room=room or max(limit))
    return [
        [(tuple(ids[:n].tolist()), float(s)) for ids, n, s in zip(*row, strict=True) if s > -np.inf]
        for row in zip(*map(np.asarray, found), strict=True)
    ]


def log_softmax(table_SV):
    table_SV = table_SV.astype(np.float64)
    shifted_SV = table_SV - table_SV.max(axis=-1, keepdims=True)
    return shifted_SV - np.log(np.exp(shifted_SV).sum(axis=-1, keepdims=True))


def log_prob(log_probs_SV, state, ids):
    total = 0.0
    for token in ids:
        total += log_probs_SV[state, token]
        state = next_state(state, token)
    return total


def score(log_probs_SV, state, ids, alpha):
    return log_prob(log_probs_SV, state, ids) / ((5 + len(ids)) / 6) ** alpha


def all_texts(vocab, limit):
    """Every text that may be: those that end, and those cut at the limit."""
    words = [token for token in range(vocab) if token != EOS]
    for length in range(limit):
        yield from ((*ids, EOS) for ids in itertools.product(words, repeat=length))
    yield from itertools.product(words, repeat=limit)


def plain_search(log_probs_SV, state, limit, *, beams, alpha):
    """Beam search as one would write it down, without stopping early: the pool, best first."""
    live, pool = [()], []
    for _ in range(limit):
        longer = [(*ids, token) for ids in live for token in range(log_probs_SV.shape[1])]
        longer.sort(key=lambda ids: -log_prob(log_probs_SV, state, ids))
        ends = lambda ids: ids[-1] == EOS or len(ids) == limit
        pool += [ids for ids in longer[:beams] if ends(ids)]
        live = [ids for ids in longer[:beams] if not ends(ids)]
    return sorted(pool, key=lambda ids: -score(log_probs_SV, state, ids, alpha))[:beams]


def greedy(table_SV, state, limit):
    ids = []
    while len(ids) < limit and EOS not in ids:
        ids.append(int(table_SV[state].argmax()))
        state = next_state(state, ids[-1])
    return tuple(ids)


def chain(*rows):
    """A table for `next_token`: after token i, the probabilities of rows[i]."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


@functools.partial(jax.jit, static_argnames=("beams",))
def run_chain(table_SV, limit_B, length_penalty, *, beams):
    step = lambda cache, tokens_BW, count: (table_SV[tokens_BW], cache)
    settings = {"beams": beams, "room": 20, "eos_ids": (EOS,), "length_penalty": length_penalty}
    return beam_search.search(step, table_SV[:1], (), limit_B, **settings)


def search_chain(table_SV, limit, *, beams, length_penalty):
    """The best texts of a toy whose next token depends on its last one alone; it begins after token 0."""
    found = run_chain(table_SV, np.array([limit]), length_penalty, beams=beams)
    rows = zip(*(np.asarray(a)[0] for a in found), strict=True)
    return [(ids[:n].tolist(), round(float(s), 4)) for ids, n, s in rows if s > -np.inf]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.0, -1.0])
@pytest.mark.parametrize(("vocab", "limit", "beams"), [(3, 5, 96), (4, 4, 108), (6, 2, 40), (4, 1, 6)])
def test_with_beams_enough_the_pool_holds_the_best_of_all_texts(vocab, limit, beams, alpha):
    table_SV = toy(0, vocab)
    log_probs_SV = log_softmax(table_SV)
    for state, found in enumerate(search(table_SV, range(8), [limit] * 8, beams=beams, alpha=alpha)):
        ranked = sorted((-score(log_probs_SV, state, ids, alpha), ids) for ids in all_texts(vocab, limit))
        assert [ids for ids, _ in found] == [ids for _, ids in ranked[:beams]]
        np.testing.assert_allclose([-s for _, s in found], [s for s, _ in ranked[:beams]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, -1.0])
@pytest.mark.parametrize(
    "beams", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive), pytest.param(4, marks=pytest.mark.exhaustive), 7]
)
def test_to_stop_early_changes_nothing(beams, alpha):
    table_SV, first, limit = toy(0, 5), list(range(40)), [12, 7, 1, 2] * 10
    log_probs_SV = log_softmax(table_SV)
    for state, end, found in zip(first, limit, search(table_SV, first, limit, beams=beams, alpha=alpha), strict=True):
        assert [ids for ids, _ in found] == plain_search(log_probs_SV, state, end, beams=beams, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 5.0, -2.0])
def test_one_beam_is_greedy_search(alpha):
    table_SV, first = toy(1, 6), list(range(50))
    found = search(table_SV, first, [15] * 50, beams=1, alpha=alpha)
    assert [row[0][0] for row in found] == [greedy(table_SV, state, 15) for state in first]
    assert {EOS in row[0][0] for row in found} == {True, False}


def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_room():
    table_SV, first, limit = toy(2, 5), [3, 1, 4, 15, 9], [9, 2, 6, 5, 3]
    together = search(table_SV, first, limit, beams=3, alpha=0.6, room=16)
    alone = [search(table_SV, [s], [n], beams=3, alpha=0.6, room=9)[0] for s, n in zip(first, limit, strict=True)]
    assert together == alone


def test_the_likeliest_first_word_may_lead_nowhere():
    # After 1 nothing is likely, after 2 the end is certain: 0.5 * 0.4 < 0.4 * 1.
    table = chain([0.1, 0.5, 0.4, 0.0], [0.4, 0.3, 0.0, 0.3], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])
    assert search_chain(table, 6, beams=1, length_penalty=0.0) == [([1, 0], round(math.log(0.2), 4))]
    assert search_chain(table, 6, beams=2, length_penalty=0.0)[0] == ([2, 0], round(math.log(0.4), 4))


def test_the_penalty_makes_longer_texts_win():
    # One token with probability 0.3, four with 0.7 in all.
    table = chain([0.3, 0.7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0])
    score = lambda p, length, alpha: round(math.log(p) / ((5 + length) / 6) ** alpha, 4)
    for alpha in (0.0, 1.0):
        texts = [([1, 2, 3, 0], score(0.7, 4, alpha)), ([0], score(0.3, 1, alpha))]
        assert search_chain(table, 8, beams=2, length_penalty=alpha) == texts
    table = chain([0.7, 0.3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0])
    assert search_chain(table, 8, beams=2, length_penalty=0.0)[0] == ([0], score(0.7, 1, 0))
    assert search_chain(table, 8, beams=2, length_penalty=4.0)[0] == ([1, 2, 3, 0], score(0.3, 4, 4))


def test_the_pool_waits_for_a_beam_that_may_yet_beat_it():
    # Both beams of the pool are found by the second step; a third text, of lower probability, wins by its length.
    table = chain([0.4, 0.6, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1], [0.1, 0, 0, 0.9])
    alpha = 2.0
    texts = search_chain(table, 20, beams=2, length_penalty=alpha)
    assert texts[0][0] == [1, 2, *[3] * 18] and len(texts[0][0]) == 20
    assert search_chain(table, 20, beams=2, length_penalty=0.0)[0][0] == [0]


def test_the_end_may_come_at_once_for_every_beam():
    assert search_chain(chain([1, 0, 0], [1, 0, 0], [1, 0, 0]), 5, beams=3, length_penalty=0.6) == [([0], 0.0)]


def test_a_text_ends_at_its_limit_even_without_an_end():
    table_SV = toy(3, 4)
    table_SV[:, EOS] = -np.inf
    for found, limit in zip(search(table_SV, [5, 6, 7], [1, 4, 7], beams=3, alpha=0.6), [1, 4, 7], strict=True):
        assert [len(ids) for ids, _ in found] == [limit] * 3 and len({ids for ids, _ in found}) == 3


def test_the_loop_ends_as_soon_as_nothing_can_win():
    reads = []

    @jax.jit
    def run(table_SV):
        def step(cache, tokens_BW, count):
            jax.debug.callback(lambda n: reads.append(int(n)), count)
            return table_SV[tokens_BW], cache

        settings = {"room": 50, "eos_ids": (EOS,), "beams": 2, "length_penalty": 0.0}
        return beam_search.search(step, table_SV[:1], (), np.array([50]), **settings)

    # Two texts of one and of two tokens hold nearly all probability.
    run(chain([0.60, 0.38, 0.02], [0.98, 0.01, 0.01], [0.01, 0.01, 0.98]))
    jax.effects_barrier()
    assert reads == [1]
