"""Pairs, labels, tags and questions, from files to shards: none held out is lost, none is trained on."""

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, MixtureSource, TaskConfig, TokenizerConfig
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.readers import sources
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, DataError, InputMissing

BYTES = TokenizerConfig(kind="bytes")
ENGLISH = [f"the {i}th sentence, ever so long" for i in range(40)]
GERMAN = [f"der {i}. Satz, \u00fcberaus lang" for i in range(40)]


def run(config: Config, directory: pathlib.Path, **settings) -> dict:
    return prepare(config, epath.Path(directory), lambda line: None, **{"workers": 1} | settings)


def write(path: pathlib.Path, *lines) -> str:
    """A file of these lines, JSON where they are not text; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(directory: pathlib.Path, split: str = "train") -> list[tuple[str, ...]]:
    """The fields of each example of a prepared split, as text."""
    shards = Shards.open(epath.Path(directory) / split, verify=True)
    manifest = json.loads((directory / "manifest.json").read_text())
    tokenizer = load_tokenizer(epath.Path(directory) / manifest["tokenizer"]["file"])
    ids = shards.take(np.arange(shards.num_tokens))
    texts = [tokenizer.decode(part) for part in np.split(ids, shards.starts[1:-1])]
    return [tuple(texts[i : i + shards.fields]) for i in range(0, len(texts), shards.fields)]


def kept(directory: pathlib.Path, split: str = "valid") -> list[dict]:
    return list(Shards.open(epath.Path(directory) / split).examples())


def content(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def seq2seq(**data) -> Config:
    return Config(data=DataConfig(**{"example": "pair"} | data), task=TaskConfig(objective="seq2seq"), tokenizer=BYTES)


def classes(**data) -> Config:
    task = TaskConfig(objective="classification")
    return Config(data=DataConfig(**{"example": "label"} | data), task=task, tokenizer=BYTES)


# Pairs.


@pytest.fixture
def pairs(tmp_path) -> Config:
    """Two plain files a split; a held-out pair is trained on too, one is empty, and one comes twice."""
    for name, side in [("en", ENGLISH), ("de", GERMAN)]:
        write(tmp_path / f"raw/train.{name}.gz", *side[:30], side[3], side[31])
        write(tmp_path / f"raw/valid.{name}", *side[30:35], "", side[30])
        write(tmp_path / f"raw/test.{name}", *side[35:])
    patterns = {key: f"{tmp_path}/raw/{name}" for key, name in [("files", "t*n"), ("valid_files", "valid")]}
    names = {key: tuple(f"{pattern}.{language}" for language in ("en", "de")) for key, pattern in patterns.items()}
    names["files"] = tuple(f"{tmp_path}/raw/*.{language}*" for language in ("en", "de"))
    names["test_files"] = tuple(f"{tmp_path}/raw/test.{language}" for language in ("en", "de"))
    return seq2seq(**names, prefix="translate: ")


def test_pairs_are_aligned_line_by_line_and_held_out_ones_kept_whole(pairs, tmp_path):
    summary = run(pairs, tmp_path / "out")
    both = list(zip([f"translate: {text}" for text in ENGLISH], GERMAN, strict=True))
    assert read(tmp_path / "out") == both[:30]
    assert read(tmp_path / "out", "valid") == [*both[30:35], ("translate: ", ""), both[30]]
    assert read(tmp_path / "out", "test") == both[35:]
    assert kept(tmp_path / "out")[:6] == [
        *({"source": ENGLISH[i], "target": GERMAN[i]} for i in range(30, 35)),
        {"source": "", "target": ""},
    ]
    assert summary["dropped"] == {"duplicate": 2}
    assert summary["splits"]["test"]["bytes"] == sum(len(text.encode()) for text in GERMAN[35:])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == []
    with pytest.raises(InputMissing, match="keeps no examples"):
        kept(tmp_path / "out", "train")


def test_processes_and_interruptions_change_nothing(pairs, tmp_path, monkeypatch):
    pairs = dataclasses.replace(pairs, data=dataclasses.replace(pairs.data, shard_tokens=300))
    run(pairs, tmp_path / "one")
    monkeypatch.setattr("lslm_jax.data.prepare.worker_pool._BLOCK_DOCUMENTS", 3)
    run(pairs, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        if (tmp_path / "killed" / "train" / "tokens-00002.bin").exists():
            raise Killed

    monkeypatch.setattr("lslm_jax.data.prepare.prepare._LOG_SECONDS", 0.0)
    with pytest.raises(Killed):
        prepare(pairs, epath.Path(tmp_path / "killed"), kill, workers=1)
    run(pairs, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("patterns", "kind", "message"),
    [
        (("a.en", "b.de"), DataError, "{raw}/a.en has 3 lines, {raw}/b.de has 5: pairs are aligned line by line"),
        (("b.de", "a.en"), DataError, "{raw}/b.de has 5 lines, {raw}/a.en has 3: pairs are aligned line by line"),
        (("*.en", "b.de"), DataError, "data.files: {raw}/*.en matches 2 files, {raw}/b.de matches 1: no pairs"),
        (
            ("a.en",),
            ConfigError,
            "data.files: {raw}/a.en has no partner: pairs in plain text alternate, source then target",
        ),
        (("a.jsonl",), ConfigError, "data.target_key is empty: name the field that holds the target of each pair"),
    ],
)
def test_files_that_make_no_pairs_are_told_in_one_line(tmp_path, patterns, kind, message):
    raw = tmp_path / "raw"
    write(raw / "a.en", *ENGLISH[:3])
    write(raw / "b.en", *ENGLISH[:5])
    write(raw / "b.de", *GERMAN[:5])
    write(raw / "a.jsonl", {"en": "a", "de": "b"})
    with pytest.raises(kind) as error:
        run(seq2seq(files=tuple(f"{raw}/{pattern}" for pattern in patterns)), tmp_path / "out")
    assert str(error.value) == message.format(raw=raw)


def test_cleaning_is_of_both_sides_and_lengths_of_the_source(tmp_path):
    rows = [
        {"t": {"en": source, "de": target}} for source, target in [("a  b", "c\u0301 "), ("x", "y" * 99), ("", "z")]
    ]
    config = seq2seq(files=(write(tmp_path / "a.jsonl", *rows),), text_key="t/en", target_key="t/de")
    clean = CleanConfig(whitespace="collapse", max_chars=3)
    assert run(dataclasses.replace(config, clean=clean), tmp_path / "out")["dropped"] == {"too_short": 1}
    assert read(tmp_path / "out") == [("a b", "\u0107"), ("x", "y" * 99)]


# Labels.


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_labels_of_every_format_have_the_same_numbers(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    labels = [1, 0, 10, 9, 1]
    rows = [{"sentence": text, "label": label} for text, label in zip(ENGLISH, labels, strict=False)]
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        write(path, *rows)
    else:
        separator = "\t" if suffix == "tsv" else ","
        quote = '"' if suffix == "csv" else ""
        write(
            path, f"label{separator}sentence", *(f"{r['label']}{separator}{quote}{r['sentence']}{quote}" for r in rows)
        )
    run(classes(files=(str(path),), text_key="sentence"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == ["0", "1", "9", "10"]
    assert read(tmp_path / "out") == [(text,) for text in ENGLISH[:5]]
    assert Shards.open(tmp_path / "out" / "train").numbers.tolist() == [[1], [0], [3], [2], [1]]


def test_given_labels_have_their_order_and_go_by_name_or_number(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(ENGLISH, ["bad", 1, "0", "good"], strict=False)]
    config = classes(
        files=(write(tmp_path / "a.jsonl", *rows),),
        valid_files=(write(tmp_path / "b.jsonl", rows[1], {"text": "", "label": 0}, rows[1]),),
        labels=("good", "bad"),
    )
    summary = run(config, tmp_path / "out")
    assert summary["dropped"] == {"duplicate": 1}
    assert Shards.open(tmp_path / "out" / "train").numbers.tolist() == [[1], [0], [0]]
    assert kept(tmp_path / "out") == [
        {"text": ENGLISH[1], "label": "bad"},
        {"text": "", "label": "good"},
        {"text": ENGLISH[1], "label": "bad"},
    ]
    for objective in ("seq2seq", "regression"):
        other = dataclasses.replace(config, task=TaskConfig(objective=objective))
        with pytest.raises(ConfigError, match=rf'task.objective="classification", not "{objective}"'):
            run(other, tmp_path / "out")


def test_an_unknown_label_is_told_with_its_place_and_the_known_ones(tmp_path):
    train = write(tmp_path / "a.jsonl", *({"text": text, "label": "abc"[i % 3]} for i, text in enumerate(ENGLISH)))
    valid = write(tmp_path / "b.jsonl", {"text": "x", "label": "a"}, {"text": "y", "label": "d"})
    with pytest.raises(DataError) as error:
        run(classes(files=(train,), valid_files=(valid,)), tmp_path / "out")
    assert (
        str(error.value) == f"{valid}:2: unknown label 'd'; known are: a, b, c; correct it, or name all by data.labels"
    )


def test_two_texts_and_a_number(tmp_path):
    rows = [
        {"text": text, "other": other, "label": i / 8}
        for i, (text, other) in enumerate(zip(ENGLISH, GERMAN, strict=True))
    ]
    files = {"files": (write(tmp_path / "a.jsonl", *rows),), "target_key": "other", "valid_fraction": 0.2}
    config = dataclasses.replace(classes(**files), task=TaskConfig(objective="regression"))
    run(config, tmp_path / "out")
    shards = Shards.open(tmp_path / "out" / "train")
    by_text = {(row["text"], row["other"]): row["label"] for row in rows}
    assert shards.numbers[:, 0].tolist() == [by_text[fields] for fields in read(tmp_path / "out")]
    assert len(read(tmp_path / "out")) + len(kept(tmp_path / "out")) == 40
    for example in kept(tmp_path / "out"):
        assert by_text[example["text"], example["target"]] == example["label"]


def test_a_held_out_share_of_labelled_texts_keeps_its_duplicates_apart_from_training(tmp_path):
    rows = [{"text": ENGLISH[i % 20], "label": i % 2} for i in range(60)]
    run(classes(files=(write(tmp_path / "a.jsonl", *rows),), valid_fraction=0.4), tmp_path / "out")
    train, valid = read(tmp_path / "out"), read(tmp_path / "out", "valid")
    assert not set(train) & set(valid) and len(set(train)) == len(train) and len(valid) == 3 * len(set(valid))


# Tags and questions.


def test_words_and_their_tags(tmp_path):
    rows = [{"words": ["Ann", "of", "New York"], "tags": ["PER", "O", "LOC"]}, {"words": ["Bo", "!"], "tags": [2, 1]}]
    empty = {"words": [], "tags": []}
    files = {
        "files": (write(tmp_path / "a.jsonl", *rows),),
        "valid_files": (write(tmp_path / "b.jsonl", rows[1], empty),),
    }
    data = DataConfig(example="tags", text_key="words", label_key="tags", labels=("LOC", "O", "PER"), **files)
    run(Config(data=data, task=TaskConfig(objective="tagging"), tokenizer=BYTES), tmp_path / "out")
    assert [text for text, _ in read(tmp_path / "out")] == ["Ann of New York"]
    shards = Shards.open(tmp_path / "out" / "train")
    tags = shards.take(np.arange(shards.starts[1], shards.starts[2]))
    assert tags.tolist() == [3, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert kept(tmp_path / "out") == [{"words": ["Bo", "!"], "tags": ["PER", "O"]}, empty]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == ["LOC", "O", "PER"]


def test_more_tags_than_ids_are_refused(tmp_path):
    tags = [f"t{i}" for i in range(259)]
    data = DataConfig(
        example="tags", text_key="w", label_key="t", files=(write(tmp_path / "a.jsonl", {"w": ["a"] * 259, "t": tags}),)
    )
    with pytest.raises(ConfigError, match=r"^259 tags are too many for a vocabulary of 259$"):
        run(Config(data=data, task=TaskConfig(objective="tagging"), tokenizer=BYTES), tmp_path / "out")


def squad(*questions: tuple[str, str, list[tuple[str, int]]], **settings) -> dict:
    """A SQuAD file of one question each on its own context; settings go to each question."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"id{i}",
                    "question": question,
                    "answers": [{"text": text, "answer_start": start} for text, start in answers],
                    **settings,
                }
            ],
        }
        for i, (question, context, answers) in enumerate(questions)
    ]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def questions(**data) -> Config:
    return Config(data=DataConfig(example="qa", **data), task=TaskConfig(objective="qa"), tokenizer=BYTES)


