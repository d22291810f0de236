"""Random small corpora: every document read is used or counted under a reason, or the corpus is rejected in a line."""

import bz2
import collections
import csv
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import unicodedata
from typing import NamedTuple

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, MixtureSource, TaskConfig, TokenizerConfig
from lslm_jax.data import tokenizer as tokenizers
from lslm_jax.data.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.errors import LslmError

ALPHABETS = [
    "abc defg.",
    "\u00e9\u00fc\u00df \u0142e\u0301u\u0308",
    "\u65e5\u672c\u8a9e\u306e\u3042\u308a\u304c\u3068\u3046\u3002",
    "\U0001f600\U0001f468\u200d\U0001f469 x",
    "abcd\x07 efgh ijkl mnop qrst\x00 uvwx yz\u0085 ABCD",
    '"quoted", \'fields\' {"a": [1]} \\',
]
PAPER = ["a text that comes again", "another one", "x", ""]
LABELS = [["neg", "pos"], ["1", "2"], [0, 1, 2], ["O", "B-PER", "I-PER"]]


class Doc(NamedTuple):
    """An example as it was generated: its texts, its label, and whether its bytes are bad."""

    texts: tuple[str, ...]
    label: object = None
    bad: bool = False


class Corpus(NamedTuple):
    """A corpus, what is expected of it, and whether something makes it unfit."""

    config: Config
    sources: dict[str, dict[str, list[Doc]]]
    unfit: bool


def cleaned(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", "".join(c for c in text if c in "\t\n" or unicodedata.category(c) != "Cc"))


def random_text(pick: random.Random, newlines: bool) -> str:
    if pick.random() < 0.3:
        return pick.choice(PAPER)
    parts = ["".join(pick.choices(pick.choice(ALPHABETS), k=pick.choice([1, 5, 30, 300]))) for _ in range(3)]
    text = pick.choice(["\n", "\r\n", " "] if newlines else [" "]).join(parts)
    return text if newlines else text.replace("\x00", "").replace("\u0085", "")


def random_docs(pick: random.Random, kind: str, style: str, labels: list) -> list[Doc]:
    newlines = style not in ("line", "tsv")
    docs = []
    for _ in range(1 if style == "file" else pick.randrange(7)):
        texts = tuple(random_text(pick, newlines) for _ in range(2 if kind == "pair" else 1))
        label = pick.choice(labels) if kind == "label" else None
        if kind == "label" and pick.random() < 0.15:
            label = pick.choice([None, "", " "]) if style in ("jsonl", "json") else ""
        docs.append(Doc(texts, label, pick.random() < 0.03 and kind == "text" and style in ("file", "line", "jsonl")))
    return docs


def records_of(docs: list[Doc], kind: str) -> list[dict]:
    names = ("source", "target") if kind == "pair" else ("text",)
    made = [dict(zip(names, doc.texts, strict=True)) for doc in docs]
    return [record | ({"label": doc.label} if kind == "label" else {}) for record, doc in zip(made, docs, strict=True)]


def content_of(pick: random.Random, docs: list[Doc], kind: str, style: str) -> bytes:
    records = records_of(docs, kind)
    spoil = lambda text, doc: text + b"\xff" if doc.bad else text
    match style:
        case "file":
            return spoil(docs[0].texts[0].encode(), docs[0])
        case "line":
            return b"".join(spoil(doc.texts[0].encode(), doc) + b"\n" for doc in docs)
        case "jsonl":
            lines = (json.dumps(record, ensure_ascii=pick.random() < 0.5).encode() for record in records)
            return b"".join(
                line[:-2] + b'\xff"}' + b"\n" if doc.bad else line + b"\n"
                for line, doc in zip(lines, docs, strict=True)
            )
        case "json":
            return json.dumps(records, indent=pick.choice([None, 2])).encode()
        case "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(records), buffer)
            return buffer.getvalue()
        case "tsv":
            keys = ["id", *records[0]]  # a lone empty text would be an empty line
            rows = [{"id": "x", **record} for record in records]
            lines = ["\t".join(keys), *("\t".join(str(row[key]) for key in keys) for row in rows)]
            return "".join(line + "\n" for line in lines).encode()
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(records[0]) if records else ["text"])
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write_file(pick: random.Random, path: pathlib.Path, content: bytes, style: str) -> pathlib.Path:
    bad = b"\xff" in content
    if style not in ("parquet",) and content and not bad and pick.random() < 0.2:
        content = ("\ufeff" + content.decode()).encode(pick.choice(["utf-8", "utf-16-le", "utf-16-be"]))
    suffix = {"file": ".txt", "line": ".txt"}.get(style, f".{style}")
    suffix = suffix.upper() if pick.random() < 0.2 else suffix
    packed = pick.choice([*PACKERS, "", "", ""]) if content and style != "parquet" else ""
    path = path.with_name(path.name + suffix + packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACKERS[packed](content) if packed else content)
    return path


