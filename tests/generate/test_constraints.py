"""Tokens that may not follow a text: against loops over lists, and in texts that are drawn and searched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import GenerateConfig
from lslm_jax.generate import constraints
from lslm_jax.generate.constraints import Text

V, B, L = 6, 40, 12
WORDS = ((1, 2), (3, 3, 0), (4,), (0, 1, 2, 3))


@pytest.fixture(scope="module", params=[1, 5, L])
def texts(request):
    """Rows of few different tokens, each from a slot of its own to a common end."""
    rng = np.random.default_rng(request.param)
    end = request.param
    return Text(jnp.asarray(rng.integers(0, V, (B, L))), jnp.asarray(rng.integers(0, end, B)), jnp.int32(end))


def rows(texts):
    return [
        row[start : int(texts.end)].tolist()
        for row, start in zip(np.asarray(texts.tokens_BL), texts.start_B, strict=True)
    ]


def found(mask_BV):
    return [set(np.flatnonzero(mask_V)) for mask_V in np.asarray(mask_BV)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_n_gram_is_not_completed_twice(n, texts):
    def banned(text):
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        tail = text[len(text) - n + 1 :] if len(text) >= n else None
        return {gram[-1] for gram in grams if gram[:-1] == tail}

    mask_BV = jax.jit(constraints.repeats, static_argnums=(1, 2))(texts, n, V)
    assert found(mask_BV) == [banned(text) for text in rows(texts)]


def test_words_are_not_completed_and_tokens_of_the_text_are_known(texts):
    # A word longer than the text cannot be completed: a slice from before its beginning would be the whole text.
    fits = [tuple(word for word in WORDS if len(word) <= len(text) + 1) for text in rows(texts)]
    expected = [
        {word[-1] for word in words if text[len(text) - len(word) + 1 :] == list(word[:-1])}
        for words, text in zip(fits, rows(texts), strict=True)
    ]
    assert found(constraints.completes(texts, WORDS, V)) == expected
    assert found(constraints.seen(texts, V)) == [set(text) for text in rows(texts)]


def test_ends_and_first_tokens_depend_on_the_count(texts):
    settings = GenerateConfig(never_ids=(5,), begin_suppress_tokens=(3,), min_new_tokens=2)
    for count, expected in {1: {5, 3, 0, 2}, 2: {5, 0, 2}, 3: {5}}.items():
        mask_BV = constraints.forbidden(texts, jnp.int32(count), settings, (0, 2), V)
        assert found(mask_BV) == [expected] * B
