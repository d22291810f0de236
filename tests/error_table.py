"""Mistakes and damage, each with how it comes about, the exit code, and the one line that a user reads.

tests/cli/test_errors.py brings each about and compares, or, where it takes more than a command, the test that a row
names; docs/errors.md is made of the same table.
"""

import gzip
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TEXT = "".join(f"Line {n} of a corpus that is long enough to train on for a few steps.\n" for n in range(400))
CONFIG = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 32},
    "data": {"document": "line", "valid_fraction": 0.1, "seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": 4, "batch_size": 8},
    "checkpoint": {"every": 2},
    "eval": {"batches": 2},
    "log": {"every": 1, "tensorboard": False},
}


class Case(NamedTuple):
    """One row.

    Attributes:
      what: goes wrong, in words.
      code: the process ends with.
      message: on stderr, behind `lslm: `; DIR stands for the directory, * for anything.
      arguments: of the command, in words; those that every one has are left out.
      arrange: what was done to the run in DIR before.
      verb: of the command.
    """

    what: str
    code: int
    message: str
    arguments: str = ""
    arrange: Callable[[pathlib.Path], object] = lambda root: None
    verb: str = "train"


class Elsewhere(NamedTuple):
    """One row whose own test brings it about: it takes several processes, say, or a failing device.

    Attributes:
      what: goes wrong, in words.
      code: the process ends with.
      message: of its last line; * stands for anything.
      test: file that does it, and calls `assert_told`.
    """

    what: str
    code: int
    message: str
    test: str


def assert_told(what: str, code: int, text: str) -> None:
    """That a process ended as that row of ELSEWHERE says; `text` is what it said, the cause in its last line."""
    (row,) = [row for row in ELSEWHERE if row.what == what]
    line = text.strip().splitlines()[-1].removeprefix("lslm: ")
    assert code == row.code, text
    assert matches(row.message, line), f"{line}\n{row.message}"


def matches(message: str, line: str) -> bool:
    """Whether a line is a message in which * stands for anything."""
    return re.fullmatch(re.escape(message).replace(r"\*", ".*"), line) is not None