def styles_of(pick: random.Random, kind: str) -> list[str]:
    if kind == "text":
        plain = pick.choice(["file", "line"])
        return [plain] if pick.random() < 0.4 else ["jsonl", "json", "csv", "tsv", "parquet"]
    return ["jsonl", "json", "csv"] if kind == "pair" else ["jsonl", "json", "csv", "tsv"]


def fill(pick: random.Random, root: pathlib.Path, kind: str, styles: list[str], labels: list) -> list[Doc]:
    """Files in a folder; returns their documents."""
    found: list[Doc] = []
    root.mkdir(parents=True)
    for number in range(pick.randrange(1, 5)):
        style = pick.choice(styles)
        docs = random_docs(pick, kind, style, labels)
        if not docs and style in ("csv", "tsv", "parquet"):
            continue  # whose header would have no columns
        folder = root / pick.choice(["", "", "sub", "sub/deep"])
        write_file(pick, folder / f"{number}", content_of(pick, docs, kind, style), style)
        found += docs
    if pick.random() < 0.2:
        (root / "sub").mkdir(exist_ok=True)
        os.symlink("..", root / "sub" / "loop")
    return found


def spoil(pick: random.Random, root: pathlib.Path) -> bool:
    """Perhaps adds a file that must be rejected."""
    match pick.randrange(12):
        case 0:
            os.symlink("nowhere", root / "dangling.jsonl")
        case 1:
            (root / "a.docx").write_bytes(b"PK\x03\x04" + bytes(50))
        case 2:
            (root / "wide.txt").write_bytes("some plain text".encode("utf-16-le"))
        case 3:
            (root / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-9])
        case _:
            return False
    return True


def random_corpus(seed: int, root: pathlib.Path) -> Corpus:
    pick = random.Random(seed)
    kind = pick.choice(["text", "text", "label", "pair"])
    labels, styles = pick.choice(LABELS), styles_of(pick, kind)
    clean = CleanConfig(
        bad_utf8=pick.choice(["strict", "skip", "replace"]),
        min_chars=pick.choice([0, 1, 1, 5]),
        max_chars=pick.choice([0, 0, 100]),
        deduplicate=pick.choice(["exact", "exact", "none"]),
        bad_records=pick.choice(["strict", "skip"]),
    )
    names = ["one", "two"] if kind == "text" and pick.random() < 0.25 else [""]
    made, sources, unfit = [], {}, False
    for name in names:
        data = {"train": fill(pick, root / name / "train", kind, styles, labels)}
        settings: dict = {"files": (str(root / name / "train"),), "example": kind}
        if styles == ["line"]:
            settings["document"] = "line"
        if kind == "pair":
            settings |= {"text_key": "source", "target_key": "target"}
        if pick.random() < 0.4:
            data["valid"] = fill(pick, root / name / "valid", kind, styles, labels)
            settings["valid_files"] = (str(root / name / "valid"),)
        elif kind == "text" and styles != ["file"] and pick.random() < 0.5:
            settings["valid_fraction"] = pick.choice([0.01, 0.3, 0.9])
        unfit |= spoil(pick, root / name / "train")
        made.append(MixtureSource(name=name, **settings) if name else settings)
        sources[name] = data
    data_config = DataConfig(mixture=tuple(made)) if names != [""] else DataConfig(**made[0])
    objective = {"text": "causal", "label": "classification", "pair": "seq2seq"}[kind]
    tokenizer = TokenizerConfig(kind="bytes")
    return Corpus(
        Config(data=data_config, clean=clean, tokenizer=tokenizer, task=TaskConfig(objective=objective)), sources, unfit
    )


class Expected(NamedTuple):
    """What an independent count finds: the texts of each place, and the number of dropped documents by reason."""

    kept: dict[tuple[str, str], list[tuple[str, ...]]]
    dropped: collections.Counter[str]
    unfit: bool


