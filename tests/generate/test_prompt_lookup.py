"""Guessing at tokens makes texts come sooner, and changes none."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lslm_jax.config import GenerateConfig
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.generate import decode
from lslm_jax.generate.decode import generate, stream
from lslm_jax.generate.prompt_lookup import guess

PROMPTS = [Bytes().encode(text).tolist() for text in ("la la la la la", "", "to be or not to be, to be or n")]
SETTINGS = {
    "greedy": GenerateConfig(max_tokens=40, temperature=0.0),
    "drawn": GenerateConfig(max_tokens=40, temperature=0.7, top_k=20),
    "what was said counts": GenerateConfig(max_tokens=40, temperature=0.7, repetition_penalty=1.3),
}


compiled_guess = jax.jit(guess, static_argnames="count")


def guessed(text, count, length=24):
    """Draft tokens after a text that lies in a longer array, whose rest nobody has written yet."""
    text_BL = np.array([[*text.encode(), *[ord("?")] * (length - len(text))]], np.int32)
    return bytes(np.asarray(compiled_guess(text_BL, np.int32(len(text)), count))[0].tolist()).decode()


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("the cat sat. the c", "at s"),  # what followed then
        ("xab1 ab2 xab", "1 ab"),  # three tokens agree there, two at the later place
        ("ab1 ab2 ab", "2 ab"),  # three tokens agree at the later place, two at the earlier
        ("ab1 ab2 xab", "2 xa"),  # two agree at both: the later
        ("abcabc", "abca"),  # less followed than is wanted: it goes round
        ("aaaa", "aaaa"),
    ],
)
def test_what_followed_the_last_time_is_guessed(text, following):
    assert guessed(text, 4) == following


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_a_text_that_repeats_nothing_is_no_failure(text):
    assert "?" not in guessed(text, 3)


def further(model, settings):
    return pytest.param(model, settings, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", "what was said counts"),
        ("t5", "drawn"),
        # The stop string below goes with gpt, greedy.
        *(further("gpt", name) for name in SETTINGS),
        *(further("llama", name) for name in ("greedy", "drawn")),
        *(further("transformer", name) for name in SETTINGS),
        *(further("t5", name) for name in ("greedy", "what was said counts")),
    ],
    indirect=["model"],
)
def test_texts_stay_the_same(model, tokenizer, settings):
    settings = SETTINGS[settings]
    plain = generate(model, tokenizer, PROMPTS, settings, 3)
    assert generate(model, tokenizer, PROMPTS, replace(settings, lookup=4), 3) == plain


def test_a_row_alone_goes_on_by_its_own_guesses_and_says_the_same(llama, tokenizer):
    settings = SETTINGS["what was said counts"]
    together = generate(llama, tokenizer, PROMPTS, settings, 3)
    assert generate(llama, tokenizer, PROMPTS[2:], replace(settings, lookup=1), 3, first=2) == together[2:]


LONGEST = GenerateConfig(max_tokens=200, temperature=0.0)


def test_a_stop_string_and_the_longest_text_end_it_all_the_same(gpt, tokenizer):
    plain = generate(gpt, tokenizer, PROMPTS, LONGEST, 0)
    assert {result.ended for result in plain} == {"length"}  # where the model's positions end
    guesses = replace(LONGEST, lookup=7)
    assert generate(gpt, tokenizer, PROMPTS, guesses, 0) == plain
    stop = plain[0].text[10:12]
    stopped = [generate(gpt, tokenizer, PROMPTS, replace(each, stop=(stop,)), 0) for each in (guesses, LONGEST)]
    assert stopped[0] == stopped[1] and stopped[0][0].ended == "stop"


def test_a_stream_tells_the_same_text(gpt, tokenizer):
    parts = stream(gpt, tokenizer, PROMPTS[0], replace(LONGEST, lookup=7), 0)
    assert "".join(parts) == generate(gpt, tokenizer, PROMPTS[:1], LONGEST, 0)[0].text


def test_a_text_that_repeats_itself_takes_fewer_passes(gpt, tokenizer, monkeypatch):
    passes = []
    decode_until = decode._decode

    def counted(model, prompts, state, ended_B, until, rules):
        before = int(state.step)
        after = decode_until(model, prompts, state, ended_B, np.int32(before + 1), rules)  # one pass
        passes.append(int(after.step) - before)
        return after

    monkeypatch.setattr(decode, "_decode", counted)
    (plain,) = generate(gpt, tokenizer, PROMPTS[:1], LONGEST, 0)
    assert passes == [1] * (plain.num_tokens - 1) and len(passes) > 64
    passes.clear()
    (result,) = generate(gpt, tokenizer, PROMPTS[:1], replace(LONGEST, lookup=7), 0)
    assert result == plain and len(passes) < plain.num_tokens - 1 and max(passes) == 8
