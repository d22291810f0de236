"""Documents come out of every format whole, in one order, and bad files are named."""

import csv
import gzip
import hashlib
import io
import json
import os
import pathlib
import unicodedata
import unittest.mock

import pytest

from lslm_jax.config import DataConfig, Source
from lslm_jax.data.readers import sources
from lslm_jax.errors import ConfigError, DataError, InputMissing

TEXTS = ["plain", "two\nlines", '"quoted", with, commas\tand tabs', "\u00e9\U0001f600", "  blanks  ", ""]


def texts(source: Source, split="train", max_documents=0) -> list[str]:
    found = sources.documents(source, split, max_documents)
    return [text.decode() if isinstance(text, bytes) else text for text, *_ in found]


def origins(source: Source, split="train") -> list[str]:
    return [document.origin for document in sources.documents(source, split)]


def files(*patterns, **settings) -> DataConfig:
    return DataConfig(files=tuple(str(pattern) for pattern in patterns), **settings)


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows_csv() -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))])
    return stream.getvalue()


def rows_jsonl() -> str:
    return "\n\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)) + "\n"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", rows_jsonl()), ("a.csv", rows_csv())])
def test_every_text_comes_out_as_it_went_in(tmp_path, name, content, bom, suffix):
    path = write(tmp_path / (name + suffix), bom + content)
    assert texts(files(path)) == TEXTS


def test_tab_separated_fields_have_no_quotes(tmp_path):
    path = write(tmp_path / "a.tsv", 'label\ttext\r\n0\t"a\r\n\n1\tit\'s "b"\r\n')
    assert texts(files(path)) == ['"a', 'it\'s "b"']
    assert origins(files(path)) == [f"{path}:2", f"{path}:4"]


def test_parquet_is_streamed_whatever_its_string_type(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    strings = pa.array(TEXTS)
    for i, column in enumerate([strings, strings.cast(pa.large_string()), strings.dictionary_encode()]):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table({"n": range(len(TEXTS)), "text": column}), path, row_group_size=2)
        assert texts(files(path)) == TEXTS
        assert origins(files(path))[-1] == f"{path}:{len(TEXTS)}"


def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\n\nfour")
    assert texts(files(path)) == ["one\r\ntwo\n\nfour"]
    assert texts(files(path, document="line")) == ["one", "two", "", "four"]
    assert origins(files(path, document="line"))[3] == f"{path}:4"


def test_undecodable_bytes_reach_the_cleaner(tmp_path):
    for name, content in [("a.txt", b"a\xff"), ("a.jsonl", b'{"text": "a\xff"}'), ("a.csv", b"text\r\na\xff\r\n")]:
        path = write(tmp_path / name, content)
        [document] = sources.documents(files(path), "train")
        assert document.content in (b"a\xff", "a\udcff")


def test_directories_globs_and_files_are_read_sorted_and_once(tmp_path, monkeypatch):
    names = ["b.txt", "a/z.txt", "a/b/y.txt", "a/.hidden.txt", ".git/x.txt", "a/__pycache__/x.txt", "A.txt", "c.md"]
    for name in names:
        write(tmp_path / name, name)
    everything = ["A.txt", "a/b/y.txt", "a/z.txt", "b.txt", "c.md"]
    assert texts(files(tmp_path)) == everything
    assert texts(files(tmp_path / "**" / "*.txt")) == everything[:4]
    assert texts(files(tmp_path / "*")) == everything
    assert texts(files(tmp_path / "c.md", tmp_path / "a", tmp_path)) == [
        "c.md",
        "a/b/y.txt",
        "a/z.txt",
        "A.txt",
        "b.txt",
    ]
    assert texts(files(tmp_path / "a" / ".hidden.txt")) == ["a/.hidden.txt"]
    monkeypatch.chdir(tmp_path)
    assert origins(files("**/*.txt")) == everything[:4]
    assert texts(files("*.md", "b.txt"), max_documents=1) == ["c.md"]


