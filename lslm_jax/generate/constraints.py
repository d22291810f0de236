"""Tokens that may not follow a text, as pure functions of arrays: the masking logits processors of transformers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.config import GenerateConfig


class Text(NamedTuple):
    """The prompt and the tokens drawn so far, as the decoder reads them.

    Attributes:
      tokens_BL: token ids.
      start_B: the slot of each row's first token; those before are padding.
      end: the slot behind the last token, a scalar; those from there on are not written yet.
    """

    tokens_BL: jax.Array
    start_B: jax.Array
    end: jax.Array


def forbidden(
    text: Text, count: jax.Array, settings: GenerateConfig, eos_ids: tuple[int, ...], vocab_size: int
) -> jax.Array:
    """True for tokens that may not be the `count`th (from 1) that is drawn, [B, V]."""
    ids_V = jnp.arange(vocab_size)
    member_V = lambda ids: jnp.isin(ids_V, jnp.array(ids, jnp.int32))
    mask_V = member_V(settings.never_ids)
    if settings.min_new_tokens:
        mask_V |= member_V(eos_ids) & (count <= settings.min_new_tokens)
    if settings.begin_suppress_tokens:
        mask_V |= member_V(settings.begin_suppress_tokens) & (count == 1)
    mask_BV = jnp.broadcast_to(mask_V[None], (len(text.tokens_BL), vocab_size))
    if settings.no_repeat_ngram_size:
        mask_BV |= repeats(text, settings.no_repeat_ngram_size, vocab_size)
    if settings.bad_words_ids:
        mask_BV |= completes(text, settings.bad_words_ids, vocab_size)
    return mask_BV


def seen(text: Text, vocab_size: int) -> jax.Array:
    """True for tokens that are in the text, [B, V]."""
    slots_1L = jnp.arange(text.tokens_BL.shape[1])[None]
    return _mark(text.tokens_BL, (slots_1L >= text.start_B[:, None]) & (slots_1L < text.end), vocab_size)


def repeats(text: Text, n: int, vocab_size: int) -> jax.Array:
    """True for tokens that with the last n - 1 of the text would be n tokens that stand in it already, [B, V]."""
    slots_1L = jnp.arange(text.tokens_BL.shape[1])[None]
    is_last_BL = (slots_1L - (n - 1) >= text.start_B[:, None]) & (slots_1L < text.end)  # of n tokens

    def agrees(back: int, is_last_BL: jax.Array) -> jax.Array:
        token_B1 = jax.lax.dynamic_slice_in_dim(text.tokens_BL, text.end - back, 1, axis=1)
        return is_last_BL & (jnp.roll(text.tokens_BL, back, axis=1) == token_B1)

    return _mark(text.tokens_BL, jax.lax.fori_loop(1, n, agrees, is_last_BL), vocab_size)


def completes(text: Text, words: tuple[tuple[int, ...], ...], vocab_size: int) -> jax.Array:
    """True for the last token of each word (a sequence of ids) whose other tokens end the text, [B, V]."""
    width, absent = max(map(len, words)) - 1, -1
    prefix_WK = np.full((len(words), width), absent, np.int32)
    for prefix_K, word in zip(prefix_WK, words, strict=True):
        prefix_K[width - len(word) + 1 :] = word[:-1]
    is_text_BL = jnp.arange(text.tokens_BL.shape[1])[None] >= text.start_B[:, None]
    tokens_BL = jnp.pad(jnp.where(is_text_BL, text.tokens_BL, absent - 1), ((0, 0), (width, 0)), constant_values=-2)
    tail_BK = jax.lax.dynamic_slice_in_dim(tokens_BL, text.end, width, axis=1)
    ends_BW = jnp.all((prefix_WK[None] == absent) | (prefix_WK[None] == tail_BK[:, None]), axis=-1)
    last_W = jnp.array([word[-1] for word in words], jnp.int32)
    return _mark(jnp.broadcast_to(last_W[None], ends_BW.shape), ends_BW, vocab_size)


def _mark(ids_BN: jax.Array, where_BN: jax.Array, vocab_size: int) -> jax.Array:
    """True for the ids at these places, [B, V]."""
    rows_B1 = jnp.arange(len(ids_BN))[:, None]
    return jnp.zeros((len(ids_BN), vocab_size), bool).at[rows_B1, ids_BN].max(where_BN)
