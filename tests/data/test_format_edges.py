"""Files that are nearly of a format: read completely, warned of, or rejected by name; none is read in part."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pathlib

import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, TaskConfig, TokenizerConfig
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.readers import files, sources
from lslm_jax.errors import ConfigError, DataError

LINES = b'{"text": "aa"}\n{"text": "bb"}\n'


def texts(path: pathlib.Path, **settings) -> list[str]:
    found = [each.content for each in sources.documents(DataConfig(files=(str(path),), **settings), "train")]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in found]


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def log_of(directory: pathlib.Path, config: Config) -> list[str]:
    lines: list[str] = []
    prepare(config, epath.Path(directory), lines.append, workers=1)
    return lines


def plain(*names: object, **data) -> Config:
    return Config(data=DataConfig(files=tuple(map(str, names)), **data), tokenizer=TokenizerConfig(kind="bytes"))


# Line ends.


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("a.txt", b"aa\rbb\r", {"document": "line"}),
        ("a.txt", b"aa\r\rbb", {"separator": "blank_line"}),
        ("a.jsonl", LINES.replace(b"\n", b"\r"), {}),
        ("a.tsv", b"id\ttext\r0\taa\r1\tbb\r", {}),
        ("a.csv", b"id,text\r0,aa\r1,bb\r", {}),
        ("a.json", b'[{"text": "aa"},\r{"text": "bb"}]\r', {}),
    ],
)
def test_lines_may_end_with_a_carriage_return_alone(tmp_path, name, content, settings):
    path = write(tmp_path / name, content)
    assert texts(path, **settings) == ["aa", "bb"]
    assert texts(write(tmp_path / f"{name}.gz", gzip.compress(content)), **settings) == ["aa", "bb"]
    assert "lines end with CR" in files.survey(DataConfig(files=(str(path),), **settings), "train")


def test_a_carriage_return_at_the_end_of_a_read_is_one_line_end(tmp_path, monkeypatch):
    from lslm_jax.data.readers import formats

    monkeypatch.setattr(formats, "_HEAD", 4)  # so that line feeds come later
    stream = formats._WithLineFeeds(io.BytesIO(b"abc\r\nde\rf\r\r\ng"))
    parts = iter(lambda: stream.read(4), b"")
    assert b"".join(parts) == b"abc\nde\nf\n\ng"


def test_a_carriage_return_within_a_line_of_a_pair_is_no_line_end(tmp_path):
    write(tmp_path / "a.en", b"one\rmore\ntwo\n"), write(tmp_path / "a.de", b"eins\nzwei\n")
    source = DataConfig(files=(f"{tmp_path}/a.en", f"{tmp_path}/a.de"), example="pair")
    found = [each.content for each in sources.documents(source, "train")]
    assert [pair["target"] for pair in found if isinstance(pair, dict)] == [b"eins", b"zwei"]


# Compression.


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_streams_that_follow_one_another_are_all_read_and_a_damaged_one_is_an_error(tmp_path, suffix, pack):
    first, second = pack(LINES), pack(b'{"text": "cc"}\n')
    assert texts(write(tmp_path / f"a.jsonl{suffix}", first + second + bytes(512))) == ["aa", "bb", "cc"]
    assert texts(write(tmp_path / f"b.jsonl{suffix}", pack(b"") + first)) == ["aa", "bb"]
    for number, end in enumerate((b"garbage!", b"X" + second[1:], second[:-3])):
        path = write(tmp_path / f"c{number}.jsonl{suffix}", first + end)
        with pytest.raises(DataError, match=f"^{path} is not whole compressed data: "):
            texts(path)


def test_a_file_that_is_compressed_twice_is_rejected(tmp_path):
    path = write(tmp_path / "a.jsonl.gz.bz2", bz2.compress(gzip.compress(LINES)))
    with pytest.raises(DataError, match=f"^{path} is compressed twice: its content is gzip data; decompress it once"):
        texts(path)


def test_text_that_begins_like_compressed_data_is_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", "BZh is how they begin")) == ["BZh is how they begin"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_table_is_read(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["aa", "bb"]}), buffer)
    zstd = lambda data: pa.compress(data, codec="zstd", asbytes=True)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    assert texts(write(tmp_path / f"a.parquet{suffix}", pack(buffer.getvalue()))) == ["aa", "bb"]


# Records.


@pytest.mark.parametrize(
    "content",
    ['[{"text": "aa"},\n {"text": "bb"}]', '{\n "text": "aa"\n}\n{\n "text": "bb"\n}\n'],
    ids=["list", "pretty"],
)
def test_json_in_a_file_of_json_lines_is_read_as_json(tmp_path, content):
    path = write(tmp_path / "a.jsonl", content)
    assert texts(path) == ["aa", "bb"]
    assert files.survey(DataConfig(files=(str(path),)), "train") == "1 as JSON: a.jsonl"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_separated_by_what_separates_its_header(tmp_path, delimiter):
    rows = (("id", "text"), ("0", f'"a{delimiter}""b"""'), ("1", "c"))
    path = write(tmp_path / "a.csv", "".join(delimiter.join(row) + "\n" for row in rows))
    assert texts(path) == [f'a{delimiter}"b"', "c"]