SQUAD = squad(
    ("Who?", "\u00c9mile  saw\x07 it", [("\u00c9mile", 0)]),
    ("What?", "he saw it", [("it", 7), ("saw it", 3)]),
    ("Why?", "he saw it", []),
    ("Where?", "he saw it", [("he", 5)]),
)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.parquet"])
def test_questions_are_read_from_squads_files_and_from_flat_records(tmp_path, name):
    flat = [
        {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
        | {"answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}}
        for paragraph in SQUAD["data"][0]["paragraphs"]
        for question in paragraph["qas"]
    ]
    path = tmp_path / name
    if name.endswith("parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(flat), path)
    else:
        write(path, *(flat if name.endswith("jsonl") else [SQUAD]))
    summary = run(questions(files=(str(path),)), tmp_path / "out")
    assert summary["dropped"] == {"misplaced_answer": 1}
    assert read(tmp_path / "out")[0] == ("Who?", "\u00c9mile  saw\x07 it")
    assert Shards.open(tmp_path / "out" / "train").numbers.tolist() == [[0, 5], [7, 8], [-1, -1]]


def test_held_out_questions_are_kept_with_all_their_answers(tmp_path):
    impossible = squad(("How?", "he saw it", [("it", 7)]), is_impossible=True, plausible_answers=[])
    files = {
        "files": (write(tmp_path / "a.jsonl", {"question": "q", "context": "c", "answers": []}),),
        "valid_files": (write(tmp_path / "b.json", SQUAD),),
        "test_files": (write(tmp_path / "c.json", impossible),),
    }
    run(questions(**files), tmp_path / "out")
    found = kept(tmp_path / "out")
    assert [len(example["answers"]) for example in found] == [1, 2, 0, 1]
    assert found[1] == {
        "id": "id1",
        "question": "What?",
        "context": "he saw it",
        "answers": [{"text": "it", "start": 7}, {"text": "saw it", "start": 3}],
    }
    assert Shards.open(tmp_path / "out" / "valid").numbers.tolist() == [[0, 5], [7, 8], [-1, -1], [-1, -1]]
    assert kept(tmp_path / "out", "test")[0]["answers"] == []


def test_a_question_that_is_not_as_squad_has_it_is_skipped_on_request(tmp_path):
    content = squad(("Who?", "It was he.", [("he", 7)]), ("What?", "It was he.", [("It", 0)]))
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = float("inf")
    config = questions(files=(write(tmp_path / "a.json", json.dumps(content)),))
    skipping = dataclasses.replace(config, clean=CleanConfig(bad_records="skip"))
    assert run(skipping, tmp_path / "out")["dropped"] == {"bad_record": 1}
    assert read(tmp_path / "out") == [("What?", "It was he.")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", ": not JSON: Expecting property name enclosed in double quotes: "),
        (
            "a.json",
            '{"data": [[]]}',
            ": not as SQuAD has it: a value of the wrong kind (data, paragraphs, context, qas, id, ",
        ),
        ("a.json", '{"data": [{"paragraphs": [{"context": "c"}]}]}', ": not as SQuAD has it: no 'qas' (data, "),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q"}]}]}]}',
            ": question x: not as SQuAD has it: no 'answers' (",
        ),
        ("a.jsonl", '{"question": "q", "answers": []}', ":1: no field 'context'; it has: question, answers"),
        ("a.jsonl", "[]", ":1: a JSON list, not an object with the fields 'question', 'context', 'answers'"),
        (
            "a.jsonl",
            '{"question": "q", "context": "c", "answers": "x"}',
            ":1: field 'answers' is \"x\", not answers as",
        ),
        (
            "a.jsonl",
            '{"question": "q", "context": "c", "answers": [{"text": "a", "answer_start": 1e999}]}',
            ":1: answers want text and answer_start, got",
        ),
        ("a.tsv", "question\tcontext\tanswers\n", ": a table of plain columns cannot hold 'id': use JSONL or Parquet"),
        ("a.txt", "text", ": data.example=qa is read from .jsonl, .ndjson, .json, .tsv, .tab, .csv, "),
    ],
)
def test_a_file_without_questions_is_told_in_one_line(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        list(sources.documents(questions(files=(path,)).data, "train"))
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


# All together.


def test_sources_of_several_kinds_make_one_text_to_text_mixture(tmp_path):
    pair = write(tmp_path / "a.jsonl", *({"en": a, "de": b} for a, b in zip(ENGLISH, GERMAN, strict=True)))
    label = write(tmp_path / "b.tsv", "text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(ENGLISH)))
    other = write(tmp_path / "c.jsonl", *({"text": text, "label": "ja"} for text in GERMAN))
    mixture = (
        MixtureSource(name="wmt", example="pair", files=(pair,), text_key="en", target_key="de", prefix="translate: "),
        MixtureSource(name="sst", example="label", files=(label,), labels=("bad", "good"), valid_fraction=0.3),
        MixtureSource(name="cola", example="label", files=(other,)),
        MixtureSource(name="squad", example="qa", files=(write(tmp_path / "d.json", SQUAD),)),
    )
    config = Config(
        data=DataConfig(mixture=mixture),
        task=TaskConfig(objective="seq2seq"),
        tokenizer=TokenizerConfig(vocab_size=350),
    )
    summary = run(config, tmp_path / "out")
    assert set(summary["splits"]) == {"wmt/train", "sst/train", "sst/valid", "cola/train", "squad/train"}
    assert read(tmp_path / "out", "wmt/train")[0] == (f"translate: {ENGLISH[0]}", GERMAN[0])
    assert set(read(tmp_path / "out", "sst/train") + read(tmp_path / "out", "sst/valid")) == {
        (text, ("bad", "good")[i % 2]) for i, text in enumerate(ENGLISH)
    }
    assert read(tmp_path / "out", "squad/train")[0] == ("question: Who? context: \u00c9mile  saw\x07 it", "\u00c9mile")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == ["bad", "good", "ja"]
    assert run(config, tmp_path / "out")["skipped"]


def test_the_sources_of_a_classifier_share_their_labels(tmp_path):
    files = [write(tmp_path / f"{i}.tsv", "text\tlabel", f"a\t{i}", f"b\t{i + 1}") for i in range(2)]
    mixture = tuple(
        MixtureSource(name=name, example="label", files=(file,)) for name, file in zip("ab", files, strict=True)
    )
    config = Config(data=DataConfig(mixture=mixture), task=TaskConfig(objective="classification"), tokenizer=BYTES)
    run(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == ["0", "1", "2"]
    assert Shards.open(tmp_path / "out" / "b" / "train").numbers.tolist() == [[1], [2]]


def test_a_vocabulary_is_trained_on_both_texts_of_an_example(tmp_path):
    rows = [{"en": text, "de": text[::-1].upper()} for text in ENGLISH]
    config = seq2seq(files=(write(tmp_path / "a.jsonl", *rows),), text_key="en", target_key="de")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=350))
    run(config, tmp_path / "out")
    tokenizer = load_tokenizer(epath.Path(tmp_path / "out" / "tokenizer.model"))
    assert {"sentence", "ECNETNES"} <= {tokenizer.piece(i).strip("\u2581") for i in range(350)}


def test_near_duplicates_are_told_among_pairs_but_not_among_questions_on_one_context(tmp_path):
    pytest.importorskip("datasketch")
    context = " ".join(f"word{i}" for i in range(100))
    pairs = [{"text": context, "target": f"{context} {end}"} for end in "abc"]
    asked = [{"question": f"which {i}", "context": context, "answers": []} for i in range(3)]
    near = CleanConfig(deduplicate="near")
    config = dataclasses.replace(seq2seq(files=(write(tmp_path / "a.jsonl", *pairs),), target_key="target"), clean=near)
    assert run(config, tmp_path / "pairs")["dropped"] == {"near_duplicate": 2}
    config = dataclasses.replace(questions(files=(write(tmp_path / "b.jsonl", *asked, asked[0]),)), clean=near)
    assert run(config, tmp_path / "questions")["dropped"] == {"duplicate": 1}


def test_undecodable_examples_are_skipped_in_training_and_mended_where_held_out(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.en").write_bytes(b"fine " + name.encode() + b"\nbad \xff\n")
        (tmp_path / f"{name}.de").write_bytes(b"gut\nschlecht\n")
    files = {
        f"{key}files": tuple(f"{tmp_path}/{name}.{side}" for side in ("en", "de")) for key, name in (("", "train"),)
    }
    files["valid_files"] = (f"{tmp_path}/valid.en", f"{tmp_path}/valid.de")
    config = dataclasses.replace(seq2seq(**files), clean=CleanConfig(bad_utf8="skip"))
    assert run(config, tmp_path / "out")["dropped"] == {"bad_utf8": 1}
    assert read(tmp_path / "out", "valid") == [("fine valid", "gut"), ("bad \ufffd", "schlecht")]
    strict = dataclasses.replace(config, clean=CleanConfig())
    with pytest.raises(DataError, match=rf"^{tmp_path}/valid.en:2: byte 0xff at offset 4 is not UTF-8"):
        run(strict, tmp_path / "strict")


def test_plain_text_has_a_test_split_too_and_is_prepared_as_before_there_were_others(tmp_path):
    names = {name: write(tmp_path / f"{name}.txt", *lines) for name, lines in [("a", "abcd"), ("b", "be"), ("c", "cb")]}
    data = DataConfig(files=(names["a"],), document="line", valid_files=(names["b"],))
    run(Config(data=data, tokenizer=BYTES), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not [key for key in manifest["settings"] if "example" in key or "label" in key or "test" in key]
    for key in ("labels", "source_labels"):
        del manifest[key]
    for key in ("mask_id", "sentinel_ids"):
        del manifest["tokenizer"][key]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    for objective in ("causal", "masked"):
        config = Config(data=data, tokenizer=BYTES, task=TaskConfig(objective=objective))
        assert run(config, tmp_path / "out")["skipped"]
    config = Config(data=dataclasses.replace(data, test_files=(names["c"],)), tokenizer=BYTES)
    with pytest.raises(ConfigError, match=r"was prepared with data.test_files=null, not \["):
        run(config, tmp_path / "out")
    assert run(config, tmp_path / "new")["dropped"] == {"duplicate": 3}
    found = {split: "".join(text for (text,) in read(tmp_path / "new", split)) for split in ("train", "valid", "test")}
    assert found == {"train": "ad", "valid": "e", "test": "cb"}