def test_held_out_files_are_not_trained_on(tmp_path, monkeypatch):
    for i in range(4):
        write(tmp_path / f"{i}.txt", str(i))
    source = files(tmp_path, valid_files=(str(tmp_path / "[02].txt"),))
    assert texts(source, "valid") == ["0", "2"]
    assert texts(source) == ["1", "3"]
    assert texts(files(tmp_path), "valid") == []
    monkeypatch.chdir(tmp_path)
    assert texts(files("*.txt", valid_files=source.valid_files)) == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"body": 1, "id": 2}', ":2: no field 'text' (data.text_key); it has: body, id"),
        ("a.jsonl", '\n["text"]', ":2: a JSON list, not an object with the field 'text'"),
        ("a.jsonl", '{"text": null}', ":1: field 'text' is null, not text"),
        ("a.jsonl", '{"text": "x"', ":1: not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        ("a.tsv", "label\tsentence\n", ": no column 'text' (data.text_key); its header has: label, sentence"),
        ("a.tsv", "label\ttext\n0\tx\n1\ty\tz", ":3: 3 columns, the header has 2"),
        ("a.csv", "", ": no column 'text' (data.text_key); its header has: nothing"),
        ("a.csv", 'id,text\n0,"two\nlines"\n1\n', ":4: 1 columns, the header has 2"),
        ("a.csv", 'id,text\n0,x\n1,"open\n', ":3: not CSV: unexpected end of data"),
    ],
)
def test_a_bad_record_is_told_with_its_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        texts(files(path))
    assert str(error.value) == f"{path}{message}"


def test_a_damaged_file_is_told_by_name(tmp_path):
    pytest.importorskip("pyarrow")
    whole = gzip.compress(b"text " * 10_000)
    for name, content in [("a.txt.gz", whole[:-20]), ("b.txt.gz", b"plain"), ("c.parquet", b"PAR1 not PAR1")]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{path}"):
            texts(files(path))


def test_nothing_to_read_is_told_by_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.files is empty"):
        texts(files())
    for pattern in ("none.txt", "*.txt", "none/**/*.txt"):
        with pytest.raises(InputMissing) as error:
            texts(files(tmp_path / pattern))
        assert str(error.value) == f"data.files: {tmp_path / pattern} matches no file"
    write(tmp_path / "a.txt", "a")
    with pytest.raises(InputMissing, match=r"^data.valid_files: .* matches no file"):
        texts(files(tmp_path, valid_files=("none",)))


