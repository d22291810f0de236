import gzip
import math

import pytest

from lslm_jax.evaluate import metrics


def test_a_uniform_guess_over_v_tokens_has_perplexity_v():
    assert metrics.perplexity(10 * math.log(50), 10) == pytest.approx(50)


def test_perplexity_that_overflows_is_infinite():
    assert metrics.perplexity(1e6, 1) == math.inf


def test_a_uniform_guess_over_bytes_needs_eight_bits_a_byte():
    assert metrics.bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_gzip_bits_are_those_of_the_joined_text():
    documents = ["a text" * 40, "another one" * 30]
    text = "\n".join(documents).encode()
    assert metrics.gzip_bits_per_byte(documents) == 8 * len(gzip.compress(text, 9)) / len(text)
