"""From logits to the next token, as pure functions of arrays. A token that may not be drawn has the logit -inf."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.config import GenerateConfig


def row_keys(seed: int, rows: Sequence[int]) -> jax.Array:
    """One key a row, [B], from the row's number alone: what a row draws does not depend on its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(rows, np.uint32))


def step_keys(keys_B: jax.Array, step: jax.Array) -> jax.Array:
    """The rows' keys for one step."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, settings: GenerateConfig, seen_BV: jax.Array | None = None
) -> jax.Array:
    """Draws one token a row.

    The filters are applied in the order users know from Hugging Face: repetition penalty, temperature, top-k, top-p,
    min-p. Each leaves at least the likeliest token.

    Args:
      logits_BV: scores; -inf for what is no token.
      keys_B: one key a row.
      settings: how to draw; a temperature of 0 takes the likeliest token.
      seen_BV: which tokens are in the text already; read by the repetition penalty only.

    Returns:
      Token ids [B], int32.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None and settings.repetition_penalty != 1.0:
        logits_BV = penalize(logits_BV, seen_BV, settings.repetition_penalty)
    if settings.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # With the largest at 0, no temperature is too small to divide by.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / settings.temperature
    if settings.top_k:
        logits_BV = top_k(logits_BV, settings.top_k)
    if settings.top_p < 1.0:
        logits_BV = top_p(logits_BV, settings.top_p)
    if settings.min_p:
        logits_BV = min_p(logits_BV, settings.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Divides positive logits of tokens seen before, multiplies negative ones (CTRL, Keskar et al. 2019)."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k likeliest tokens, and what ties with the last of them."""
    kth_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)


def top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens that together hold probability p (nucleus, Holtzman et al. 2020), at least one."""
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    first_V = jnp.arange(logits_BV.shape[-1]) == 0
    keep_BV = (before_BV < p) | first_V[None]
    keep_BV = jnp.put_along_axis(jnp.zeros_like(keep_BV), order_BV, keep_BV, axis=-1, inplace=False)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return jnp.where(logits_BV >= jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p), logits_BV, -jnp.inf)
