"""Guessing at tokens makes texts come sooner, and changes none."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import GenerateConfig
from lslm_jax.data.tokenizer import Bytes
from lslm_jax.generate import decode
from lslm_jax.generate.decode import generate, stream
from lslm_jax.generate.lookup import guess

PROMPTS = [Bytes().encode(text).tolist() for text in ("la la la la la", "", "to be or not to be, to be or n")]
SETTINGS = {
    "greedy": GenerateConfig(max_tokens=40, temperature=0.0),
    "drawn": GenerateConfig(max_tokens=40, temperature=0.7, top_k=20),
    "what was said counts": GenerateConfig(max_tokens=40, temperature=0.7, repetition_penalty=1.3),
}


def guessed(text, count, room=4):
    """What is guessed after a text that lies in a longer array, whose rest nobody has written yet."""
    text_BL = jnp.array([[*text.encode(), *[ord("?")] * room]], jnp.int32)
    return bytes(np.asarray(guess(text_BL, jnp.int32(len(text)), count))[0].tolist()).decode()


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("the cat sat. the c", "at s"),  # what followed then
        ("xab1 ab2 xab", "1 ab"),  # three tokens agree there, two at the later place
        ("ab1 ab2 ab", "2 ab"),  # both agree in two: the later
        ("abcabc", "abca"),  # less followed than is wanted: it goes round
        ("aaaa", "aaaa"),
    ],
)
def test_what_followed_the_last_time_is_guessed(text, following):
    assert guessed(text, 4) == following


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_a_text_that_repeats_nothing_is_no_failure(text):
    assert "?" not in guessed(text, 3)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_texts_stay_the_same(model, tokenizer, settings):
    plain = generate(model, tokenizer, PROMPTS, settings, 3)
    assert generate(model, tokenizer, PROMPTS, replace(settings, lookup=4), 3) == plain


def test_a_row_alone_goes_on_by_its_own_guesses_and_says_the_same(llama, tokenizer):
    guesses = replace(SETTINGS["drawn"], lookup=1)
    together = generate(llama, tokenizer, PROMPTS, guesses, 3)
    assert generate(llama, tokenizer, PROMPTS[2:], guesses, 3, first=2) == together[2:]


def test_a_stop_string_and_the_longest_text_end_it_all_the_same(gpt, tokenizer):
    plain = generate(gpt, tokenizer, PROMPTS, GenerateConfig(max_tokens=200, temperature=0.0), 0)
    assert {result.ended for result in plain} == {"length"}  # where the model's positions end
    guesses = GenerateConfig(max_tokens=200, temperature=0.0, lookup=7)
    assert generate(gpt, tokenizer, PROMPTS, guesses, 0) == plain
    stop = plain[0].text[10:12]
    stopped = [
        generate(gpt, tokenizer, PROMPTS, replace(each, stop=(stop,)), 0)
        for each in (guesses, replace(guesses, lookup=0))
    ]
    assert stopped[0] == stopped[1] and stopped[0][0].ended == "stop"


def test_a_stream_tells_the_same_text(llama, tokenizer):
    settings = GenerateConfig(max_tokens=40, temperature=0.0)
    parts = stream(llama, tokenizer, PROMPTS[0], replace(settings, lookup=6), 0)
    assert "".join(parts) == generate(llama, tokenizer, PROMPTS[:1], settings, 0)[0].text


def test_a_text_that_repeats_itself_takes_fewer_passes(gpt, tokenizer, monkeypatch):
    settings = GenerateConfig(max_tokens=64, temperature=0.0)
    passes = []

    def counted(model, prompts, state, ended_B, until, rules):
        before = int(state.step)
        after = decode._step(model, prompts, rules, state)  # one pass
        passes.append(int(after.step) - before)
        return after

    monkeypatch.setattr(decode, "_decode", counted)
    (plain,) = generate(gpt, tokenizer, PROMPTS[:1], settings, 0)
    assert passes == [1] * 63
    passes.clear()
    (result,) = generate(gpt, tokenizer, PROMPTS[:1], replace(settings, lookup=4), 0)
    assert result == plain and len(passes) < 63 and max(passes) == 5
