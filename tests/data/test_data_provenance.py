"""What was prepared from what: edited inputs, altered records, several processes in one directory, held-out shares."""

import dataclasses
import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, MixtureSource, TaskConfig, TokenizerConfig
from lslm_jax.data import label_names
from lslm_jax.data.prepare import data_manifest, directory_lock
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.errors import ConfigError, DataError, InputMissing

BYTES = TokenizerConfig(kind="bytes")


def run(config: Config, directory: pathlib.Path, log=lambda line: None) -> dict:
    return prepare(config, epath.Path(directory), log, workers=1)


def write(path: pathlib.Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def plain(*names: str, clean: CleanConfig | None = None, **data) -> Config:
    return Config(data=DataConfig(files=names, **data), tokenizer=BYTES, clean=clean or CleanConfig())


def classes(*names: str, **data) -> Config:
    task = TaskConfig(objective="classification")
    return Config(data=DataConfig(example="label", files=names, **data), task=task, tokenizer=BYTES)


# Edits.


def test_labels_flipped_in_place_are_noticed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,1\nbad,0\n")
    run(classes(str(path)), tmp_path / "out")
    path.write_text("text,label\ngood,0\nbad,1\n")
    with pytest.raises(DataError, match=rf"the input has changed .*: {path} has the same size but another content; "):
        run(classes(str(path)), tmp_path / "out")
    [record] = [data_manifest.read(epath.Path(tmp_path / "out" / "manifest.json"))]
    assert data_manifest.changed_inputs(record) == [str(path)]


def test_text_altered_between_a_kill_and_the_continuation_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    config = plain(write(path, *(f"text {i:03d}" for i in range(100))), shard_tokens=100)

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        if (tmp_path / "out" / "train" / "tokens-00003.bin").exists():
            raise Killed

    monkeypatch.setattr("lslm_jax.data.prepare.prepare._LOG_SECONDS", 0.0)
    monkeypatch.setattr("lslm_jax.data.prepare.worker_pool._BLOCK_DOCUMENTS", 3)
    with pytest.raises(Killed):
        run(config, tmp_path / "out", kill)
    status = path.stat()
    write(path, *(f"TEXT {i:03d}" for i in range(100)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="has the same size but another content"):
        run(config, tmp_path / "out")


def test_a_file_edited_while_it_is_read_is_noticed_at_the_end(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    config = plain(write(path, "one", "two"))

    def edit(line: str) -> None:
        path.write_text(path.read_text().replace("two", "2nd"))

    monkeypatch.setattr("lslm_jax.data.prepare.prepare._LOG_SECONDS", 0.0)
    with pytest.raises(DataError, match=f"^{path} was changed while it was read: remove {tmp_path}/out and prepare"):
        run(config, tmp_path / "out", lambda line: edit(line) if "examples read" in line else None)


@pytest.mark.parametrize("key", ["labels", "source_labels", "tokenizer"])
def test_an_altered_manifest_is_noticed_and_an_older_one_accepted(tmp_path, key):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,pos\nbad,neg\n")
    run(classes(str(path)), tmp_path / "out")
    directory, manifest = epath.Path(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    sound = json.loads(manifest.read_text())
    assert data_manifest.verify(directory) > 0
    changes = {"labels": ["pos", "neg"], "source_labels": {"": ["pos", "neg"]}}
    changes["tokenizer"] = sound["tokenizer"] | {"eos_id": 5}
    altered = sound | {key: changes[key]}
    assert data_manifest.content_sha256(altered) != data_manifest.content_sha256(sound)
    manifest.write_text(json.dumps(altered))
    with pytest.raises(DataError, match=f"^{manifest} was altered: its labels, tokenizer or splits are not"):
        data_manifest.verify(directory)
    older = {name: value for name, value in sound.items() if name != "content_sha256"}
    manifest.write_text(json.dumps(older))
    assert data_manifest.verify(directory) > 0
    assert data_manifest.content_sha256(older) == data_manifest.content_sha256(older | {"labels": []}), (
        "as it was on record"
    )
    assert run(classes(str(path)), tmp_path / "out")["skipped"]


def test_settings_that_came_later_do_not_make_older_data_others(tmp_path):
    config = plain(write(tmp_path / "a.jsonl", "one", "two"))
    run(config, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert not any(key in settings for key in ("clean.bad_records", "clean.deduplicate_over", "data.separator"))
    for clean in (CleanConfig(bad_records="skip"), CleanConfig(deduplicate_over="mixture")):
        with pytest.raises(ConfigError, match="was prepared with clean"):
            run(dataclasses.replace(config, clean=clean), tmp_path / "out")


RECORD = {
    "version": 1,
    "settings": {},
    "given_tokenizer": "",
    "inputs": {"": [["a.txt", 3, 4, "0"]]},
    "labels": [],
    "source_labels": {"": []},
    "tokenizer": {"sha256": "0", "vocab_size": 259, "bos_id": 1, "eos_id": 2, "mask_id": None, "file": "bytes.json"},
    "splits": {"train": {"manifest_sha256": "0"}},
    "dropped": {},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", None),
        ("given_tokenizer", 0),
        ("inputs", []),
        ("inputs", {"": [3]}),
        ("inputs", {"": [["a.txt"]]}),
        ("labels", 3),
        ("labels", [1]),
        ("source_labels", {"": None}),
        ("tokenizer", None),
        ("tokenizer", RECORD["tokenizer"] | {"file": "../a.json"}),
        ("tokenizer", RECORD["tokenizer"] | {"eos_id": "2"}),
        ("tokenizer", RECORD["tokenizer"] | {"vocab_size": 1 << 40}),
        ("splits", []),
        ("splits", {"train": None}),
        ("splits", {"../train": {"manifest_sha256": "0"}}),
        ("dropped", 5),
        ("chat", None),
        ("content_sha256", None),
    ],
)
def test_an_entry_of_a_manifest_of_a_wrong_type_is_named(tmp_path, key, value):
    path = epath.Path(tmp_path / "manifest.json")
    path.write_text(json.dumps(RECORD))
    assert data_manifest.read(path) == RECORD
    path.write_text(json.dumps(RECORD | {key: value}))
    with pytest.raises(DataError, match=f"manifest.json is damaged: {key} is "):
        data_manifest.read(path)
    path.write_text(json.dumps({name: entry for name, entry in RECORD.items() if name != "splits"}))
    with pytest.raises(DataError, match=r"manifest.json is damaged: it lacks splits"):
        data_manifest.read(path)


# Several processes.


def test_a_second_preparation_waits_for_the_first_and_finds_its_data(tmp_path):
    config, shown = plain(write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(50)))), []
    (tmp_path / "out").mkdir()
    with directory_lock.hold(epath.Path(tmp_path / "out"), shown.append):
        results: list[dict] = []
        go = lambda log: results.append(run(config, tmp_path / "out", log))
        threads = [threading.Thread(target=go, args=(log,)) for log in (shown.append, lambda line: None)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert results == []
    for thread in threads:
        thread.join(60)
    assert shown[0].startswith(f"prepare: {tmp_path}/out is in use by process {os.getpid()} on ")
    assert shown[0].endswith(": waiting until it is done")
    assert sorted(result["skipped"] for result in results) == [False, True]
    assert not list((tmp_path / "out").glob("*lock*"))


# Held-out shares.


@pytest.mark.parametrize(("count", "fraction", "expected"), [(8, 0.01, 1), (8, 0.3, 2), (3, 0.9, 2), (40, 0.2, 8)])
def test_a_share_of_few_documents_is_exact_and_at_least_one(tmp_path, count, fraction, expected):
    path = write(tmp_path / "a.jsonl", *(f"document {i}" for i in range(count)), "", "document 0")
    summary = run(plain(path, valid_fraction=fraction), tmp_path / "out")
    assert summary["splits"]["valid"]["documents"] == expected
    assert summary["splits"]["train"]["documents"] == count - expected


def test_books_enough_for_the_share_are_held_out_whole_however_their_hashes_lie(tmp_path):
    for seed in range(8):
        (tmp_path / f"{seed}").mkdir()
        for i in range(5):
            (tmp_path / f"{seed}" / f"{i}.txt").write_text(f"book {i} of {seed}\nwith two lines\n")
        summary = run(plain(str(tmp_path / f"{seed}"), valid_fraction=0.3), tmp_path / "out" / f"{seed}")
        assert {name: split["documents"] for name, split in summary["splits"].items()} == {"train": 3, "valid": 2}


def test_books_too_few_for_the_share_give_their_ends(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("".join(f"line {j} of {i}\n" for j in range(1000)))
    shown: list[str] = []
    summary = run(plain(str(tmp_path / "?.txt"), valid_fraction=0.01), tmp_path / "out", shown.append)
    share = summary["splits"]["valid"]["tokens"] / summary["tokens"]
    assert summary["splits"]["valid"]["documents"] == 8 and share == pytest.approx(0.01, rel=0.2)
    assert "prepare: the last 1 % of each text file is held out (data.valid_fraction)" in shown


# Causes.


def test_nothing_to_train_on_names_the_cause(tmp_path):
    path = write(tmp_path / "a.jsonl", "one", "two")
    copy = write(tmp_path / "b.jsonl", "one", "two")
    for valid, cause in [
        (path, "dropped: none: every file of data.files is also held out by data.valid_files or data.test_files"),
        (copy, "dropped: 2 duplicate; 2 of them are also in the held-out data: name other files to train on"),
    ]:
        with pytest.raises(InputMissing) as error:
            run(plain(path, valid_files=(valid,)), tmp_path / "out")
        assert str(error.value) == f"nothing to train on in {path}; {cause}"


def test_a_small_source_keeps_what_is_also_in_a_big_one(tmp_path):
    texts = [f"document number {i}" for i in range(40)]
    big, small = write(tmp_path / "big.jsonl", *texts), write(tmp_path / "small.jsonl", *texts[:6], "alone", "alone")
    mixture = (MixtureSource(name="big", files=(big,), weight=3.0), MixtureSource(name="small", files=(small,)))
    config, shown = Config(data=DataConfig(mixture=mixture), tokenizer=BYTES), []
    summary = run(config, tmp_path / "out")
    assert summary["splits"]["small/train"]["documents"] == 7 and summary["dropped"] == {"duplicate": 1}
    over = dataclasses.replace(config, clean=CleanConfig(deduplicate_over="mixture"))
    summary = run(over, tmp_path / "over", shown.append)
    assert summary["splits"]["small/train"]["documents"] == 1
    [warning] = [line for line in shown if "warning" in line]
    assert warning == (
        "prepare: warning: source small keeps 1 and loses 7 examples (7 duplicate); its weight repeats those that are "
        "left"
    )


def test_what_one_source_holds_out_no_other_trains_on(tmp_path):
    one = write(tmp_path / "one.jsonl", "a", "b", "secret")
    two, valid = write(tmp_path / "two.jsonl", "c"), write(tmp_path / "valid.jsonl", "secret")
    mixture = (MixtureSource(name="one", files=(one,)), MixtureSource(name="two", files=(two,), valid_files=(valid,)))
    summary = run(Config(data=DataConfig(mixture=mixture), tokenizer=BYTES), tmp_path / "out")
    assert summary["splits"]["one/train"]["documents"] == 2 and summary["dropped"] == {"duplicate": 1}


# Labels.


def test_empty_labels_are_dropped_and_counted_in_every_split(tmp_path):
    rows = [("a", "pos"), ("b", ""), ("c", None), ("d", "neg"), ("e", float("nan"))]
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(lines.replace('"text": "', f'"text": "{name} '))
    config = classes(str(tmp_path / "train.jsonl"), valid_files=(str(tmp_path / "valid.jsonl"),))
    shown: list[str] = []
    summary = run(config, tmp_path / "out", shown.append)
    assert summary["dropped"] == {"no_label": 6} and summary["documents"] == 4
    assert "prepare: 2 labels: neg, pos" in shown
    assert shown[-1].startswith("prepare: done: 2 labelled texts in train, 2 labelled texts in valid; ")
    assert Shards.open(tmp_path / "out" / "valid").numbers[:, 0].tolist() == [1, 0]
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, max_documents=1))
    run(single, tmp_path / "single", shown.append)
    assert shown[-1].startswith("prepare: done: 1 labelled text in train, 1 labelled text in valid; ")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_labels_with_bad_bytes_follow_the_policy(tmp_path, suffix):
    path, separator = tmp_path / f"a.{suffix}", b"," if suffix == "csv" else b"\t"
    path.write_bytes(b"\n".join(separator.join(row) for row in ((b"text", b"label"), (b"a", b"x\xff"), (b"b", b"y"))))
    expected = {"replace": (["x\ufffd", "y"], {}), "skip": (["x\ufffd", "y"], {"bad_utf8": 1})}
    for policy in ("strict", "replace", "skip"):
        config = dataclasses.replace(classes(str(path)), clean=CleanConfig(bad_utf8=policy))
        if policy == "strict":
            with pytest.raises(DataError, match=r"byte 0xff at .* is not UTF-8"):
                run(config, tmp_path / policy)
        else:
            summary = run(config, tmp_path / policy)
            manifest = json.loads((tmp_path / policy / "manifest.json").read_text())
            assert (manifest["labels"], summary["dropped"]) == expected[policy]


def test_labels_that_are_hardly_meant_to_differ_are_named():
    assert list(label_names.describe(["Pos", "neg", "pos"])) == [
        "3 labels: Pos, neg, pos",
        "warning: the labels 'Pos' and 'pos' are different classes, though alike",
    ]
    only = ["1 label: only", "warning: all examples have the label 'only': there is nothing to tell apart"]
    assert list(label_names.describe(["only"])) == only and list(label_names.describe([])) == []
    assert list(label_names.describe(["1", "1.0", "nan", "x"]))[1:] == [
        "warning: the label 'nan' looks like a missing value and is a class",
        "warning: the labels '1' and '1.0' are different classes, though alike",
    ]


def test_unknown_tokens_are_counted_and_warned_of(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, "known": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    path, shown = write(tmp_path / "a.jsonl", "known word", "another word known known"), []
    given = TokenizerConfig(kind="huggingface", path=str(tmp_path / "tokenizer.json"))
    run(dataclasses.replace(plain(path), tokenizer=given), tmp_path / "out", shown.append)
    assert (
        "prepare: warning: the tokenizer does not fit the text: 50 % of all tokens are unknown to the tokenizer"
        in shown
    )
    shards = Shards.open(tmp_path / "out" / "train")
    assert np.count_nonzero(shards.take(np.arange(6)) == 2) == 3
