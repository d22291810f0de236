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
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.bytes import Bytes
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
WORDS = ["ab", "\u00e9u\u0308", "\u65e5\u672c", "\U0001f600", "B-52", "x,y", '"q"', "c\x07d"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OBJECTIVES = {"text": "causal", "chat": "causal", "label": "classification", "pair": "seq2seq"}
OBJECTIVES |= {"tags": "tagging", "qa": "qa"}


class Doc(NamedTuple):
    """An example as it was generated: its texts, its label, and whether its bytes are bad.

    The texts are words with their tags as label; question and context with answers as label; or turns of a chat.
    """

    texts: tuple[str, ...]
    label: object = None
    bad: bool = False


class Corpus(NamedTuple):
    """A corpus, what is expected of it, and whether something makes it unfit."""

    config: Config
    kind: str
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
        if kind in ("tags", "qa", "chat"):
            docs.append({"tags": random_tags, "qa": random_question, "chat": random_chat}[kind](pick, labels))
            continue
        texts = tuple(random_text(pick, newlines) for _ in range(2 if kind == "pair" else 1))
        label = pick.choice(labels) if kind == "label" else None
        if kind == "label" and pick.random() < 0.15:
            label = pick.choice([None, "", " "]) if style in ("jsonl", "json") else ""
        docs.append(Doc(texts, label, pick.random() < 0.03 and kind == "text" and style in ("file", "line", "jsonl")))
    return docs


def random_tags(pick: random.Random, labels: list) -> Doc:
    words = tuple(pick.choices(WORDS, k=pick.randrange(1, 9)))
    tags = pick.choices(labels, k=len(words))
    if pick.random() < 0.1:
        tags[pick.randrange(len(tags))] = None
    return Doc(words, tags[1:] if pick.random() < 0.03 else tags)


def random_question(pick: random.Random, _labels: list) -> Doc:
    question, context = random_text(pick, True), random_text(pick, True)
    start = pick.randrange(len(context) + 1)
    answer = context[start : start + pick.randrange(1, 9)]
    answers = [(answer, start + (pick.random() < 0.2))] * (pick.random() < 0.8)
    return Doc((question, context), {"text": [text for text, _ in answers], "answer_start": [at for _, at in answers]})


def random_chat(pick: random.Random, _labels: list) -> Doc:
    texts = tuple(random_text(pick, True) for _ in range(pick.choice([2, 2, 3])))
    return Doc(texts, bad=pick.random() < 0.03)  # of which nobody answers


def roles_of(doc: Doc) -> list[str]:
    """Roles of the turns of a chat; of a bad one all are the user's."""
    roles = ["system", "user", "assistant"][-len(doc.texts) :]
    return ["user"] * len(roles) if doc.bad else roles


def record_of(doc: Doc, kind: str) -> dict:
    match kind:
        case "tags":
            return {"text": list(doc.texts), "label": doc.label}
        case "qa":
            return {"id": "q", "question": doc.texts[0], "context": doc.texts[1], "answers": doc.label}
    turns = zip(roles_of(doc), doc.texts, strict=True)
    return {"text": [{"role": role, "content": text} for role, text in turns]}


def records_of(docs: list[Doc], kind: str) -> list[dict]:
    if kind in ("tags", "qa", "chat"):
        return [record_of(doc, kind) for doc in docs]
    names = ("source", "target") if kind == "pair" else ("text",)
    made = [dict(zip(names, doc.texts, strict=True)) for doc in docs]
    return [record | ({"label": doc.label} if kind == "label" else {}) for record, doc in zip(made, docs, strict=True)]


def content_of(pick: random.Random, docs: list[Doc], kind: str, style: str) -> bytes:
    records = records_of(docs, kind)
    spoil = lambda text, doc: text + b"\xff" if doc.bad else text
    docs = [doc._replace(bad=False) for doc in docs] if kind == "chat" else docs
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
    if kind in ("tags", "qa", "chat"):
        return ["jsonl", "json", "parquet"]
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
    kind = pick.choice(["text", "text", "label", "pair", "tags", "qa", "chat"])
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
        if kind == "chat":
            template = root / "template.jinja"
            template.write_text(TEMPLATE)
        made.append(MixtureSource(name=name, **settings) if name else settings)
        sources[name] = data
    chat = {"chat_template": str(root / "template.jinja")} if kind == "chat" else {}
    data_config = DataConfig(mixture=tuple(made)) if names != [""] else DataConfig(**made[0], **chat)
    objective = OBJECTIVES[kind]
    tokenizer = TokenizerConfig(kind="bytes")
    config = Config(data=data_config, clean=clean, tokenizer=tokenizer, task=TaskConfig(objective=objective))
    return Corpus(config, kind, sources, unfit)


class Expected(NamedTuple):
    """What an independent count finds: the texts of each place, and the number of dropped documents by reason."""

    kept: dict[tuple[str, str], list[tuple[str, ...]]]
    dropped: collections.Counter[str]
    unfit: bool


def expect(corpus: Corpus) -> Expected:
    clean, kind = corpus.config.clean, corpus.kind
    kept: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    dropped: collections.Counter[str] = collections.Counter()
    unfit, held_out = corpus.unfit, set()
    known = {tag for data in corpus.sources.values() for doc in data["train"] for tag in tags_of(doc, kind)}
    for split in ("valid", "train"):
        for name, data in corpus.sources.items():
            if split not in data:
                continue
            own, place = set(), kept.setdefault((name, split), [])
            exempt = kind not in ("text", "chat") and split == "valid"
            for doc in data[split]:
                if why := badness(doc, kind, clean):
                    unfit |= getattr(clean, {"bad_utf8": "bad_utf8", "bad_record": "bad_records"}[why]) == "strict"
                    dropped[why] += 1
                    continue
                texts = stored(doc, kind)
                unlabelled = kind in ("label", "tags") and not has_label(doc)
                unfit |= not unlabelled and any(tag not in known for tag in tags_of(doc, kind))
                why = "no_label" if unlabelled else None if exempt else unsuitable(doc, texts, kind, clean)
                if why:
                    dropped[why] += 1
                    continue
                key = (texts, str(doc.label))
                seen = held_out | own if split == "train" else held_out
                if clean.deduplicate == "exact" and key in seen and not exempt:
                    dropped["duplicate"] += 1
                    continue
                (held_out if split == "valid" else own).add(key)
                place.append(texts)
    return Expected(kept, dropped, unfit)


def stored(doc: Doc, kind: str) -> tuple[str, ...]:
    """The texts of an example as shards hold them."""
    texts = tuple(cleaned(text + "\ufffd" * (doc.bad and kind == "text")) for text in doc.texts)
    match kind:
        case "tags":
            return (" ".join(texts),)
        case "qa":
            return doc.texts
        case "chat":
            return ("".join(f"<{role}>{text}" for role, text in zip(roles_of(doc), texts, strict=True)),)
    return texts


def badness(doc: Doc, kind: str, clean: CleanConfig) -> str | None:
    """The reason for which a document cannot be an example."""
    if kind == "text" and doc.bad and clean.bad_utf8 != "replace":
        return "bad_utf8"
    if (kind == "chat" and doc.bad) or (kind == "tags" and len(doc.texts) != len(doc.label)):
        return "bad_record"
    return None


def unsuitable(doc: Doc, texts: tuple[str, ...], kind: str, clean: CleanConfig) -> str | None:
    """The reason for which an example is not trained on."""
    if kind == "qa":
        answers = list(zip(doc.label["text"], doc.label["answer_start"], strict=True))
        placed = [text for text, at in answers if text and doc.texts[1][at : at + len(text)] == text]
        return "misplaced_answer" if answers and not placed else None
    if kind == "chat" and not cleaned(doc.texts[-1]).strip():
        return "no_answer"
    length = len("\n".join(map(cleaned, doc.texts))) if kind == "chat" else len(texts[0])
    if length < clean.min_chars:
        return "too_short"
    return "too_long" if clean.max_chars and length > clean.max_chars else None


def tags_of(doc: Doc, kind: str) -> list[str]:
    """The labels of an example that are not missing."""
    found = doc.label if kind == "tags" else [doc.label] if kind == "label" else []
    return [str(label) for label in found if label is not None and str(label).strip()]


def has_label(doc: Doc) -> bool:
    labels = doc.label if isinstance(doc.label, list) else [doc.label]
    return all(label is not None and str(label).strip() for label in labels)


def read_all(directory: pathlib.Path, manifest: dict, kind: str) -> dict[str, list[tuple[str, ...]]]:
    tokenizer, found = Bytes(), {}
    for name, split in manifest["splits"].items():
        shards = Shards.open(epath.Path(directory) / name, verify=True)
        ids = shards.take(np.arange(shards.num_tokens))
        assert len(ids) == split["tokens"]
        texts = [tokenizer.decode(part) for part in np.split(ids, shards.starts[1:-1])]
        count = 1 if kind in ("tags", "chat") else shards.fields  # the second field holds tags, or a loss mask
        found[name] = [tuple(texts[i : i + count]) for i in range(0, len(texts), shards.fields)]
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
    found = read_all(root / "out", manifest, corpus.kind)
    merged = lambda places: sorted(texts for place in places for texts in place)
    for name in corpus.sources:
        own = [texts for place, texts in found.items() if place.split("/")[0] == name or not name]
        assert merged(own) == merged(texts for (of, _), texts in expected.kept.items() if of == name), seed
    chats = corpus.kind == "chat"
    tokens = sum(len(text.encode()) for place in expected.kept.values() for texts in place for text in texts)
    tokens += sum(text.count("<") for place in expected.kept.values() for (text,) in place) if chats else 0  # eos
    assert summary["tokens"] == tokens * (2 if corpus.kind in ("tags", "chat") else 1), seed
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
