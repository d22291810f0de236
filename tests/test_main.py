"""The command line: what it refuses, with which words and which exit code; what it prints when all is well."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from lslm_jax.main import main

TEXT = "".join(f"Line {n} of a corpus that is long enough to train on for a few steps.\n" for n in range(400))
TINY = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 32},
    "data": {"document": "line", "valid_fraction": 0.1, "seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": 4, "batch_size": 8},
    "eval": {"batches": 2},
    "log": {"every": 1, "tensorboard": False},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """A directory with a config, a corpus, and the data prepared from it."""
    root = tmp_path_factory.mktemp("run")
    (root / "corpus.txt").write_text(TEXT)
    (root / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *flags(root)])
    assert stop.value.code == 0
    return root


@pytest.fixture
def run(prepared, tmp_path) -> pathlib.Path:
    """A fresh copy of it."""
    return pathlib.Path(shutil.copytree(prepared, tmp_path / "run"))


def flags(root: pathlib.Path, *more: str) -> list[str]:
    return [f"--config={root}/config.json", f"--workdir={root}/work", f"--config.data.files={root}/corpus.txt", *more]


def fails(arguments: list[str], code: int, capsys) -> str:
    """Runs the command, which must fail with this code and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    output = capsys.readouterr()
    last = output.err.strip().splitlines()[-1]
    assert stop.value.code == code, output.err
    assert last.startswith("lslm: ")
    assert output.out == "" and "Traceback" not in output.err
    return last.removeprefix("lslm: ")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.step=3", "unknown key --config.train.step; did you mean train.steps?"),
        ("--config.learning_rat=1", "unknown key --config.learning_rat; did you mean optimizer.learning_rate?"),
        ("--config.train.batch_size=3.5", "train.batch_size wants a whole number, got '3.5'"),
        ("--config.log.timing=maybe", "log.timing wants true or false, got 'maybe'"),
        (
            "--config.optimizer.name=adma",
            "optimizer.name wants one of sgd, adam, adamw, adafactor, lion, muon; got 'adma'",
        ),
        ("--config.train.steps", "--config.train.steps has no value: write --config.train.steps=VALUE"),
        ("--config.train.steps=0", "train.steps must be positive, got 0"),
        ("--confg=x", "unrecognized arguments: --confg=x; --help lists all flags"),
        (
            "--config.mesh.tensor=4",
            "model.num_heads=2 is not divisible by mesh.tensor=4: use 4",
        ),
        (
            "--config.train.batch_size=10",
            "train.batch_size=10 is not divisible by data*fsdp=8: use train.batch_size=8 or 16",
        ),
        (
            "--config.mesh.data=16",
            "mesh data=16 x fsdp=1 x tensor=1 is 16 devices, more than the 8 there are: set one axis to -1",
        ),
        (
            "--config.mesh.data=4",
            "mesh data=4 x fsdp=1 x tensor=1 is 4 devices, fewer than the 8 there are: set one axis to -1",
        ),
        ("--config.mesh.fsdp=3", "model.d_model=32 is not divisible by mesh.fsdp=3: use 30 or 33"),
        ("--config.data.seq_len=64", "data.seq_len=64 is longer than model.max_length=32"),
        ("--config.model.vocab_size=100", "model.vocab_size=100 is smaller than the tokenizer's 259 tokens"),
        (
            "--config.data.packing=bins --config.data.mask_documents=false",
            "data.packing=bins needs data.mask_documents=true: several pieces or padding share a row",
        ),
    ],
)
def test_an_impossible_setting_is_refused_in_one_line(flag, message, prepared, capsys):
    assert fails(flags(prepared, *flag.split()), 2, capsys) == message


def corpus(root: pathlib.Path, text: str) -> list[str]:
    (root / "corpus.txt").write_text(text)
    return flags(root, f"--config.data.dir={root}/fresh")


def test_an_empty_corpus_is_refused(run, capsys):
    message = fails(corpus(run, ""), 66, capsys)
    assert message == f"nothing to train on in {run}/corpus.txt; dropped: none"


def test_a_corpus_of_which_everything_is_filtered_is_refused_with_the_reasons(run, capsys):
    message = fails([*corpus(run, "a\nb\nc\n"), "--config.clean.min_chars=5"], 66, capsys)
    assert message == f"nothing to train on in {run}/corpus.txt; dropped: 3 too_short"