def test_a_fingerprint_tells_what_changed(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.txt", str(i))
    source = files(tmp_path, valid_files=(str(tmp_path / "0.txt"),))
    before = sources.fingerprint(source)
    assert [entry[:2] for entry in before] == [[str(tmp_path / f"{i}.txt"), 1] for i in range(3)]
    assert [entry[3] for entry in before] == [hashlib.sha256(str(i).encode()).hexdigest() for i in range(3)]
    assert sources.changed(source, before, missing_ok=False) is None
    older = [entry[:2] for entry in before]
    status = (tmp_path / "1.txt").stat()
    (tmp_path / "1.txt").write_text("9")
    os.utime(tmp_path / "1.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    edited = f"{tmp_path / '1.txt'} has the same size but another content"
    assert sources.changed(source, before, missing_ok=True) == edited
    assert sources.changed(source, older, missing_ok=True) is None, "earlier versions put sizes alone on record"
    os.utime(tmp_path / "1.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sources.changed(source, before, missing_ok=True) is None, "trusted by its time"
    assert sources.changed(source, before, missing_ok=False) == edited, "a killed preparation trusts no time"
    (tmp_path / "1.txt").write_text("1")
    assert sources.changed(source, before, missing_ok=True) is None, "a file that was only touched"
    (tmp_path / "1.txt").write_text("longer")
    assert sources.changed(source, before, missing_ok=True) == f"{tmp_path / '1.txt'} had 1 bytes, now 6"
    (tmp_path / "1.txt").unlink()
    assert sources.changed(source, before, missing_ok=True) is None
    assert sources.changed(source, before, missing_ok=False) == f"{tmp_path / '1.txt'} is gone"
    (tmp_path / "1.txt").write_text("1")
    (tmp_path / "3.txt").write_text("3")
    assert sources.changed(source, before, missing_ok=True) == f"{tmp_path / '3.txt'} is new"


def draw(source: Source, sample_bytes: int, seed: int = 0) -> list[str]:
    return list(sources.sample(source, sample_bytes, seed, lambda document: [document.content.decode()]))


def test_a_sample_takes_about_equally_from_each_file(tmp_path):
    lines = [100, 2_000, 20_000, 40_000]
    documents = [str(i) * 9 for i in range(4)]
    for document, count in zip(documents, lines, strict=True):
        write(tmp_path / f"{document}.txt", f"{document}\n" * count)
    source = files(tmp_path, document="line")
    drawn = draw(source, 150_000)
    counts = [drawn.count(document) for document in documents]
    assert counts[:2] == lines[:2]
    assert counts[2] == counts[3] == pytest.approx((150_000 / 9 - 2_100) / 2, rel=0.2)
    assert draw(source, 10**9) == draw(source, 10**9) != draw(source, 10**9, seed=1)
    assert len(draw(source, 10**9)) == sum(lines)


def test_a_sample_cuts_documents_and_opens_no_more_files_than_it_needs(tmp_path):
    for i in range(50):
        write(tmp_path / f"{i}.txt", f"{i} " + "\u00e9" * 200_000)
    drawn = draw(files(tmp_path), 300_000)
    assert sum(len(text.encode()) for text in drawn) == pytest.approx(300_000, abs=10)
    assert len(drawn) < 20


# TFDS, offline: the real lm1b builder on a few files in the layout of the real archive.


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def lm1b(request, tmp_path_factory) -> Source:
    tfds = pytest.importorskip("tensorflow_datasets")
    raw = tmp_path_factory.mktemp("raw")
    root = raw / "1-billion-word-language-modeling-benchmark-r13output"
    for part, name in [("training", "news.en-%05d-of-00100"), ("heldout", "news.en.heldout-%05d-of-00050")]:
        for i in (1, 2):
            lines = "".join(f"{part} {i} {j} \u00e9\n" for j in range(100))
            write(root / f"{part}-monolingual.tokenized.shuffled" / (name % i), lines)
    data_dir = tmp_path_factory.mktemp(request.param)
    source = DataConfig(source="tfds", tfds="lm1b", data_dir=str(data_dir), valid_split="test[:50%]")
    download = unittest.mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(raw)
    )
    with download:
        if request.param == "array_record":
            builder = tfds.builder("lm1b", data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        else:
            texts(source)  # prepares what is not there yet
    return source


def test_a_tfds_data_set_gives_each_example_once_in_one_order(lm1b):
    found = texts(lm1b)
    assert sorted(found) == sorted(f"training {i} {j} \u00e9" for i in (1, 2) for j in range(100))
    assert found == texts(lm1b)
    assert origins(lm1b)[:2] == ["lm1b/1.1.0:0", "lm1b/1.1.0:1"]
    assert texts(lm1b, max_documents=7) == found[:7]
    assert len(texts(lm1b, "valid")) == 100
    assert sources.fingerprint(lm1b) == [["lm1b/1.1.0", "train", 200], ["lm1b/1.1.0", "test[:50%]", 100]]
    assert sources.changed(lm1b, sources.fingerprint(lm1b), missing_ok=False) is None


def test_a_sample_of_a_tfds_split_is_spread_over_it(lm1b):
    found, drawn = texts(lm1b), draw(lm1b, 1_000)
    places = [found.index(text) for text in drawn if text in found]
    assert len(places) > 20
    assert min(places) < 20 and max(places) > 180


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"tfds": ""}, ConfigError, "data.tfds is empty: name a TFDS data set, such as lm1b"),
        ({"tfds": "lm1x"}, InputMissing, "data.tfds: TFDS has no data set lm1x; near names: lm1b, "),
        ({"tfds": "lm1b:9.9.9"}, InputMissing, "data.tfds: no lm1b:9.9.9; configurations: none; versions: 1.1.0"),
        ({"tfds": "glue/sst9"}, InputMissing, "data.tfds: no glue/sst9; configurations: cola, sst2, "),
        ({"split": "dev"}, InputMissing, "lm1b/1.1.0 has no split dev; it has: train, test"),
        ({"text_key": "body"}, DataError, "lm1b/1.1.0 has no feature 'body' (data.text_key); it has: text"),
    ],
)
def test_an_unknown_tfds_name_is_told_with_the_valid_ones(lm1b, settings, kind, message):
    source = DataConfig(**{"source": "tfds", "tfds": "lm1b", "data_dir": lm1b.data_dir} | settings)
    with pytest.raises(kind) as error:
        texts(source)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_nested_features_are_named_by_path(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"pair": {"en": tfds.features.Text()}, "label": tfds.features.ClassLabel(num_classes=2)}
    examples = [(i, {"pair": {"en": text}, "label": 0}) for i, text in enumerate(TEXTS)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="pairs",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples},
        data_dir=str(tmp_path),
    )
    source = DataConfig(source="tfds", tfds="pairs:1.0.0", data_dir=str(tmp_path), text_key="pair/en")
    assert sorted(texts(source)) == sorted(TEXTS)
    with pytest.raises(DataError, match=r"feature 'label' \(data.text_key\) is not text"):
        texts(DataConfig(source="tfds", tfds="pairs:1.0.0", data_dir=str(tmp_path), text_key="label"))


