"""File types by content and suffix: every text is read, or its file is rejected by name."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import pathlib

import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, TaskConfig, TokenizerConfig
from lslm_jax.config.validation import validate
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.readers import files, formats, sources
from lslm_jax.errors import ConfigError, DataError, InputMissing

BYTES = TokenizerConfig(kind="bytes")
TEXTS = ["plain", "two\nlines", '"quoted", with, commas', "\u00e9\U0001f600"]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def texts(*patterns, **settings) -> list[str]:
    source = DataConfig(files=tuple(map(str, patterns)), **settings)
    found = [document.content for document in sources.documents(source, "train")]
    return [text.decode() if isinstance(text, bytes) else text for text in found]


def survey(*patterns, **settings) -> str:
    return files.survey(DataConfig(files=tuple(map(str, patterns)), **settings), "train")


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json", LINES),
        ("a.json", "\ufeff" + "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("a.JSON", LINES),
        ("a.CSV", 'id,text\n0,plain\n1,"two\nlines"\n2,"""quoted"", with, commas"\n3,\u00e9\U0001f600\n'),
        ("a.csv", 'id,text\r0,plain\r1,"two\nlines"\r2,"""quoted"", with, commas"\r3,\u00e9\U0001f600\r'),
        ("train", LINES),
        ("a.txt", LINES),
    ],
)
def test_records_are_read_whatever_the_case_and_kind_of_their_suffix(tmp_path, name, content):
    assert texts(write(tmp_path / name, content)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.JSONL.GZ", "a.jsonl"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compression_is_recognized_by_the_first_bytes(tmp_path, name, pack):
    path = write(tmp_path / name, pack(LINES.encode()))
    suffix = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz"}.get(pack.__module__, ".zst")
    if name.lower().endswith((suffix, ".jsonl")):
        assert texts(path) == TEXTS
        broken = write(tmp_path / ("broken-" + name), path.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"^{broken} is not whole compressed data"):
            texts(broken)
    else:
        with pytest.raises(DataError, match=f"^{path} is not .*, as its suffix claims: rename it$"):
            texts(path)


def test_arrow_files_and_streams_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": [0, 1, 2, 3], "text": TEXTS})
    for name, new in [("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file), ("c.feather", pa.ipc.new_file)]:
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        assert texts(tmp_path / name) == TEXTS
        broken = write(tmp_path / ("broken-" + name), (tmp_path / name).read_bytes()[:-150])
        with pytest.raises(DataError, match=f"^{broken}: not readable Arrow: "):
            texts(broken)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf16_is_read_by_its_mark_and_rejected_without(tmp_path, encoding):
    mark = "\ufeff".encode(encoding)
    text = "ein Text, \u00fcber mehrere\nZeilen \U0001f600\n"
    assert texts(write(tmp_path / "a.txt", mark + text.encode(encoding))) == [text]
    assert texts(write(tmp_path / "a.jsonl", mark + LINES.encode(encoding))) == TEXTS
    bare = write(tmp_path / "b.txt", text.encode(encoding))
    with pytest.raises(DataError, match=f"^{bare} (looks like UTF-16|is a binary file)"):
        texts(bare)
    half = write(tmp_path / "c.txt", mark + text.encode(encoding)[:-1])
    with pytest.raises(DataError, match=f"^{half} cannot be decoded"):
        texts(half)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"PK\x03\x04" + bytes(30), "is a ZIP archive or an Office document: unpack it, or save it as plain"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF document: extract its text first, as with pdftotext"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer in the place of the file"),
        ("a.txt.gz", gzip.compress(bytes(257) + b"ustar" + bytes(300), mtime=0), "is a tar archive: unpack it"),
        ("a.bin", bytes(range(32)) * 40, "is a binary file, not text: leave it out"),
        (
            "a.txt",
            "\u043f\u0440\u0438\u0432\u0435\u0442 ".encode("cp1251") * 30,
            "is not UTF-8: 86 % of its first bytes",
        ),
        ("a.parquet", b"text", ": not readable Parquet: its first bytes are not those of a Parquet file"),
        ("a.json", '[{"text": "x"}', ": not JSON: the list has no end"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', ": not JSON: no comma after record 1"),
        ("a.json", '{"rows": [{"text": "x"}]}', ":1: no field 'text' (data.text_key); it has: rows"),
        ("a.csv", "text,label,text\na,b,c\n", ": 2 columns are named 'text' (data.text_key): rename all but one"),
    ],
)
def test_other_files_are_rejected_by_name_whatever_bad_utf8_is(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    config = Config(data=DataConfig(files=(str(path),)), tokenizer=BYTES, clean=CleanConfig(bad_utf8="replace"))
    with pytest.raises(DataError) as error:
        prepare(config, epath.Path(tmp_path / "out"), lambda line: None, workers=1)
    assert str(error.value).startswith(f"{path}{message}" if message[0] == ":" else f"{path} {message}")
    assert "\n" not in str(error.value)


CARD = "---\nlicense: mit\ndataset_info:\n---\n# A data set\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", CARD, "is the card of a data set or model, not data"),
        ("dataset_info.json", "{}", "describes a data set of the Hugging Face Hub and holds no data"),
        ("state.json", "{}", "describes a data set of the Hugging Face Hub and holds no data"),
        ("LICENSE", "MIT", "would be read as plain text, but lies among files of records"),
    ],
)
def test_what_lies_beside_the_data_is_not_trained_on(tmp_path, name, content, message):
    data = write(tmp_path / "set" / "train.jsonl", LINES)
    extra = write(tmp_path / "set" / name, content)
    with pytest.raises(DataError) as error:
        survey(data.parent)
    assert str(error.value) == f"{extra} {message}: name the data files alone, as {data.parent}/*.jsonl"
    assert survey(f"{data.parent}/*.jsonl") == "1 as JSON lines: train.jsonl"


