"""Raw text becomes shards: the same ones however often it is killed and however many processes work."""

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

import lslm_jax
from lslm_jax.config import CleanConfig, Config, DataConfig, MixtureSource, TokenizerConfig
from lslm_jax.data.prepare import cleaning
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers import train as vocabulary
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.data.tokenizers.sentencepiece import sentencepiece
from lslm_jax.errors import ConfigError, DataError, InputMissing, LslmError, SaveError

LIBRARY = pathlib.Path(os.__file__).parent
BYTES = TokenizerConfig(kind="bytes")


def run(config: Config, directory: pathlib.Path, **settings) -> dict:
    return prepare(config, epath.Path(directory), lambda line: None, **{"workers": 1} | settings)


def write(path: pathlib.Path, *documents: str) -> str:
    """A JSONL file of these documents; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def read(directory: pathlib.Path, split: str = "train") -> list[str]:
    """The documents of a prepared split, as text."""
    shards = Shards.open(epath.Path(directory) / split, verify=True)
    manifest = json.loads((directory / "manifest.json").read_text())
    tokenizer = load_tokenizer(epath.Path(directory) / manifest["tokenizer"]["file"])
    ids = shards.take(np.arange(shards.num_tokens))
    return [tokenizer.decode(part) for part in np.split(ids, shards.starts[1:-1])]


def content(directory: pathlib.Path) -> dict[str, str]:
    """Digest of every file below a directory."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def code(count: int) -> list[str]:
    return [path.read_text("utf-8") for path in sorted(LIBRARY.glob("*.py"))[:count]]


@pytest.fixture
def corpus(tmp_path) -> Config:
    """Some source files, among them a duplicate, an empty one and bad UTF-8, with a vocabulary to train."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for i, text in enumerate(code(40)):
        (raw / f"{i:02d}.py").write_text(text, "utf-8")
    (raw / "90.py").write_text(code(1)[0], "utf-8")
    (raw / "91.py").write_text("")
    (raw / "92.py").write_bytes(b"bad \xff")
    return Config(
        data=DataConfig(files=(str(raw),), valid_fraction=0.2, shard_tokens=20_000),
        clean=CleanConfig(bad_utf8="skip", unicode="none", control="keep"),
        tokenizer=TokenizerConfig(vocab_size=512, sample_bytes=200_000),
    )


def test_every_kept_document_is_in_one_split_and_reads_as_it_was(corpus, tmp_path):
    summary = run(corpus, tmp_path / "out")
    train, valid = read(tmp_path / "out"), read(tmp_path / "out", "valid")
    assert sorted(train + valid) == sorted(code(40))
    assert train and valid
    assert summary["dropped"] == {"bad_utf8": 1, "duplicate": 1, "too_short": 1}
    assert summary["documents"] == 40
    assert summary["bytes"] == sum(len(text.encode()) for text in train + valid)
    assert summary["tokens"] == sum(summary["splits"][split]["tokens"] for split in ("train", "valid"))
    assert summary["shards"] > 5
    assert summary["vocab_size"] == 512
    assert not summary["skipped"]


def test_the_last_line_counts_what_was_kept_and_what_was_not(corpus, tmp_path):
    lines: list[str] = []
    summary = prepare(corpus, epath.Path(tmp_path / "out"), lines.append, workers=1)
    train, valid = (summary["splits"][split]["documents"] for split in ("train", "valid"))
    assert train + valid == 40
    kept = f"{train} documents in train, {valid} documents in valid; {summary['tokens'] / 1e3:.1f}k tokens"
    assert lines[-1] == f"prepare: done: {kept}; dropped: 1 bad_utf8, 1 duplicate, 1 too_short"
    assert lines[0] == "prepare: train files: 43 as text with one document a file: 00.py, 01.py, 02.py, ..."
    assert valid == 8, "a fifth, not what chance makes of it"


def test_the_manifest_tells_what_was_made_of_what(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    file = tmp_path / "out" / manifest["tokenizer"]["file"]
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [manifest["tokenizer"][key] for key in ("kind", "pad_id", "bos_id", "eos_id")] == ["sentencepiece", 0, 1, 2]
    for name, split in manifest["splits"].items():
        data = (tmp_path / "out" / name / "manifest.json").read_bytes()
        assert split["manifest_sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["settings"]["clean.bad_utf8"] == "skip"
    assert len(manifest["inputs"][""]) == 43
    assert not (tmp_path / "out" / "unfinished.json").exists()


def test_the_number_of_processes_changes_nothing(corpus, tmp_path):
    corpus = dataclasses.replace(corpus, clean=dataclasses.replace(corpus.clean, deduplicate="near"))
    summaries = [run(corpus, tmp_path / f"{workers}", workers=workers) for workers in (1, 2)]
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert summaries[0] | {"seconds": 0} == summaries[1] | {"seconds": 0}


PROGRAM = """if True:
    import sys
    from etils import epath
    from lslm_jax import config
    from lslm_jax.data.prepare import prepare, worker_pool

    worker_pool._BLOCK_CHARS = 20_000
    settings = config.Config(
        data=config.DataConfig(files=(sys.argv[1],), valid_fraction=0.1, shard_tokens=200_000),
        clean=config.CleanConfig(bad_utf8="skip", min_chars=100),
        tokenizer=config.TokenizerConfig(kind="bytes"),
    )
    prepare.prepare(settings, epath.Path(sys.argv[2]), print, workers=2)
    print([name for name in ("jax", "tensorflow") if name in sys.modules])