def test_a_damaged_tfds_file_is_told_by_name(lm1b):
    [path] = pathlib.Path(lm1b.data_dir).rglob("*train*-of-00001")
    whole = path.read_bytes()
    sizes = (len(whole) // 2, 1 << 16) if "array" in path.name else (len(whole) // 2,)
    try:
        for size in sizes:  # cut at 64 kB, an ArrayRecord file opens without complaint
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=f"in {path}: "):
                texts(lm1b)
    finally:
        path.write_bytes(whole)


def test_a_share_of_a_single_text_file_is_held_out_by_cutting_off_its_end_after_a_line(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"one\ntwo\nthree\nfour\n")
    source = Source(files=(f"{tmp_path}/book.txt",), valid_fraction=0.4)
    head, tail = sources.documents(source, "train")
    assert (head.content, head.held_out) == (b"one\ntwo\nthree\n", False)
    assert (tail.content, tail.held_out) == (b"four\n", True)
    assert list(sources.sample(source, 100, 0, lambda document: [] if document.held_out else ["kept"])) == ["kept"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "text",
    ["\u65e5\u672c\u8a9e" * 40, "e\u0301" * 50, "\U0001f468\u200d\U0001f469" * 20, "ab", "long line " * 9 + "\n"],
)
def test_a_text_without_lines_is_cut_between_whole_characters(tmp_path, text, fraction):
    (tmp_path / "book.txt").write_text(text, "utf-8")
    parts = list(sources.documents(Source(files=(f"{tmp_path}/book.txt",), valid_fraction=fraction), "train"))
    assert "".join(part.content.decode() for part in parts) == text
    assert [part.held_out for part in parts] == [False, True]
    assert not unicodedata.combining(parts[1].content.decode()[0]) and parts[1].content.decode()[0] != "\u200d"


def test_of_too_few_books_the_end_of_each_is_held_out(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("".join(f"line {j} of {i}\n" for j in range(10_000)))
    few = list(sources.documents(files(tmp_path, valid_fraction=0.01), "train"))
    assert [document.held_out for document in few] == [False, True] * 8
    assert all(document.content.count(b"\n") in range(80, 111) for document in few[1::2])
    kept = lambda document: [] if document.held_out else [document.content.decode()]
    drawn = list(sources.sample(files(tmp_path, valid_fraction=0.01), 8 << 14, 0, kept))
    assert {text.partition("\n")[0][-1] for text in drawn} == set("01234567"), "from each of them"
    enough = list(sources.documents(files(tmp_path, valid_fraction=0.3), "train"))
    assert [document.held_out for document in enough] == [None] * 8
