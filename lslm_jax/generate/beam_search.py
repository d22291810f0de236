"""Beam search over anything that goes on from a cache, as pure functions of arrays.

Legend, besides that of the models: W beams a row, N tokens a text at most.

At each step the best W continuations of a row's beams are kept, by log-probability. Those that end leave for the pool
of the row's W best finished texts, and the next step fills their places: so one beam is greedy search, whatever the
penalty. A row is done when no beam of it, however it went on, could enter the pool.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Reads the tokens drawn last, [B, W], given how many were drawn before and with them: (cache, tokens, count) to the
# logits of the next, [B, W, V], and the longer cache. The leaves of the cache begin with the axes B and W.
Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Finished(NamedTuple):
    """The finished texts of each row, the best first.

    Attributes:
      ids_BWN: their tokens, the one that ends a text included.
      length_BW: how many these are; 0 where a row has found fewer than W texts.
      score_BW: float32, their penalised log-probability, -inf where there is none.
    """

    ids_BWN: jax.Array
    length_BW: jax.Array
    score_BW: jax.Array


class _Search(NamedTuple):
    """What the loop carries.

    Attributes:
      count: tokens drawn so far; the last of them is not in the cache yet.
      cache: of the beams.
      ids_BWN: their tokens.
      log_prob_BW: their log-probability, -inf where there is no beam.
      finished: the pool.
    """

    count: jax.Array
    cache: Any
    ids_BWN: jax.Array
    log_prob_BW: jax.Array
    finished: Finished


def search(
    step: Step,
    logits_BV: jax.Array,
    cache: Any,
    limit_B: jax.Array,
    *,
    beams: int,
    room: int,
    eos_ids: tuple[int, ...],
    length_penalty: float,
    early_stopping: str = "exact",
) -> Finished:
    """Finds the best `beams` texts of each row.

    Args:
      step: goes on from the cache.
      logits_BV: of the first token; -inf for what is no token.
      cache: of what was read before, for beams to begin with: its leaves begin with the axis B.
      limit_B: tokens after which a text ends where it is, from 1 to `room`.
      beams: W.
      room: N.
      eos_ids: end a text.
      length_penalty: texts are ranked by `penalize`.
      early_stopping: `exact`, or the search of transformers: `never`, `heuristic` or `first`. Then logits are
        log-probabilities, and texts are ranked by log-probability / length ** length_penalty.
    """
    widen = lambda a: jnp.repeat(a[:, None], beams, axis=1)
    ids_BWN = jnp.zeros((len(limit_B), beams, room), jnp.int32)
    nowhere_BW = jnp.full(ids_BWN.shape[:2], -jnp.inf)
    finished = Finished(ids_BWN, jnp.zeros(ids_BWN.shape[:2], jnp.int32), nowhere_BW)
    start = _Search(jnp.int32(0), jax.tree.map(widen, cache), ids_BWN, nowhere_BW.at[:, 0].set(0.0), finished)
    advance = functools.partial(_advance, limit_B=limit_B, eos_ids=eos_ids, length_penalty=length_penalty)
    if early_stopping != "exact":
        advance = functools.partial(
            _advance_as_transformers,
            limit_B=limit_B,
            eos_ids=eos_ids,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )

    def go_on(state: _Search) -> _Search:
        last_BW1 = jax.lax.dynamic_slice_in_dim(state.ids_BWN, state.count - 1, 1, axis=2)
        logits_BWV, cache = step(state.cache, last_BW1[:, :, 0], state.count)
        return advance(state._replace(cache=cache), logits_BWV)

    state = advance(start, widen(logits_BV))
    return jax.lax.while_loop(lambda state: jnp.any(state.log_prob_BW > -jnp.inf), go_on, state).finished


def penalize(log_prob: jax.Array, length: jax.Array, length_penalty: float) -> jax.Array:
    """Log-probability / ((5 + length) / 6)^penalty (Wu et al. 2016); the token that ends a text counts."""
    return log_prob / ((5.0 + length) / 6.0) ** length_penalty


def _advance(
    state: _Search, logits_BWV: jax.Array, *, limit_B: jax.Array, eos_ids: tuple[int, ...], length_penalty: float
) -> _Search:
    """Draws a token: keeps the best continuations, moves those that end to the pool, gives up rows that are done."""
    log_prob_BW, parent_BW, token_BW = _best_continuations(state.log_prob_BW, logits_BWV)
    count = state.count + 1
    cache, ids_BWN = _gather((state.cache, state.ids_BWN), parent_BW)
    ids_BWN = jax.lax.dynamic_update_slice_in_dim(ids_BWN, token_BW[:, :, None], state.count, axis=2)
    ends_BW = jnp.isin(token_BW, jnp.array(eos_ids, jnp.int32)) | (count >= limit_B)[:, None]

    score_BW = jnp.where(ends_BW, penalize(log_prob_BW, count, length_penalty), -jnp.inf)
    length_BW = jnp.where(score_BW > -jnp.inf, count, 0)
    finished = _merge(state.finished, Finished(ids_BWN, length_BW, score_BW))

    # More tokens only lower the log-probability, so a beam scores best with what it has now, at the shortest or the
    # longest length left to it, whichever the penalty favours.
    alive_BW = jnp.where(ends_BW, -jnp.inf, log_prob_BW)
    longest_B = jnp.maximum(limit_B, count + 1)
    best_B = jnp.max(alive_BW, axis=1)
    best_B = jnp.maximum(penalize(best_B, count + 1, length_penalty), penalize(best_B, longest_B, length_penalty))
    open_B1 = (best_B > finished.score_BW[:, -1])[:, None]
    return _Search(count, cache, ids_BWN, jnp.where(open_B1, alive_BW, -jnp.inf), finished)


def _advance_as_transformers(
    state: _Search,
    log_probs_BWV: jax.Array,
    *,
    limit_B: jax.Array,
    eos_ids: tuple[int, ...],
    length_penalty: float,
    early_stopping: str,
) -> _Search:
    """Draws a token as `GenerationMixin._beam_search` of transformers 5 does.

    Of the best (1 + ends) * W continuations, those among the first W that end go to the pool, and the best W of the
    others go on. A row is done when its best beam would score less than the worst of a full pool, by an estimate that
    depends on `early_stopping`.
    """
    (B, W), count = state.log_prob_BW.shape, state.count + 1
    keep = min(max(2, 1 + len(eos_ids)) * W, W * log_probs_BWV.shape[-1])
    scores_BWV = log_probs_BWV.astype(jnp.float32) + state.log_prob_BW[:, :, None]
    log_prob_BK, choice_BK = jax.lax.top_k(scores_BWV.reshape(B, -1), keep)
    parent_BK, token_BK = choice_BK // log_probs_BWV.shape[-1], choice_BK % log_probs_BWV.shape[-1]
    ids_BKN = jax.lax.dynamic_update_slice_in_dim(
        _gather(state.ids_BWN, parent_BK), token_BK[:, :, None], state.count, axis=2
    )
    ends_BK = jnp.isin(token_BK, jnp.array(eos_ids, jnp.int32)) | (count >= limit_B)[:, None]

    is_open_B1 = (state.log_prob_BW > -jnp.inf).any(axis=1, keepdims=True)
    enters_BK = ends_BK & (jnp.arange(keep) < W)[None] & (log_prob_BK > -jnp.inf) & is_open_B1
    score_BK = jnp.where(enters_BK, log_prob_BK / count.astype(jnp.float32) ** length_penalty, -jnp.inf)
    length_BK = jnp.where(enters_BK, count, 0)
    finished = _merge(state.finished, Finished(ids_BKN, length_BK, score_BK))

    running_BK = jnp.where(ends_BK | ~is_open_B1, -jnp.inf, log_prob_BK)
    alive_BW, kept_BW = jax.lax.top_k(running_BK, W)
    cache = _gather(state.cache, jnp.take_along_axis(parent_BK, kept_BW, axis=1))
    ids_BWN = _gather(ids_BKN, kept_BW)

    is_full_B = finished.score_BW[:, -1] > -jnp.inf
    longest_B = limit_B if early_stopping == "never" and length_penalty > 0 else jnp.full_like(limit_B, count)
    best_B = alive_BW[:, 0] / longest_B.astype(jnp.float32) ** length_penalty
    is_open_B = ~is_full_B | ((best_B > finished.score_BW[:, -1]) & (early_stopping != "first"))
    return _Search(count, cache, ids_BWN, jnp.where(is_open_B[:, None], alive_BW, -jnp.inf), finished)


def _best_continuations(log_prob_BW: jax.Array, logits_BWV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest W continuations of each row's beams: their log-probability, their beam and their token, [B, W]."""
    (B, W), V = log_prob_BW.shape, logits_BWV.shape[-1]
    J = min(W, V)  # the best of a row are among the best J of each of its beams
    logits_BWV = logits_BWV.astype(jnp.float32)
    best_BWJ, token_BWJ = jax.lax.top_k(logits_BWV, J)
    best_BWJ = best_BWJ - jax.nn.logsumexp(logits_BWV, axis=-1, keepdims=True) + log_prob_BW[:, :, None]
    log_prob_BW, choice_BW = jax.lax.top_k(best_BWJ.reshape(B, -1), W)
    return log_prob_BW, choice_BW // J, jnp.take_along_axis(token_BWJ.reshape(B, -1), choice_BW, axis=1)


def _merge(pool: Finished, new: Finished) -> Finished:
    """The best of both; of equals, those found first."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), pool, new)
    _, choice_BW = jax.lax.top_k(both.score_BW, pool.score_BW.shape[1])
    return _gather(both, choice_BW)


def _gather(tree: Any, index_BW: jax.Array) -> Any:
    """Of each row of leaves [B, W, ...], the entries with these numbers."""
    entries = jax.vmap(lambda a, index_W: a.at[index_W].get(mode="promise_in_bounds"))
    return jax.tree.map(lambda a: entries(a, index_BW), tree)
