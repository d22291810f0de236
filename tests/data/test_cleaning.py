"""Cleaning is pure, idempotent, and counts what it drops; deduplication remembers."""

import pytest

from lslm_jax.config import CleanConfig
from lslm_jax.data.prepare import cleaning
from lslm_jax.errors import DataError

AWKWARD = [
    "",
    " ",
    "  two  spaces\t tab \n\n\n\n end  \n",
    "line\r\nline\rline\x0b\x0c\x00\x1b[31m",
    "e\u0301 \u00e9 \ufb01 \u00a0 \u3000 \u2028 \u0085 \u212b",
    "a\x00\u0301",
    " \u0308\n\u0308",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \ufeff \u2581",
]


@pytest.mark.parametrize("unicode", ["none", "NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("whitespace", ["keep", "trim", "collapse"])
@pytest.mark.parametrize("control", ["keep", "strip"])
def test_cleaning_twice_changes_nothing(unicode, whitespace, control):
    config = CleanConfig(unicode=unicode, whitespace=whitespace, control=control)
    for text in AWKWARD:
        once = cleaning.clean_text(text, config)
        assert cleaning.clean_text(once, config) == once


@pytest.mark.parametrize(
    ("config", "text", "cleaned"),
    [
        (CleanConfig(), "\tdef f():\r\n    e\u0301\x00\rx \n", "\tdef f():\n    \u00e9\nx \n"),
        (CleanConfig(unicode="none", control="keep"), "e\u0301\x00\r\n", "e\u0301\x00\r\n"),
        (CleanConfig(whitespace="trim"), "\n  a  b \t\n\n\n c \n", "a  b\n\n\n c"),
        (CleanConfig(whitespace="collapse"), "  a \t b \n\n\n\n c\u00a0d \n", "a b\n\n c d"),
        (CleanConfig(unicode="NFKC"), "\ufb01\u00a0x", "fi x"),
    ],
)
def test_text_is_cleaned_as_configured(config, text, cleaned):
    assert cleaning.clean_text(text, config) == cleaned


def test_short_and_long_documents_are_named_so():
    config = CleanConfig(min_chars=2, max_chars=3)
    assert [cleaning.reason("x" * n, config) for n in range(1, 5)] == ["too_short", None, None, "too_long"]
    assert cleaning.reason("x" * 10**6, CleanConfig()) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\n\nc\xffd", "f.txt: byte 0xff at offset 5 (line 3) is not UTF-8"),
        (b"ab\xe2\x82", "f.txt: byte 0xe2 at offset 2 is not UTF-8"),
        ("ab\udcffc", "f.txt: byte 0xff at character 2 is not UTF-8"),
        ("\ud83d", "f.txt: lone surrogate U+D83D at character 0 is not UTF-8"),
    ],
)
def test_undecodable_text_stops_with_its_place_unless_told_otherwise(data, message):
    with pytest.raises(DataError) as error:
        cleaning.decode(data, "strict", "f.txt")
    assert str(error.value) == f"{message}; clean.bad_utf8 may be replace or skip"
    assert cleaning.decode(data, "skip", "f.txt") is None
    replaced = cleaning.decode(data, "replace", "f.txt")
    assert "\ufffd" in replaced
    replaced.encode()


def test_the_held_out_share_is_a_function_of_the_text():
    digests = [cleaning.digest(f"document {i}") for i in range(20_000)]
    valid = {digest for digest in digests if cleaning.is_valid(digest, 0.05)}
    assert 0.04 < len(valid) / len(digests) < 0.06
    assert valid <= {digest for digest in digests if cleaning.is_valid(digest, 0.06)}
    assert not any(cleaning.is_valid(digest, 0.0) for digest in digests)
    assert all(cleaning.is_valid(digest, 1.0) for digest in digests)


def test_equal_documents_are_seen_once():
    memory = cleaning.Deduplicator(near=False)
    seen = [memory.seen(cleaning.digest(text), None) for text in ("a", "b", "a", "a ")]
    assert seen == [None, None, "duplicate", None]


def test_near_documents_are_seen_once_and_distant_ones_stay():
    words = [f"w{i * i % 997}" for i in range(600)]
    chinese = [chr(0x4E00 + i * i % 997) for i in range(600)]
    one_changed = [*words[:300], "zebra", *words[301:]]
    many_changed = ["zebra" if i % 10 == 0 else word for i, word in enumerate(words)]
    texts = [" ".join(words), " ".join(one_changed).upper(), " ".join(many_changed), "".join(chinese)]
    texts += ["".join([*chinese[:300], "\u4e00", *chinese[301:]]), "short", "short!", "...", "???"]
    memory = cleaning.Deduplicator(near=True)
    seen = [memory.seen(cleaning.digest(text), cleaning.signature(text)) for text in texts]
    assert seen == [None, "near_duplicate", None, None, "near_duplicate", None, "near_duplicate", None, None]
