"""Guesses at the tokens to come, from what stands in the text already (prompt lookup, Saxena 2023)."""

import jax
import jax.numpy as jnp

_LONGEST = 3  # tokens compared


def guess(text_BL: jax.Array, end: jax.Array, count: int) -> jax.Array:
    """What followed the last time that the text said what it says at its end.

    The place where most tokens agree, up to three, is taken, and the latest of such places. Where what followed is
    shorter than what is asked for, it is repeated, for so goes a text that repeats itself. Nowhere is a guess certain.

    Args:
      text_BL: tokens.
      end: how many of them there are yet, at least 1; a scalar.
      count: tokens to guess, K.

    Returns:
      Guesses [B, K].
    """
    slots_1L = jnp.arange(text_BL.shape[1])[None]
    agree_BL, score_BL = jnp.ones(text_BL.shape, bool), jnp.zeros(text_BL.shape, jnp.int32)
    for back in range(_LONGEST):
        last_B1 = jax.lax.dynamic_slice_in_dim(text_BL, end - 1 - back, 1, axis=1)
        said_BL = jnp.pad(text_BL, ((0, 0), (back, 0)), constant_values=-1)[:, : text_BL.shape[1]]
        agree_BL &= said_BL == last_B1
        score_BL += agree_BL
    rank_BL = jnp.where(slots_1L < end - 1, score_BL * slots_1L.size + slots_1L, -1)
    next_B1 = jnp.minimum(jnp.argmax(rank_BL, axis=1, keepdims=True) + 1, end - 1)
    said_BK = next_B1 + jnp.arange(count)[None] % (end - next_B1)
    return jnp.take_along_axis(text_BL, said_BK, axis=1)