def write(name: str, content: str | bytes) -> Callable[[pathlib.Path], object]:
    """A file of DIR with another content."""
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str) -> Callable[[pathlib.Path], object]:
    """The last byte of a file is gone."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-1])


def last_line(name: str) -> Callable[[pathlib.Path], object]:
    """The last line of a file is gone."""
    return lambda root: (root / name).write_text("".join((root / name).read_text().splitlines(keepends=True)[:-1]))


def flip(pattern: str) -> Callable[[pathlib.Path], object]:
    """A bit in the middle of the largest file of each directory that matches."""

    def arrange(root: pathlib.Path) -> None:
        for directory in root.glob(pattern):
            files = [path for path in [directory, *directory.rglob("*")] if path.is_file()]
            path = max(files, key=lambda path: path.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    return arrange


def remove(name: str) -> Callable[[pathlib.Path], object]:
    """A file or directory is gone."""
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def both(*arrange: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], object]:
    """One after the other."""
    return lambda root: [each(root) for each in arrange]


def escape(root: pathlib.Path) -> None:
    """A manifest that names a file outside its directory."""
    path = root / "work/data/train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["file"] = "../../../corpus.txt"
    path.write_text(json.dumps(manifest))


def foreign_ids(root: pathlib.Path) -> None:
    """Shards whose tokens no vocabulary has."""
    path = root / "work/data/train/tokens-00000.bin"
    np.full(path.stat().st_size // 2, 999, np.uint16).tofile(path)


def change(name: str, *keys: str, value: object) -> Callable[[pathlib.Path], object]:
    """An entry of a JSON file has another value."""

    def arrange(root: pathlib.Path) -> None:
        entry = content = json.loads((root / name).read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        (root / name).write_text(json.dumps(content))

    return arrange


SHARD = "work/data/train/tokens-00000.bin"
HELD_OUT = "work/data/valid/tokens-00000.bin"
FRESH = "--config.data.dir=DIR/fresh"  # data that are yet to be prepared

SETTINGS = [
    Case(
        "An unknown setting",
        2,
        "unknown key --config.train.step; did you mean train.steps?",
        "--config.train.step=3",
    ),
    Case(
        "A key without its section",
        2,
        "unknown key --config.learning_rat; did you mean optimizer.learning_rate?",
        "--config.learning_rat=1",
    ),
    Case("A wrong type", 2, "train.batch_size wants a whole number, got '3.5'", "--config.train.batch_size=3.5"),
    Case("A wrong type", 2, "log.timing wants true or false, got 'maybe'", "--config.log.timing=maybe"),
    Case(
        "A name that there is not",
        2,
        "optimizer.name wants one of sgd, adam, adamw, adafactor, lion, muon; got 'adma'",
        "--config.optimizer.name=adma",
    ),
    Case("No value", 2, "--config.train.steps has no value: write --config.train.steps=VALUE", "--config.train.steps"),
    Case("A number out of range", 2, "train.steps must be positive, got 0", "--config.train.steps=0"),
    Case("An unknown flag", 2, "unknown flag --confg; did you mean --config?", "--confg=x"),
    Case(
        "A flag of another command",
        2,
        "--dtype is a flag of `evaluate`, `generate` and `export`, not of `train`: set --config.model.dtype",
        "--dtype=bfloat16",
    ),
    Case(
        "Heads that the mesh cannot split",
        2,
        "model.num_heads=2 is not divisible by mesh.tensor=4: use 4",
        "--config.mesh.tensor=4",
    ),
    Case(
        "A width that the mesh cannot split",
        2,
        "model.d_model=32 is not divisible by mesh.fsdp=3: use 30 or 33",
        "--config.mesh.fsdp=3",
    ),
    Case(
        "A batch that the mesh cannot split",
        2,
        "train.batch_size=10 is not divisible by data*fsdp=8: use train.batch_size=8 or 16",
        "--config.train.batch_size=10",
    ),
    Case(
        "A batch that eight parts cannot split",
        2,
        "train.reproducible works through eight parts of a batch: set train.accumulate=1 and train.batch_size=8 or 16",
        "--config.train.reproducible=true --config.train.batch_size=12",
    ),
    Case(
        "A mesh on which no bits can be reproduced",
        2,
        "train.reproducible needs all devices on mesh.data, and 1, 2, 4 or 8 of them: it has 4 of 8",
        "--config.train.reproducible=true --config.mesh.fsdp=2",
    ),
    Case(
        "More devices than there are",
        2,
        "mesh data=16 x fsdp=1 x tensor=1 is 16 devices, more than the 8 there are: set one axis to -1",
        "--config.mesh.data=16",
    ),
    Case(
        "Fewer devices than there are",
        2,
        "mesh data=4 x fsdp=1 x tensor=1 is 4 devices, fewer than the 8 there are: set one axis to -1",
        "--config.mesh.data=4",
    ),
    Case(
        "Rows longer than the model takes",
        2,
        "data.seq_len=64 is longer than model.max_length=32",
        "--config.data.seq_len=64",
    ),
    Case(
        "A model with too small a vocabulary",
        2,
        "model.vocab_size=100 is smaller than the tokenizer's 259 tokens",
        "--config.model.vocab_size=100",
    ),
    Case(
        "Settings that do not go together",
        2,
        "data.packing=bins needs data.mask_documents=true: several pieces or padding share a row",
        "--config.data.packing=bins --config.data.mask_documents=false",
    ),
    Case("No config file of that name", 66, "config file none.py does not exist", "--config=none.py"),
    Case(
        "A config file that is not JSON",
        2,
        "DIR/broken.json is not JSON: *",
        "--config=DIR/broken.json",
        write("broken.json", '{"model": {'),
    ),
    Case(
        "A key inside a config file that there is not",
        2,
        "DIR/odd.json: unknown key model.num_layer; did you mean num_layers?",
        "--config=DIR/odd.json",
        write("odd.json", '{"model": {"num_layer": 2}}'),
    ),
    Case(
        "A key that a config file has twice",
        2,
        "DIR/twice.json is not JSON: the key 'seed' is there twice",
        "--config=DIR/twice.json",
        write("twice.json", '{"seed": 0, "seed": 1}'),
    ),
    Case(
        "A config file that is nested too deeply",
        2,
        "DIR/deep.json is not JSON: nested too deeply",
        "--config=DIR/deep.json",
        write("deep.json", "[" * 100_000),
    ),
    Case(
        "A run directory that cannot be made",
        74,
        "cannot create DIR/file/below: Not a directory",
        "--workdir=DIR/file/below",
        write("file", ""),
    ),
]

DATA = [
    Case(
        "No file of that name",
        66,
        "data.files: DIR/none.txt matches no file",
        f"--config.data.files=DIR/none.txt {FRESH}",
    ),
    Case(
        "An empty text",
        66,
        "nothing to train on in DIR/corpus.txt; dropped: none: there are no records in it",
        FRESH,
        write("corpus.txt", ""),
    ),
    Case(
        "A text of which everything is filtered",
        66,
        "nothing to train on in DIR/corpus.txt; dropped: 3 too_short",
        f"{FRESH} --config.clean.min_chars=5",
        write("corpus.txt", "a\nb\nc\n"),
    ),
    Case(
        "A text shorter than one row",
        66,
        "DIR/fresh/train holds 6 slots, fewer than one row of 32 (data.seq_len)",
        f"{FRESH} --config.data.valid_fraction=0",
        write("corpus.txt", "short\n"),
    ),
    Case(
        "Bytes that are not UTF-8",
        65,
        "DIR/corpus.txt*",
        FRESH,
        write("corpus.txt", b"good line\nbad \xff line\n" * 50),
    ),
    Case(
        "A text that has changed since it was prepared",
        65,
        "the input has changed since DIR/work/data was prepared: *; choose another data.dir, or remove DIR/work/data",
        "",
        write("corpus.txt", TEXT + "one more line\n"),
    ),
    Case(
        "Other settings than it was prepared with",
        2,
        "DIR/work/data was prepared with clean.min_chars=1, not 7: choose another data.dir, or remove DIR/work/data",
        "--config.clean.min_chars=7",
    ),
    Case("A shard that was cut", 65, f"DIR/{SHARD} is truncated: *", "", cut(SHARD)),
    Case(
        "A shard with a flipped bit",
        65,
        f"DIR/{SHARD} was altered: its sha256 is not the one in manifest.json",
        "",
        flip(SHARD),
    ),
    Case(
        "A shard that is missing",
        65,
        "DIR/work/data/train lacks tokens-00000.bin of its manifest.json: restore or prepare again",
        "",
        remove(SHARD),
    ),
    Case(
        "A held-out shard with a flipped bit",
        65,
        f"DIR/{HELD_OUT} was altered: its sha256 is not the one in manifest.json",
        "",
        flip(HELD_OUT),
        "evaluate",
    ),
    Case(
        "A record of prepared data that is damaged",
        65,
        "DIR/work/data/manifest.json is damaged: splits is null",
        "",
        change("work/data/manifest.json", "splits", value=None),
        "evaluate",
    ),
    Case(
        "A record of prepared data that is missing",
        65,
        "DIR/work/data/manifest.json is missing, but there is DIR/work/data/train: restore it",
        "",
        remove("work/data/manifest.json"),
        "verify",
    ),
    Case("A manifest that was altered", 65, "DIR/work/data/train/manifest.json was altered: *", "", escape),
    Case(
        "A manifest that names files elsewhere",
        65,
        "DIR/work/data/train/manifest.json names '../../../corpus.txt', which is not a file beside it",
        "--config.data.verify=false",
        escape,
    ),
    *(
        Case(what, 65, f"DIR/corpus.txt {message}", "--config.data.dir=DIR/fresh", write("corpus.txt", content))
        for what, message, content in [
            (
                "A file that is compressed twice",
                "is compressed twice: its content is gzip data; decompress it once",
                gzip.compress(gzip.compress(TEXT.encode())),
            ),
            (
                "Compressed data that were cut",
                "is not whole compressed data: *",
                gzip.compress(TEXT.encode())[:-9],
            ),
            (
                "A file that is no text",
                "is a ZIP archive or an Office document: unpack it, or save it as plain text",
                b"PK\x03\x04" + bytes(50),
            ),
        ]
    ),
    Case(
        "A folder of data around the run",
        2,
        "data.files: DIR covers DIR/fresh, which is written to: choose another --workdir, or *",
        "--config.data.files=DIR --config.data.dir=DIR/fresh",
    ),
    Case(
        "A label in held-out data that training data lack",
        65,
        "DIR/valid.csv:2: unknown label 'c'; known are: a, b; correct it, or name all by data.labels",
        "--config.data.files=DIR/train.csv --config.data.valid_files=DIR/valid.csv --config.data.valid_fraction=0 "
        "--config.data.document=file --config.data.example=label --config.data.packing=pad "
        "--config.task.objective=classification --config.model.family=encoder --config.data.dir=DIR/fresh",
        both(
            both(write("train.csv", "text,label\nx,a\ny,b\n"), write("valid.csv", "text,label\nz,c\n")),
            remove("work/checkpoints"),
        ),
    ),
    Case(
        "A token outside the vocabulary",
        65,
        "token 999 in document *vocabulary 259",
        "--config.data.verify=false",
        both(foreign_ids, remove("work/checkpoints")),
    ),
]

RUNS = [
    Case(
        "Nothing was trained", 76, "no checkpoint in DIR/work/checkpoints", "", remove("work/checkpoints"), "evaluate"
    ),
    Case("No run of that name", 66, "there is no run DIR/none: *", "--workdir=DIR/none", verb="evaluate"),
    Case(
        "A file to evaluate on that does not exist",
        66,
        "--files: DIR/none.txt matches no file",
        "--files=DIR/none.txt",
        verb="evaluate",
    ),
    Case(
        "A setting that evaluation does not read",
        2,
        "--config.optimizer.learning_rate has no effect on evaluate: it is a setting of train",
        "--config.optimizer.learning_rate=1",
        verb="evaluate",
    ),
    Case(
        "No checkpoint of that step",
        66,
        "no checkpoint of step 3 in DIR/work/checkpoints; there are [2, 4]",
        "--step=3",
        verb="evaluate",
    ),
    Case(
        "A damaged checkpoint, asked for",
        76,
        "DIR/work/checkpoints/4/* is damaged: its sha256 is not the one in its manifest",
        "--step=4",
        flip("work/checkpoints/4/model"),
        "evaluate",
    ),
    Case(
        "All checkpoints damaged",
        76,
        "no checkpoint is whole: DIR/work/checkpoints/4/* is damaged: *; DIR/work/checkpoints/2/* is damaged: *",
        "",
        flip("work/checkpoints/*"),
    ),
    Case(
        "Another model than before",
        76,
        "DIR/work/checkpoints/4 was made with model.num_layers=1, the config says 2",
        "--config.model.num_layers=2",
    ),
    Case(
        "Another order of the data than before",
        76,
        "DIR/work/checkpoints/4 was made with seed=0, the config says 1",
        "--config.seed=1",
    ),
    Case(
        "Another optimizer than before",
        76,
        "DIR/work/checkpoints/4 was made with optimizer.name=adamw, the config says lion",
        "--config.optimizer.name=lion",
    ),
    Case(
        "A complete run, asked for with another model",
        76,
        "DIR/work was made with model.num_layers=1, the config says 2",
        "--config.model.num_layers=2",
        write("work/result.json", '{"step": 4}'),
    ),
    Case(
        "Other data than before",
        76,
        "DIR/work/checkpoints/4 was made with other data (*): use another --workdir, or put the former back",
        FRESH,
        write("corpus.txt", TEXT + "one more line\n"),
    ),
    Case(
        "Numbers that are not finite",
        70,
        "loss or gradient was not finite in 5 steps in a row, up to step *",
        "--config.optimizer.name=sgd --config.optimizer.learning_rate=1e38 --config.optimizer.clip=0 "
        "--config.optimizer.warmup_steps=0 --config.train.steps=20 --config.checkpoint.every=100",
        remove("work/checkpoints"),
    ),
    Case(
        "Weights that are not finite, about to be saved",
        70,
        "* is not finite at step 2 (* arrays are not): nothing is saved",
        "--config.optimizer.learning_rate=3e38 --config.optimizer.weight_decay=1000 --config.optimizer.warmup_steps=0 "
        "--config.train.steps=20",
        remove("work/checkpoints"),
    ),
    Case(
        "An export in few bits",
        2,
        "export writes no int8: --dtype=float32, bfloat16 or float16",
        "--to=DIR/out --dtype=int8",
        verb="export",
    ),
    Case("Nothing to verify", 66, "DIR/none holds neither checkpoints nor data", "--workdir=DIR/none", verb="verify"),
    Case(
        "Damage, looked for",
        76,
        "DIR/work/checkpoints/2/* is damaged: its sha256 is not the one in its manifest",
        "",
        flip("work/checkpoints/2/model"),
        "verify",
    ),
    Case(
        "A config of a run that was altered",
        76,
        "DIR/work/checkpoints/2 was made with model.activation=gelu, DIR/work/config.json says relu",
        "",
        change("work/config.json", "model", "activation", value="relu"),
        "verify",
    ),
    Case(
        "A ledger that was cut",
        65,
        "DIR/work/ledger ends at step 3, but there is a checkpoint of step 4",
        "",
        last_line("work/ledger/0.jsonl"),
        "audit",
    ),
    Case("No ledger", 66, "DIR/work has no ledger of what was read", "", remove("work/ledger"), "audit"),
    Case(
        "A ledger of another order",
        65,
        "DIR/work/ledger/0.jsonl: steps 1 to 1 read other rows than were due",
        "--config.seed=1",
        verb="audit",
    ),
]

PROMPTS = [
    Case(
        "No prompt, and no terminal",
        2,
        "generate needs --prompt=TEXT or --prompts=FILE; on a terminal it asks for prompts",
        verb="generate",
    ),
    *(
        Case(what, code, message, "--prompts=DIR/prompts.jsonl", write("prompts.jsonl", content), "generate")
        for what, code, message, content in [
            ("A file of prompts that is empty", 66, "prompts file DIR/prompts.jsonl is empty", b"\n"),
            (
                "A line that is no prompt",
                65,
                'DIR/prompts.jsonl:3 is not a JSON object with a "prompt"',
                b'{"prompt": "a"}\n\nhello\n',
            ),
            (
                "A line that is not UTF-8",
                65,
                'DIR/prompts.jsonl:1 is not a JSON object with a "prompt"',
                b'{"prompt": "\xff"}\n',
            ),
            ("A prompt that is no text", 65, 'DIR/prompts.jsonl:1: "prompt" is not text: 3', b'{"prompt": 3}\n'),
            (
                "A prompt that no UTF-8 says",
                65,
                'DIR/prompts.jsonl:1: "prompt" is not text: "\\ud800"',
                b'{"prompt": "\\ud800"}\n',
            ),
        ]
    ),
]

ELSEWHERE = [
    Elsewhere(
        "A setting that may change: the run says so, and goes on",
        0,
        "settings changed since *: log.every * -> *",
        "test_journey.py",
    ),
    Elsewhere(
        "A signal to stop",
        75,
        "SIGTERM: step * is saved; the same command goes on from there",
        "train/test_resume.py",
    ),
    Elsewhere(
        "A signal to another process of the run",
        75,
        "another process is to stop: step * is saved; the same command goes on from there",
        "test_processes.py",
    ),
    Elsewhere(
        "Another process that was killed, or hangs",
        77,
        "process * on * has not answered for * s",
        "parallel/test_heartbeat.py",
    ),
    Elsewhere(
        "No step for much longer than one takes",
        77,
        "no step for * s after step *, where one takes * s; *stacks-0.txt has what each thread is at",
        "resilience/test_watchdog.py",
    ),
    Elsewhere(
        "A second run in the same directory",
        2,
        "* is in use by process * on *, started *: stop it, or take another --workdir",
        "checkpoint/test_run_lock.py",
    ),
    Elsewhere(
        "A device that holds another bit than its copies (`train.check_copies`)",
        77,
        "step *: * on * differs from its copies, bit by bit: leave that device out; a restart goes on from the last "
        "checkpoint",
        "resilience/test_replica_check.py",
    ),
    Elsewhere(
        "A loss spike that comes again (`train.spike`)",
        70,
        "*; leaving out batches after step * did not help, * times",
        "resilience/test_loss_spikes.py",
    ),
    Elsewhere("A full disk", 74, "could not write *: No space left on device", "data/test_shards.py"),
    Elsewhere(
        "A crash loop (`supervise`)",
        1,
        "supervise: 3 times in a row no step was done after step *: giving up",
        "resilience/test_supervisor.py",
    ),
]

TABLE = {"Settings": SETTINGS, "Data": DATA, "Runs": RUNS, "Prompts": PROMPTS}