def test_two_columns_of_one_name_are_rejected_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: 2 columns are named 'text' \(data.text_key\): rename all but one"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("rows", "quoted"),
    [
        ([b'"he said ""hi"""\tx', b"plain\ty"], True),
        ([b'he said "hi"\tx', b'"he said ""hi"""\ty'], False),
        ([b'"a whole sentence"\tx'], False),
        ([b"plain\tx"], False),
    ],
)
def test_quotation_marks_around_the_fields_of_a_tsv_are_warned_of(tmp_path, rows, quoted):
    path = write(tmp_path / "a.tsv", b"\n".join([b"text\tlabel", *rows, b""]))
    warning = files.quotation_marks(DataConfig(files=(str(path),)))
    assert warning.startswith("warning: quotation marks around fields are read as text") == quoted
    assert bool(warning) == quoted


def test_a_separator_that_does_not_occur_is_warned_of(tmp_path):
    path = write(tmp_path / "a.txt", "one\n<|endoftext|>\ntwo\n")
    lines = log_of(tmp_path / "x", plain(path, separator="<|end|>"))
    expected = "warning: data.separator=<|end|> does not occur in the train files, each of which is one document"
    assert f"prepare: {expected}" in lines
    assert not any("does not occur" in line for line in log_of(tmp_path / "y", plain(path, separator="<|endoftext|>")))


# What a pattern covers.


@pytest.mark.parametrize("pattern", [".", "*", "**", "r*", "run", "run/data", "link", "*/d*"])
def test_input_that_covers_the_directory_that_is_written_to_is_rejected(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "a text")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="covers run/data, which is written to: choose another --workdir"):
        prepare(plain(pattern), epath.Path("run/data"), lambda line: None, workers=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "sub", "s*", "./a.txt"])
def test_input_beside_the_directory_that_is_written_to_is_read(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.txt", "a text"), write(tmp_path / "sub" / "b.txt", "another")
    assert prepare(plain(pattern), epath.Path("run/data"), lambda line: None, workers=1)["documents"] >= 1


def test_an_empty_name_is_rejected():
    with pytest.raises(ConfigError, match=r"^data.files holds an empty name: "):
        files.inputs(DataConfig(files=("",)), "train")


# Private characters.


def test_a_conversation_of_all_private_characters_is_a_bad_record(tmp_path):
    every = "".join(map(chr, (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
    talks = [[("user", every), ("assistant", "x")], [("user", "a"), ("assistant", "b")]]
    lines = [json.dumps({"text": [{"role": role, "content": text} for role, text in talk]}) for talk in talks]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    turns = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    template = write(tmp_path / "t.jinja", turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    config = plain(path, example="chat", chat_template=str(template))
    with pytest.raises(DataError, match=r"a.jsonl:1: it uses too many different private-use characters"):
        prepare(config, epath.Path(tmp_path / "strict"), lambda line: None, workers=1)
    config = dataclasses.replace(config, clean=CleanConfig(bad_records="skip"))
    summary = prepare(config, epath.Path(tmp_path / "skip"), lambda line: None, workers=1)
    assert (summary["documents"], summary["dropped"]) == (1, {"bad_record": 1})


def test_a_classifier_of_one_class_is_warned_of(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,x\nb,x\n")
    config = plain(path, example="label")
    config = Config(data=config.data, tokenizer=config.tokenizer, task=TaskConfig(objective="classification"))
    lines = log_of(tmp_path / "out", config)
    assert "prepare: warning: all examples have the label 'x': there is nothing to tell apart" in lines