def expect(corpus: Corpus) -> Expected:
    config, clean = corpus.config, corpus.config.clean
    exempt_kind = config.task.objective != "causal"
    kept: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    dropped: collections.Counter[str] = collections.Counter()
    unfit, held_out = corpus.unfit, set()
    train_labels = {str(doc.label) for data in corpus.sources.values() for doc in data["train"] if has_label(doc)}
    for split in ("valid", "train"):
        for name, data in corpus.sources.items():
            if split not in data:
                continue
            own, place = set(), kept.setdefault((name, split), [])
            exempt = exempt_kind and split == "valid"
            for doc in data[split]:
                if doc.bad and clean.bad_utf8 != "replace":
                    unfit |= clean.bad_utf8 == "strict"
                    dropped["bad_utf8"] += 1
                    continue
                texts = tuple(cleaned(text + "\ufffd" * doc.bad) for text in doc.texts)
                if config.task.objective == "classification":
                    if not has_label(doc):
                        dropped["no_label"] += 1
                        continue
                    unfit |= str(doc.label) not in train_labels
                if not exempt and len(texts[0]) < clean.min_chars:
                    dropped["too_short"] += 1
                    continue
                if not exempt and clean.max_chars and len(texts[0]) > clean.max_chars:
                    dropped["too_long"] += 1
                    continue
                key = (texts, str(doc.label))
                seen = held_out | own if split == "train" else held_out
                if clean.deduplicate == "exact" and key in seen and not exempt:
                    dropped["duplicate"] += 1
                    continue
                (held_out if split == "valid" else own).add(key)
                place.append(texts)
    return Expected(kept, dropped, unfit)


def has_label(doc: Doc) -> bool:
    return doc.label is not None and bool(str(doc.label).strip())


def read_all(directory: pathlib.Path, manifest: dict) -> dict[str, list[tuple[str, ...]]]:
    tokenizer, found = tokenizers.Bytes(), {}
    for name, split in manifest["splits"].items():
        shards = Shards.open(epath.Path(directory) / name, verify=True)
        ids = shards.take(np.arange(shards.num_tokens))
        assert len(ids) == split["tokens"]
        texts = [tokenizer.decode(part) for part in np.split(ids, shards.starts[1:-1])]
        found[name] = [tuple(texts[i : i + shards.fields]) for i in range(0, len(texts), shards.fields)]
    return found


def check(seed: int, root: pathlib.Path) -> str:
    corpus = random_corpus(seed, root / "raw")
    expected = expect(corpus)
    fraction = any(source.valid_fraction for source in corpus.config.data.mixture or (corpus.config.data,))
    empty = [place for place, texts in expected.kept.items() if not texts]
    try:
        summary = prepare(corpus.config, epath.Path(root / "out"), lambda line: None, workers=1)
    except LslmError as error:
        few = fraction and any(len(set(texts)) < 2 for texts in expected.kept.values())
        assert expected.unfit or empty or few or len(expected.kept) < len(corpus.sources), f"{seed}: {error}"
        assert "\n" not in str(error)
        return "rejected"
    assert not expected.unfit, f"{seed}: not rejected"
    assert +collections.Counter(summary["dropped"]) == +expected.dropped, seed
    read = sum(len(docs) for data in corpus.sources.values() for docs in data.values())
    assert summary["documents"] + sum(summary["dropped"].values()) == read, seed
    manifest = json.loads((root / "out" / "manifest.json").read_text())
    found = read_all(root / "out", manifest)
    merged = lambda places: sorted(texts for place in places for texts in place)
    for name in corpus.sources:
        own = [texts for place, texts in found.items() if place.split("/")[0] == name or not name]
        assert merged(own) == merged(texts for (of, _), texts in expected.kept.items() if of == name), seed
    tokens = sum(len(text.encode()) for place in expected.kept.values() for texts in place for text in texts)
    assert summary["tokens"] == tokens, seed
    return "prepared"


def run(seeds: range, root: pathlib.Path) -> collections.Counter[str]:
    return collections.Counter(check(seed, root / str(seed)) for seed in seeds)


def test_every_document_of_a_random_corpus_is_used_or_counted(tmp_path):
    outcomes = run(range(25), tmp_path)
    assert outcomes["prepared"] >= 8 and outcomes["rejected"] >= 3, outcomes


@pytest.mark.exhaustive
def test_every_document_of_500_random_corpora_is_used_or_counted(tmp_path):
    outcomes = run(range(1000, 1500), tmp_path)
    assert outcomes["prepared"] >= 150 and outcomes["rejected"] >= 60, outcomes


@pytest.mark.parametrize("seed", range(6))
def test_the_end_of_each_of_a_few_files_is_held_out_without_losing_a_character(tmp_path, seed):
    pick, total = random.Random(seed), 0
    for number in range(pick.randrange(1, 8)):
        text = random_text(pick, newlines=True) * pick.choice([1, 20])
        total += len(cleaned(text).encode())
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    data = DataConfig(files=(str(tmp_path / "*.txt"),), valid_fraction=0.1)
    clean = CleanConfig(deduplicate="none", min_chars=0)
    config = Config(data=data, clean=clean, tokenizer=TokenizerConfig(kind="bytes"))
    try:
        assert prepare(config, epath.Path(tmp_path / "out"), lambda line: None, workers=1)["tokens"] == total
    except LslmError as error:  # texts of a character or two
        assert total < 50 and "\n" not in str(error)
