import pytest

from lslm_jax.config import GenerateConfig
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.generate.detokenize import Row

HARD = "na\u00efve \u20ac5 \U0001f600\U0001f469\u200d\U0001f680 \u65e5\u672c\u8a9e  two  spaces\nend \ufffd!"


def told(tokenizer, ids, *, prompt=(), stop=(), chunk=1, eos=True):
    """What a reader gets, chunk by chunk, and the result."""
    ids = [*map(int, ids), *[tokenizer.eos_id] * eos]
    row = Row(tokenizer, 0, [tokenizer.bos_id, *map(int, prompt)], len(ids), GenerateConfig(stop=stop))
    parts = []
    for start in range(0, len(ids), chunk):
        for id in ids[start : start + chunk]:
            row.push(id)
        parts.append(row.spell())
    return parts, row.result()


@pytest.fixture(params=["bytes", "byte fallback", "sentencepiece"])
def any_tokenizer(request, shared):
    paths = {
        "byte fallback": shared / "models/stories260K/tokenizer.json",
        "sentencepiece": shared / "tokenizers/sentencepiece_tests/sentencepiece_test.model",
    }
    return Bytes() if request.param == "bytes" else load_tokenizer(paths[request.param])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_parts_are_the_text_and_never_half_a_character(any_tokenizer, chunk):
    ids = any_tokenizer.encode(HARD)
    parts, result = told(any_tokenizer, ids, chunk=chunk)
    assert "".join(parts) == result.text == any_tokenizer.decode(ids)
    assert all(part.count("\ufffd") in (0, result.text.count("\ufffd")) for part in parts)


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_text_goes_on_where_the_prompt_stopped(any_tokenizer, cut):
    ids = [int(id) for id in any_tokenizer.encode("Once upon a time there was")]
    prompt = any_tokenizer.decode(ids[:cut])
    assert prompt + told(any_tokenizer, ids[cut:], prompt=ids[:cut])[1].text == any_tokenizer.decode(ids)


def test_a_text_of_its_own_does_not_go_on_from_the_prompt(any_tokenizer):
    prompt, ids = (any_tokenizer.encode(text).tolist() for text in ("Once upon", "a time"))
    row = Row(
        any_tokenizer, 0, [any_tokenizer.bos_id, *prompt], len(ids), GenerateConfig(), context=[any_tokenizer.bos_id]
    )
    for id in ids:
        row.push(id)
    assert row.result().text == any_tokenizer.decode(ids)


@pytest.mark.parametrize("chunk", [2, 5, 1000])
def test_bytes_that_are_no_characters_read_the_same_in_any_chunks(any_tokenizer, chunk):
    ids = [(7919 * n) % any_tokenizer.vocab_size for n in range(1, 400)]
    ids = [id for id in ids if id != any_tokenizer.eos_id]
    assert "".join(told(any_tokenizer, ids, chunk=chunk)[0]) == "".join(told(any_tokenizer, ids)[0])


def test_an_unfinished_character_at_the_end_is_told_in_the_end():
    tokenizer = Bytes()
    parts, result = told(tokenizer, tokenizer.encode("a\u20ac")[:-1], eos=False)
    assert parts == ["a", "", "\ufffd"] and result.text == "a\ufffd" and result.ended == "length"


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_text_ends_before_a_stop_string_of_which_no_part_is_told(chunk):
    tokenizer = Bytes()
    parts, result = told(
        tokenizer, tokenizer.encode("one two \n\nUser\nUser: hi"), stop=("zzz", "\nUser:"), chunk=chunk
    )
    assert "".join(parts) == result.text == "one two \n\nUser"
    assert result.ended == "stop" and tokenizer.decode(result.ids) == "one two \n\nUser\nUser:"
    assert result.num_tokens == len(result.ids)


def test_what_only_looked_like_a_stop_string_is_told():
    tokenizer = Bytes()
    parts, result = told(tokenizer, tokenizer.encode("abcabd abc"), stop=("abcd",))
    assert "".join(parts) == result.text == "abcabd abc" and result.ended == "eos"
    assert parts[:4] == ["", "", "", "abc"]


def test_nothing_after_the_end_of_the_text_counts():
    tokenizer = Bytes()
    ids = [*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("cd")]
    _, result = told(tokenizer, ids)
    assert result == (ids[:2], "ab", "eos", 3, None)