def test_the_summary_lists_files_by_what_they_are_read_as(tmp_path):
    for i in range(5):
        write(tmp_path / "raw" / f"{i}.txt", "a text")
    write(tmp_path / "b.csv.gz", gzip.compress(b"text\nx\n"))
    write(tmp_path / "c.txt", codecs.BOM_UTF16_LE + "c".encode("utf-16-le"))
    assert survey(tmp_path / "raw", tmp_path / "b.csv.gz", tmp_path / "c.txt") == (
        "5 as text with one document a file: 0.txt, 1.txt, 2.txt, ...; 1 as CSV, gzip: b.csv.gz; "
        "1 as text with one document a file, UTF-16: c.txt"
    )


@pytest.mark.parametrize(
    ("separator", "content"),
    [
        ("<|endoftext|>", "one\n1\n<|endoftext|>two<|endoftext|>\n<|endoftext|>\nthree\n<|endoftext|>"),
        ("blank_line", "\n\none\n1\n\n \t\n\ntwo\r\n\r\nthree"),
        ("***", "one\n1***two***three***"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_documents_are_separated_by_a_mark(tmp_path, monkeypatch, separator, content, chunk):
    monkeypatch.setattr("lslm_jax.data.readers.formats._CHUNK", chunk)
    assert texts(write(tmp_path / "a.txt", content), separator=separator) == ["one\n1", "two", "three"]
    indented = write(tmp_path / "b.txt", "def f():\n  pass\n\n  # g\n")
    assert texts(indented, separator="blank_line") == ["def f():\n  pass", "  # g"]


def test_a_separator_that_concerns_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.separator=XX is for plain text files, of which there are none$"):
        survey(write(tmp_path / "a.jsonl", LINES), separator="XX")
    for settings in ({"example": "pair", "separator": "X"}, {"roles": ("a=user",)}):
        with pytest.raises(ConfigError, match=r"needs example="):
            validate(Config(data=DataConfig(files=("a",), **settings)))


def test_markup_is_warned_of(tmp_path):
    write(tmp_path / "a.html", "<p>text</p>")
    write(tmp_path / "b.txt", "text")
    assert files.markup(DataConfig(files=(str(tmp_path),))) == (
        "warning: 1 file holds markup, which is trained on as text: a.html"
    )
    assert files.markup(DataConfig(files=(str(tmp_path / "b.txt"),))) == ""


# Links and devices.


def test_links_are_followed_once_and_dangling_ones_named(tmp_path):
    for name in ("a.txt", "b/c.txt"):
        write(tmp_path / name, name)
    os.symlink("..", tmp_path / "b" / "up")
    os.symlink("b", tmp_path / "same")
    for pattern in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "*"):
        assert texts(pattern) == ["a.txt", "b/c.txt"]
    os.symlink("gone.txt", tmp_path / "z.txt")
    for pattern in (tmp_path, tmp_path / "*.txt", tmp_path / "z.txt"):
        with pytest.raises(InputMissing, match=f"^{tmp_path}/z.txt is a link to gone.txt, which does not exist$"):
            texts(pattern)


def test_devices_and_pipes_are_rejected(tmp_path):
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("zero.txt", "pipe.txt"):
        with pytest.raises(DataError, match=f"^{tmp_path}/{name} is not a regular file: copy its content into one$"):
            texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"x" * 3000,
            " holds more than 0 MiB, too much for one document: split it, or set data.document=line",
        ),
        ("a.txt.gz", gzip.compress(b"x" * 3000, mtime=0), " holds more than 0 MiB, too much for one document"),
        ("a.jsonl", b'{"text": "' + b"x" * 3000 + b'"}', ":1: a line of more than 0 MiB: split it"),
        ("a.csv", b"text\n" + b"x" * 3000, ":2: a line of more than 0 MiB: split it"),
        ("a.csv", b'text\n"' + b"x\n" * 1500 + b'"', ":2: not CSV: field larger than field limit (1000)"),
        ("a.tsv", b"text\n" + b"x" * 3000, ":2: a line of more than 0 MiB: split it"),
        ("a.json", b'[{"text": "' + b"x" * 3000, ": a record of more than 0 MiB, or not JSON"),
    ],
)
def test_one_document_is_limited_in_size(tmp_path, monkeypatch, name, content, message):
    for module in ("formats", "record_files"):
        monkeypatch.setattr(f"lslm_jax.data.readers.{module}.MAX_RECORD", 1000)
    monkeypatch.setattr("lslm_jax.data.readers.record_files._CHUNK", 700)
    monkeypatch.setattr("lslm_jax.data.readers.formats.MAX_FILE", 2000)
    monkeypatch.setattr("lslm_jax.data.readers.formats._CHUNK", 1 << 10)
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_damaged_parquet_is_told_in_one_line(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"] * 50).dictionary_encode()}), whole)
    data = whole.read_bytes()
    path = tmp_path / "a.parquet"
    for place in range(4, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            texts(path)
        except DataError as error:
            assert str(error).startswith(f"{path}:") and "\n" not in str(error)


def test_bad_records_are_skipped_and_counted_on_request(tmp_path):
    lines = ['{"text": "good"}', '{"body": "x"}', "not JSON", '["text"]', '{"text": 3}', '{"text": "also"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    table = write(tmp_path / "b.csv", "text,label\na,1\nb\nc,2,3\nd,4\n")
    data, shown = DataConfig(files=(str(path), str(table))), []
    with pytest.raises(DataError, match=r"^.*:2: no field 'text'"):
        prepare(Config(data=data, tokenizer=BYTES), epath.Path(tmp_path / "strict"), shown.append, workers=1)
    skipping = Config(data=data, tokenizer=BYTES, clean=CleanConfig(bad_records="skip"))
    summary = prepare(skipping, epath.Path(tmp_path / "out"), shown.append, workers=1)
    assert summary["documents"] == 4 and summary["dropped"] == {"bad_record": 6}
    notes = [line for line in shown if "bad record" in line]
    assert notes[0] == f"prepare: a bad record was dropped: {path}:2: no field 'text' (data.text_key); it has: body"
    assert notes[-1] == "prepare: 3 more bad records were dropped"


def test_an_unknown_label_is_an_error_even_where_bad_records_are_skipped(tmp_path):
    train = write(tmp_path / "a.csv", "text,label\na,3\nb,4\nc,5\n")
    valid = write(tmp_path / "b.csv", "text,label\nx,1\n")
    data = DataConfig(example="label", files=(str(train),), valid_files=(str(valid),))
    task, clean = TaskConfig(objective="classification"), CleanConfig(bad_records="skip")
    with pytest.raises(DataError) as error:
        prepare(Config(data=data, task=task, clean=clean, tokenizer=BYTES), epath.Path(tmp_path / "out"), print, 1)
    assert (
        str(error.value) == f"{valid}:2: unknown label '1'; known are: 3, 4, 5; correct it, or name all by data.labels"
    )


@pytest.mark.parametrize("depth", [100, 500, 900, 5000])
def test_records_nested_deeply_are_told_in_one_line(tmp_path, depth):
    deep = "[" * depth + "]" * depth
    for name, content in [
        ("a.jsonl", f'{{"text": {deep}}}'),
        ("b.jsonl", f'{{"text": "x", "messages": [{{"role": "user", "content": "a", "tool_calls": {deep}}}]}}'),
        ("c.json", f'[{{"text": {deep}}}]'),
    ]:
        path = write(tmp_path / name, content)
        with pytest.raises(DataError) as error:
            texts(path, **({"example": "chat", "text_key": "messages"} if name[0] == "b" else {}))
        assert str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n", ": no columns 'text' (data.text_key), 'label' (data.label_key); its header has: a, b"),
        ("a.jsonl", '{"a": 1}', ":1: no fields 'text' (data.text_key), 'label' (data.label_key); it has: a"),
    ],
)
def test_all_missing_columns_are_told_at_once(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        texts(path, example="label")
    assert str(error.value) == f"{path}{message}"


def test_a_format_is_known_by_name_alone_where_that_is_enough():
    names = {"a.JSONL.GZ": "jsonl", "b.csv.zst": "csv", "c.md": "text", "d.gz": "text", "e.Feather": "arrow"}
    assert {name: formats.by_suffix(epath.Path(name)) for name in names} == names
