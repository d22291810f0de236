"""Prompts are read from plain lines, JSON lines, compressed files and the standard input; other fields pass through."""

import bz2
import gzip
import io
import json
import lzma
import sys
from types import SimpleNamespace

import pytest

from lslm_jax.cli import generate, prompt_files
from lslm_jax.errors import DataError, InputMissing

PLAIN = "Hello, wörld\n\n  two spaces\r\n"
LINES = '{"prompt": "a", "id": 7, "label": "x"}\n{"prompt": "b", "target": "c"}\n'


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["prompts", "prompts.txt", "prompts.gz"])
def test_plain_lines_are_prompts_as_they_stand(pack, name, tmp_path):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + PLAIN.encode()))
    found = list(prompt_files.read(f"{tmp_path}/{name}"))
    assert found == [{"prompt": "Hello, wörld"}, {"prompt": "  two spaces"}]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSONL.gz", "prompts.txt", "prompts"])
def test_json_lines_keep_their_other_fields(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()) if name.endswith(".gz") else LINES.encode())
    assert list(prompt_files.read(f"{tmp_path}/{name}")) == [json.loads(line) for line in LINES.splitlines()]


def test_a_dash_is_the_standard_input_and_a_tilde_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    assert list(prompt_files.read("-")) == [{"prompt": "one"}, {"prompt": "two"}]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(InputMissing, match="no prompts on the standard input"):
        list(prompt_files.read("-"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("x")
    assert list(prompt_files.read("~/p.txt")) == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"good\nbad \xff\n", DataError, "p:2 is not UTF-8"),
        (b'{"prompt": "a"}\nplain\n', DataError, 'p:2 is not a JSON object with a "prompt"'),
        (b'{"prompt": 3}\n', DataError, 'p:1: "prompt" is not text: 3'),
        (gzip.compress(b"one\n" * 99, mtime=0)[:-9], DataError, "prompts file * is truncated or damaged: *"),
        (gzip.compress(b"\n", mtime=0), InputMissing, "prompts file * is empty"),
    ],
)
def test_a_bad_file_is_one_line(content, error, message, tmp_path):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(error) as found:
        list(prompt_files.read(f"{tmp_path}/p"))
    for part in message.split("*"):
        assert part in str(found.value)


def test_a_field_that_the_answer_has_itself_is_kept_under_another_name():
    prompt = {"prompt": "a", "id": 7, "label": "gold", "step": 3, "context": "long"}
    found = generate._with_extra({"prompt": "a", "label": "said", "probabilities": {}}, prompt)
    assert found == {
        "id": 7,
        "input_label": "gold",
        "input_step": 3,
        "prompt": "a",
        "label": "said",
        "probabilities": {},
    }