def test_a_corpus_shorter_than_one_row_is_refused(run, capsys):
    message = fails([*corpus(run, "short\n"), "--config.data.valid_fraction=0"], 66, capsys)
    assert message == f"{run}/fresh/train holds 6 slots, fewer than one row of 32 (data.seq_len)"


def test_a_missing_file_is_refused_by_name(run, capsys):
    arguments = flags(run, f"--config.data.files={run}/none.txt", f"--config.data.dir={run}/fresh")
    assert fails(arguments, 66, capsys) == f"data.files: {run}/none.txt matches no file"


def test_a_missing_config_file_is_refused_by_name(run, capsys):
    assert fails(["--config=none.py", f"--workdir={run}"], 66, capsys) == "config file none.py does not exist"


def shards(root: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The one shard of the training set, and the flags to train on it as it is."""
    data = root / "work/data"
    return data / "train/tokens-00000.bin", flags(root, "--config.data.source=shards", f"--config.data.dir={data}")


def test_a_truncated_shard_is_refused_by_name(run, capsys):
    shard, arguments = shards(run)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    assert fails(arguments, 65, capsys) == f"{shard} is truncated: {size - 2} bytes, manifest.json says {size}"


def test_a_token_outside_the_vocabulary_is_refused_with_its_document(run, capsys):
    shard, arguments = shards(run)
    np.full(shard.stat().st_size // 2, 999, np.uint16).tofile(shard)
    assert fails(arguments, 65, capsys) == f"{shard} was altered: its sha256 is not the one in manifest.json"
    message = fails([*arguments, "--config.data.verify=false"], 65, capsys)
    assert message.startswith("token 999 in document ") and message.endswith("vocabulary 259")


def test_a_directory_that_cannot_be_written_is_refused_by_name(run, capsys):
    (run / "file").write_text("")
    arguments = [*flags(run), f"--workdir={run}/file/below"]
    assert fails(arguments, 74, capsys) == f"cannot create {run}/file/below: Not a directory"


def test_other_settings_than_the_prepared_ones_are_refused_and_nothing_is_lost(prepared, capsys):
    message = fails(flags(prepared, "--config.clean.min_chars=7"), 2, capsys)
    data = prepared / "work/data"
    assert message == (f"{data} was prepared with clean.min_chars=1, not 7: choose another data.dir, or remove {data}")
    assert (data / "manifest.json").exists()


def test_evaluation_and_generation_of_nothing_are_refused(run, capsys):
    assert fails(["evaluate", *flags(run)], 76, capsys) == f"no checkpoint in {run}/work/checkpoints"
    assert fails(["generate", *flags(run), "--prompt=x"], 76, capsys) == f"no checkpoint in {run}/work/checkpoints"
    assert fails(["generate", *flags(run)], 2, capsys) == "generate needs --prompt=TEXT or --prompts=FILE"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"\n", 66, "prompts file {path} is empty"),
        (b'{"prompt": "a"}\n\nhello\n', 65, '{path}:3 is not a JSON object with a "prompt"'),
        (b'{"prompt": "\xff"}\n', 65, '{path}:1 is not a JSON object with a "prompt"'),
        (b'{"prompt": 3}\n', 65, '{path}:1: "prompt" is not text: 3'),
        (b'{"prompt": "\\ud800"}\n', 65, '{path}:1: "prompt" is not text: "\\ud800"'),
    ],
)
def test_a_bad_file_of_prompts_is_refused_by_its_line(content, code, message, prepared, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert fails(["generate", *flags(prepared), f"--prompts={path}"], code, capsys) == message.format(path=path)


def test_a_mistake_is_told_within_three_seconds_and_without_importing_jax(prepared):
    begun = time.monotonic()
    code = "import sys; from lslm_jax.main import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    arguments = [sys.executable, "-c", code, *flags(prepared, "--config.train.step=3")]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 2 and time.monotonic() - begun < 3.0
    assert not {"jax", "tensorflow", "numpy", "sentencepiece"} & set(process.stdout.split())


def test_help_lists_every_setting_with_its_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config.help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "optimizer.learning_rate (float; 0.0003)\n    Peak learning rate." in output