"""


def start(directory: pathlib.Path) -> subprocess.Popen:
    """A process, leader of its own session, that prepares a part of the standard library there."""
    command = [sys.executable, "-c", PROGRAM, str(LIBRARY / "[a-k]*" / "*.py"), str(directory)]
    root = pathlib.Path(lslm_jax.__file__).parents[1]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def members(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes_and_leaves_no_process(tmp_path):
    whole = start(tmp_path / "whole")
    begun = time.monotonic()
    output, errors = whole.communicate()
    seconds = time.monotonic() - begun
    assert whole.returncode == 0, errors
    assert output.splitlines()[-1] == "[]", "the parent imports neither jax nor tensorflow"
    picks = random.Random(0)
    for _ in range(6):
        process = start(tmp_path / "killed")
        time.sleep(picks.uniform(0.1, 0.9) * seconds)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 10
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not members(process.pid)
    last = start(tmp_path / "killed")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("size", [1_000, 400_000], ids=["between results", "while it writes one"])
def test_a_killed_worker_is_told_in_one_line(size, corpus, tmp_path, monkeypatch):
    """A result of 400,000 characters does not fit into the pipe, which nobody reads while `kill_one` waits."""
    monkeypatch.setattr("lslm_jax.data.prepare.worker_pool._BLOCK_CHARS", size)
    monkeypatch.setattr("lslm_jax.data.prepare.prepare._LOG_SECONDS", 0.0)
    for i in range(6):
        (tmp_path / "raw" / f"big{i}.py").write_text(f"{i}" * 400_000)

    def kill_one(line: str) -> None:
        time.sleep(0.3)
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    config = dataclasses.replace(corpus, tokenizer=BYTES)
    with pytest.raises(LslmError, match=r"^a process of prepare was killed, perhaps for want of memory; run again"):
        prepare(config, epath.Path(tmp_path / "out"), kill_one, workers=2)
    assert not multiprocessing.active_children()
    assert run(config, tmp_path / "out")["documents"] == 46


def test_a_second_run_is_skipped_at_once_even_when_the_input_is_gone(corpus, tmp_path):
    first = run(corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    second = run(corpus, tmp_path / "out")
    assert second["skipped"] and second["seconds"] < 0.1
    assert second | {"skipped": False, "seconds": 0} == first | {"seconds": 0}
    packed = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, seq_len=8, packing="bins"))
    assert run(packed, tmp_path / "out")["skipped"]
    shards = dataclasses.replace(corpus, data=DataConfig(source="shards"))
    assert run(shards, tmp_path / "out")["tokens"] == first["tokens"]
    assert content(tmp_path / "out") == before


def test_other_settings_or_inputs_are_refused_by_name(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    remedy = f"choose another data.dir, or remove {out}"
    other = dataclasses.replace(corpus, clean=dataclasses.replace(corpus.clean, min_chars=9))
    with pytest.raises(ConfigError) as error:
        run(other, out)
    assert str(error.value) == f"{out} was prepared with clean.min_chars=1, not 9: {remedy}"
    path = tmp_path / "raw" / "00.py"
    size = path.stat().st_size
    path.write_text("changed")
    with pytest.raises(DataError) as error:
        run(corpus, out)
    changed = f"{path} had {size} bytes, now 7"
    assert str(error.value) == f"the input has changed since {out} was prepared: {changed}; {remedy}"


def test_duplicates_never_straddle_the_splits(tmp_path):
    texts = [f"document number {i % 100}" for i in range(300)]
    data = DataConfig(files=(write(tmp_path / "a.jsonl", *texts),), valid_fraction=0.3)
    run(Config(data=data, clean=CleanConfig(deduplicate="none"), tokenizer=BYTES), tmp_path / "out")
    train, valid = read(tmp_path / "out"), read(tmp_path / "out", "valid")
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid)
    assert 10 < len(set(valid)) < 60


def test_a_document_held_out_by_file_is_not_trained_on(tmp_path):
    write(tmp_path / "raw" / "train.jsonl", "one", "two", "three", "two")
    valid = write(tmp_path / "raw" / "valid.jsonl", "two", "four")
    data = DataConfig(files=(str(tmp_path / "raw"),), valid_files=(valid,))
    summary = run(Config(data=data, tokenizer=BYTES), tmp_path / "out")
    assert read(tmp_path / "out") == ["one", "three"]
    assert read(tmp_path / "out", "valid") == ["two", "four"]
    assert summary["dropped"] == {"duplicate": 2}


def test_a_mixture_has_one_vocabulary_and_shards_for_each_source(tmp_path):
    prose = write(tmp_path / "prose.jsonl", *[f"the cat sat on mat {i} and looked at the cat" for i in range(60)])
    program = write(tmp_path / "code.jsonl", *code(2), "the cat sat on mat 1 and looked at the cat")
    mixture = (
        MixtureSource(name="prose", files=(prose,), valid_fraction=0.2, weight=3.0),
        MixtureSource(name="code", files=(program,)),
    )
    tokenizer = TokenizerConfig(vocab_size=400, sample_bytes=4000)
    config = Config(data=DataConfig(mixture=mixture), tokenizer=tokenizer)
    summary = run(config, tmp_path / "out")
    assert sorted(summary["splits"]) == ["code/train", "prose/train", "prose/valid"]
    assert read(tmp_path / "out", "code/train") == code(2)
    assert len(read(tmp_path / "out", "prose/train") + read(tmp_path / "out", "prose/valid")) == 60
    assert run(config, tmp_path / "out")["skipped"]


def test_a_given_tokenizer_is_copied_and_recognised(corpus, tmp_path):
    run(corpus, tmp_path / "first")
    given = tmp_path / "first" / "tokenizer.model"
    config = dataclasses.replace(corpus, tokenizer=TokenizerConfig(path=str(given)))
    run(config, tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == given.read_bytes()
    assert content(tmp_path / "first" / "train") == content(tmp_path / "second" / "train")
    other = vocabulary.train(iter(code(3)), TokenizerConfig(vocab_size=400))
    other.save(epath.Path(tmp_path / "first"))
    with pytest.raises(ConfigError, match="was prepared with another tokenizer than"):
        run(config, tmp_path / "second")
    given.unlink()
    assert run(config, tmp_path / "second")["skipped"]


def test_a_setting_may_change_while_no_shard_is_written(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    data = DataConfig(files=(str(tmp_path / "?.txt"),))
    with pytest.raises(DataError) as error:
        run(Config(data=data, tokenizer=BYTES), tmp_path / "out")
    place = f"{tmp_path / 'a.txt'}: byte 0xff at offset 4 is not UTF-8"
    assert str(error.value) == f"{place}; clean.bad_utf8 may be replace or skip"
    run(Config(data=data, tokenizer=BYTES, clean=CleanConfig(bad_utf8="replace")), tmp_path / "out")
    assert read(tmp_path / "out") == ["bad \ufffd", "good"]


def test_max_documents_limits_what_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", *[f"document {i}" for i in range(20)])
    config = Config(data=DataConfig(files=(path,), max_documents=5), tokenizer=TokenizerConfig(vocab_size=275))
    assert run(config, tmp_path / "out")["documents"] == 5


def test_synthetic_data_needs_no_preparation(tmp_path):
    summary = run(Config(data=DataConfig(source="synthetic")), tmp_path / "out")
    assert summary["skipped"] and summary["tokens"] == 0
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_nothing_may_be(tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "a.jsonl", "text")
    with pytest.raises(SaveError, match=f"^could not write {tmp_path / 'file' / 'out'}: Not a directory$"):
        run(Config(data=DataConfig(files=(path,)), tokenizer=BYTES), tmp_path / "file" / "out")


def test_a_full_disk_is_told_by_file_and_the_next_run_goes_on(corpus, tmp_path):
    """A limit on the size of files stands in for the disk; the first shards are under it."""
    config = dataclasses.replace(corpus, tokenizer=BYTES)
    most = max(len(text) for text in code(40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most - 1000, limits[1]))
    try:
        with pytest.raises(SaveError, match=rf"^could not write {tmp_path}/out/\w+/tokens-\d+\.bin: File too large$"):
            run(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").rglob("tokens-*.bin"))
    run(config, tmp_path / "out")
    run(config, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("data", "tokenizer", "kind", "message"),
    [
        (DataConfig(files=("none",)), BYTES, InputMissing, "data.files: none matches no file"),
        (DataConfig(), BYTES, ConfigError, "data.files is empty: name files, directories or globs, or choose "),
        (DataConfig(source="shards"), BYTES, InputMissing, "data.source=shards, but {out} holds no prepared data "),
        (
            DataConfig(files=("{dir}/empty.txt",)),
            BYTES,
            InputMissing,
            "nothing to train on in {dir}/empty.txt; dropped: 1 too_short",
        ),
        (
            DataConfig(files=("{dir}/empty.txt",)),
            TokenizerConfig(),
            InputMissing,
            "nothing to train on in {dir}/empty.txt; dropped: 1 too_short",
        ),
        (
            DataConfig(files=("{dir}/text.txt",)),
            TokenizerConfig(kind="huggingface"),
            ConfigError,
            "tokenizer.path is empty: kind=huggingface needs a tokenizer.json",
        ),
        (
            DataConfig(files=("{dir}/text.txt",)),
            TokenizerConfig(path="none.model"),
            InputMissing,
            "tokenizer none.model does not exist",
        ),
        (
            DataConfig(files=("{dir}/text.txt",), document="line", valid_fraction=1e-9),
            BYTES,
            InputMissing,
            "data.valid_fraction=1e-09 cannot be held out of the only document in {dir}/text.txt: add more, or name",
        ),
        (
            DataConfig(files=("{dir}/text.txt",), valid_files=("{dir}/empty.txt",)),
            BYTES,
            InputMissing,
            "nothing to validate on: every held-out document is empty or was dropped",
        ),
    ],
)
def test_what_cannot_be_prepared_is_told_in_one_line(tmp_path, data, tokenizer, kind, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("a little text")
    names = {key: tuple(name.format(dir=tmp_path) for name in getattr(data, key)) for key in ("files", "valid_files")}
    with pytest.raises(kind) as error:
        run(Config(data=dataclasses.replace(data, **names), tokenizer=tokenizer), tmp_path / "out")
    assert str(error.value).startswith(message.format(dir=tmp_path, out=tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_near_duplicates_of_real_text_are_dropped(shared, tmp_path):
    path = shared / "lm" / "novels_en" / "valid.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines][:20]
    copies = [text.replace("the", "teh", 3) for text in texts[:5]]
    data = DataConfig(files=(write(tmp_path / "a.jsonl", *texts, *copies),))
    summary = run(Config(data=data, tokenizer=BYTES, clean=CleanConfig(deduplicate="near")), tmp_path / "out")
    assert summary["dropped"] == {"near_duplicate": 5}
    assert summary["documents"] == 20


@pytest.mark.parametrize(
    ("package", "config", "message"),
    [
        ("sentencepiece", Config(), "tokenizer.kind=sentencepiece needs sentencepiece: pip install sentencepiece"),
        (
            "datasketch",
            Config(clean=CleanConfig(deduplicate="near"), tokenizer=BYTES),
            "clean.deduplicate=near needs datasketch: pip install datasketch",
        ),
        (
            "tensorflow_datasets",
            Config(data=DataConfig(source="tfds", tfds="lm1b"), tokenizer=BYTES),
            "data.source=tfds needs tensorflow_datasets: pip install tensorflow-cpu tensorflow-datasets",
        ),
    ],
)
def test_a_missing_package_is_named_when_it_is_needed_and_only_then(tmp_path, monkeypatch, package, config, message):
    sentencepiece.cache_clear()
    cleaning._empty_minhash.cache_clear()
    for name in ("sentencepiece", "tokenizers", "datasketch", "pyarrow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    path = write(tmp_path / "a.jsonl", "a text that is long enough")
    files = dataclasses.replace(config, data=dataclasses.replace(config.data, files=(path,)))
    with pytest.raises(ConfigError) as error:
        run(files, tmp_path / "out")
    assert str(error.value) == message
    plain = Config(data=DataConfig(files=(path,)), tokenizer=BYTES)
    assert run(plain, tmp_path / "plain")["documents"] == 1, package
