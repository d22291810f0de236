"""A run is read only with its own tokenizer, data, labels and model; any file is scored as it is."""

import ctypes
import json
import os
import pathlib
import random
import shutil
import struct

import forked
import jax
import pytest
from etils import epath

from lslm_jax.checkpoint import run_consistency, run_dir
from lslm_jax.config import Config, DataConfig, loading
from lslm_jax.errors import CheckpointRefused
from lslm_jax.main import main
from lslm_jax.parallel import multihost

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 4
CONFIG = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 32},
    "data": {"document": "line", "seq_len": 32, "max_documents": 190},
    "tokenizer": {"vocab_size": 290},
    "train": {"steps": STEPS, "batch_size": 8},
    "optimizer": {"learning_rate": 0.1, "warmup_steps": 1},
    "checkpoint": {"every": 2},
    "eval": {"batches": 1, "every": 0},
    "log": {"every": 1, "tensorboard": False},
}


def sentences(letters: str, count: int, seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(60)]
    return "".join(" ".join(rng.choices(words, k=8)) + "\n" for _ in range(count))


def lslm(capsys, *arguments: str, code: int = 0) -> str:
    """Runs a command; returns its stdout, or the last line on stderr of one that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    output = capsys.readouterr()
    assert stop.value.code == code, output.err
    assert "Traceback" not in output.err
    return output.out if code == 0 else output.err.strip().splitlines()[-1].removeprefix("lslm: ")


def evaluated(capsys, *arguments: str) -> dict:
    return json.loads(lslm(capsys, "evaluate", *arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A finished run; other text and data prepared from it, whose tokenizer has the same size."""
    root = tmp_path_factory.mktemp("made")
    for name, letters, count in (("a", "abcdefg", 200), ("valid", "abcdefg", 40), ("b", "hijklmn", 200)):
        (root / f"{name}.txt").write_text(sentences(letters, count, len(name)))
    (root / "config.json").write_text(json.dumps(CONFIG))
    base = [f"--config={root}/config.json", f"--config.data.valid_files={root}/valid.txt"]
    for command in (
        ["train", *base, f"--workdir={root}/run", f"--config.data.files={root}/a.txt"],
        ["prepare", *base, f"--workdir={root}/x", f"--config.data.dir={root}/b", f"--config.data.files={root}/b.txt"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    return root


@pytest.fixture
def run(made, tmp_path) -> pathlib.Path:
    """A copy of the run; its config names the same text."""
    return pathlib.Path(shutil.copytree(made / "run", tmp_path / "run"))


def train_flags(made: pathlib.Path, run: pathlib.Path) -> list[str]:
    files = [f"--config.data.files={made}/a.txt", f"--config.data.valid_files={made}/valid.txt"]
    return ["train", f"--config={made}/config.json", f"--workdir={run}", *files]


# Evaluation on files.


def test_a_file_is_scored_as_the_held_out_split_made_of_it_and_another_one_is_not(made, capsys):
    workdir = f"--workdir={made}/run"
    own = evaluated(capsys, workdir)
    result = json.loads((made / "run" / "result.json").read_text())
    assert (own["split"], own["eval/examples"]) == ("valid", 40) and result["eval/examples"] < 40  # eval.batches=1
    same = evaluated(capsys, workdir, f"--files={made}/valid.txt")
    scores = ("eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/tokens", "eval/examples")
    assert [same[name] for name in scores] == [own[name] for name in scores]
    assert same["files"] == [f"{made}/valid.txt"]

    other = evaluated(capsys, workdir, "--files", f"{made}/b.txt", f"{made}/valid.txt")
    assert other["eval/examples"] == 240 and other["eval/loss"] > own["eval/loss"] + 0.5
    few = evaluated(capsys, workdir, f"--files={made}/b.txt", "--config.data.max_documents=3")
    assert few["eval/examples"] == 3 and own["eval/examples"] == 40
    # The settings that name held-out files do the same.
    alone = evaluated(capsys, workdir, f"--files={made}/b.txt")
    for key in ("valid_files", "test_files"):
        found = evaluated(capsys, workdir, f"--config.data.{key}={made}/b.txt")
        assert (found["files"], found["eval/loss"]) == ([f"{made}/b.txt"], alone["eval/loss"])
    assert evaluated(capsys, workdir, f"--config.data.valid_files={made}/valid.txt")["split"] == "valid"

    # No evaluation overwrites another one, and each has a line per example whose mean loss is the loss.
    paths = {name["evaluation"] for name in (own, same, other, alone)}
    assert len(paths) == 4
    for found in (own, other):
        record = json.loads(pathlib.Path(found["evaluation"]).read_text())
        assert record.items() >= {k: v for k, v in found.items() if k != "evaluation"}.items()
        assert record["config"]["model"]["d_model"] == 32
        lines = [json.loads(line) for line in pathlib.Path(found["predictions"]).read_text().splitlines()]
        assert [line["example"] for line in lines] == list(range(found["eval/examples"]))
        tokens = sum(line["tokens"] for line in lines)
        assert tokens == found["eval/tokens"]
        mean = sum(line["loss"] * line["tokens"] for line in lines) / tokens
        assert mean == pytest.approx(found["eval/loss"], rel=1e-5)
    assert lines[0]["origin"] == f"{made}/b.txt:1" and lines[-1]["origin"] == f"{made}/valid.txt:40"
    assert lines[0]["text"] == (made / "b.txt").read_text().splitlines()[0]


@pytest.mark.parametrize("flag", ["--files=", "--config.data.valid_files=", "--config.data.test_files="])
def test_a_file_that_does_not_exist_is_a_missing_input(flag, made, capsys):
    message = lslm(capsys, "evaluate", f"--workdir={made}/run", f"{flag}{made}/none.txt", code=66)
    assert message == f"--files: {made}/none.txt matches no file"


def test_a_file_may_have_a_comma_in_its_name_and_be_compressed_jsonl(made, tmp_path, capsys):
    (tmp_path / "a,b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in ("abc de", "fg ab")))
    flags = [f"--workdir={made}/run", f"--files={tmp_path}/a,b.jsonl", "--config.data.text_key=body"]
    assert evaluated(capsys, *flags)["eval/examples"] == 2
    (tmp_path / "empty.txt").write_text("\n\n")
    message = lslm(capsys, "evaluate", f"--workdir={made}/run", f"--files={tmp_path}/empty.txt", code=66)
    assert message == f"nothing to evaluate on in {tmp_path}/empty.txt; dropped: 2 too_short"


# What does not belong together.


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt=ab"], ["export", "--to={tmp}/out"]])
def test_data_of_another_tokenizer_of_the_same_size_are_rejected(command, made, tmp_path, capsys):
    flags = [word.replace("{tmp}", str(tmp_path)) for word in command]
    message = lslm(capsys, *flags, f"--workdir={made}/run", f"--config.data.dir={made}/b", code=76)
    assert message.startswith(f"{made}/run/checkpoints/{STEPS} was trained with another tokenizer (")
    assert f") than the one in {made}/b (" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["b", "run", "run/checkpoints/4", "run/data/train"])
def test_an_export_into_data_or_a_run_is_rejected_and_changes_nothing(to, made, capsys):
    before = {path: path.read_bytes() for path in sorted((made / to).rglob("*")) if path.is_file()}
    message = lslm(capsys, "export", f"--workdir={made}/run", f"--to={made}/{to}", code=2)
    what = "is a run directory" if to == "run" else "holds prepared data or a checkpoint"
    assert message == f"--to={made}/{to} {what}: choose another for the export"
    assert before == {path: path.read_bytes() for path in sorted((made / to).rglob("*")) if path.is_file()}


def test_labels_of_other_data_are_compared_with_those_of_the_checkpoint(tmp_path):
    config = Config(data=DataConfig(files=("a.csv",)))
    run, other = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "other")
    run.mkdir()
    (run / "config.json").write_text(loading.to_json(config))
    saved = {"data_sha256": "a", "data_facts": {"labels": ["x", "y"]}}
    with pytest.raises(CheckpointRefused, match=r"checkpoints/3 was trained with the labels x, y; .*other has y, x$"):
        run_consistency.check_data(saved, config, {"sha256": "b", "labels": ["y", "x"]}, other, run, 3)
    run_consistency.check_data(saved, config, {"sha256": "b", "labels": ["x", "y"]}, other, run, 3)


COMMANDS = ["evaluate", "generate --prompt=ab", "export --to=OUT", "audit", "verify"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_or_data_put_in_place_of_the_own_are_rejected(command, made, run, tmp_path, capsys):
    flags = [*command.replace("OUT", f"{tmp_path}/out").split(), f"--workdir={run}"]
    name = json.loads((run / "data" / "manifest.json").read_text())["tokenizer"]["file"]
    shutil.copy(made / "b" / name, run / "data" / name)  # its manifest still names the former one
    # `verify` compares files with the manifest beside them, and that one with the checkpoints.
    expected = "was trained with another tokenizer"
    code, message = (65, "was altered") if command == "verify" else (76, expected)
    assert message in lslm(capsys, *flags, code=code)
    shutil.rmtree(run / "data")
    shutil.copytree(made / "b", run / "data")
    assert expected in lslm(capsys, *flags, code=76)


@pytest.mark.parametrize("command", COMMANDS)
def test_other_data_of_the_same_tokenizer_in_place_of_the_own_are_rejected(command, made, run, tmp_path, capsys):
    shutil.rmtree(run / "data")
    files = [f"--config.data.files={made}/b.txt", f"--config.data.valid_files={made}/valid.txt"]
    tokenizer = f"--config.tokenizer.path={made}/run/data/tokenizer.model"
    lslm(capsys, "prepare", f"--config={made}/config.json", f"--workdir={run}", *files, tokenizer)
    flags = [*command.replace("OUT", f"{tmp_path}/out").split(), f"--workdir={run}"]
    assert "was trained on other data" in lslm(capsys, *flags, code=76)
    if command == "evaluate":  # which scores any text with the tokenizer of the run, but says which
        (tmp_path / "config.json").write_text((run / "config.json").read_text())
        found = evaluated(capsys, f"--workdir={made}/run", f"--config.data.dir={run}/data")
        assert found["data_dir"] == f"{run}/data"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--config.model.norm_eps=0.1", 76, "was made with model.norm_eps=1e-05, the config says 0.1"),
        ("--config.model.d_model=64", 76, "was made with model.d_model=32, the config says 64"),
        ("--config.model.num_layers=2", 76, "was made with model.num_layers=1, the config says 2"),
        ("--config.clean.min_chars=9", 2, "--config.clean.min_chars has no effect on evaluate: the data of *"),
        ("--config.optimizer.learning_rate=1", 2, "--config.optimizer.learning_rate has no effect on evaluate: *"),
        ("--config=FILE", 2, "was prepared with clean.min_chars=1, not 7: *"),
        ("--config=OTHER", 76, "was made with model.activation=gelu, the config says relu"),
    ],
)
def test_settings_that_evaluation_would_ignore_or_the_weights_do_not_fit_are_rejected(
    flags, code, message, made, tmp_path, capsys
):
    config = json.loads((made / "run" / "config.json").read_text())
    (tmp_path / "file.json").write_text(json.dumps(config | {"clean": config["clean"] | {"min_chars": 7}}))
    (tmp_path / "other.json").write_text(json.dumps(config | {"model": config["model"] | {"activation": "relu"}}))
    flags = flags.replace("FILE", f"{tmp_path}/file.json").replace("OTHER", f"{tmp_path}/other.json")
    found = lslm(capsys, "evaluate", f"--workdir={made}/run", flags, code=code)
    assert message.removesuffix("*") in found


def test_a_run_that_does_not_exist_is_named(made, capsys):
    for command in ("evaluate", "audit"):
        message = lslm(capsys, command, f"--workdir={made}/rum", code=66)
        assert message == f"there is no run {made}/rum: did you mean {made}/run?"
    assert lslm(capsys, "generate", "--workdir=/nowhere/at/all", "--prompt=x", code=66).startswith("there is no run")


# Complete runs.


def test_a_complete_run_gives_its_result_only_for_what_it_was_trained_with(made, run, tmp_path, capsys):
    flags, result = train_flags(made, run), run_dir.read_result(epath.Path(run))
    assert json.loads(lslm(capsys, *flags)) == result
    assert json.loads(lslm(capsys, *flags, "--config.log.every=5", "--config.checkpoint.keep=9")) == result
    for setting, old, new in (
        ("optimizer.learning_rate", "0.1", "0.2"),
        ("eval.batches", "1", "2"),
        ("train.steps", "4", "2"),
        ("model.dropout", "0.0", "0.1"),
        ("model.dtype", '"float32"', '"bfloat16"'),
        ("train.label_smoothing", "0.0", "0.1"),
    ):
        value = new.strip('"')
        message = lslm(capsys, *flags, f"--config.{setting}={value}", code=76)
        start = f"{run} is complete and was made with {setting}={old}, the config says {new}: "
        assert message.startswith(start), message
    assert "was made with seed=0, the config says 1" in lslm(capsys, *flags, "--config.seed=1", code=76)
    message = lslm(capsys, *flags, f"--config.data.dir={made}/b", f"--config.data.files={made}/b.txt", code=76)
    assert "was trained with another tokenizer" in message
    message = lslm(capsys, *flags, f"--config.data.dir={tmp_path}/fresh", code=76)
    assert message.startswith(f"{run} is complete and was trained on the data in ")
    message = lslm(capsys, *flags, f"--config.data.files={made}/b.txt", code=2)
    assert "was prepared with data.files=" in message
    (run / "config.json").rename(tmp_path / "config.json")  # the checkpoint holds it as well
    assert json.loads(lslm(capsys, *flags)) == result
    message = lslm(capsys, *flags, "--config.optimizer.learning_rate=0.2", code=76)
    assert message.startswith(f"{run} is complete and was made with optimizer.learning_rate=0.1")
    (tmp_path / "config.json").rename(run / "config.json")
    shutil.rmtree(run / "data")  # to save space: the result is still that of the same command
    assert json.loads(lslm(capsys, *flags)) == result
    message = lslm(capsys, *flags, f"--config.data.files={made}/b.txt", code=76)
    assert "is complete and was made with data.files=" in message


# Where a run starts from, and how long it is.


def test_weights_to_start_from_are_looked_for_before_data_are_prepared(made, tmp_path, capsys):
    for start, message in (
        ("rum", f"does not exist; did you mean {made}/run?"),
        ("run/checkpoints/3", "does not exist; there are [2, 4]"),
        ("b", "is neither a run (checkpoints/), nor a checkpoint of one (RUN/checkpoints/N), nor a Hugging Face *"),
    ):
        flags = [*train_flags(made, tmp_path / "new"), f"--config.train.init_from={made}/{start}"]
        found = lslm(capsys, *flags, code=66)
        assert found.startswith(f"train.init_from={made}/{start} {message.removesuffix('*')}"), found
        assert not (tmp_path / "new" / "data").exists()


def test_weights_of_another_tokenizer_are_rejected_before_data_are_prepared(made, tmp_path, capsys):
    for setting in ("tokenizer.kind=bytes", f"tokenizer.path={made}/b/tokenizer.model"):
        flags = [f"--config.train.init_from={made}/run", f"--config.{setting}"]
        message = lslm(capsys, *train_flags(made, tmp_path / "new"), *flags, code=76)
        assert message.startswith(f"{made}/run/checkpoints/{STEPS} was made with another tokenizer (")
        assert not (tmp_path / "new" / "data").exists()


def test_weights_to_start_from_may_be_a_run_or_one_of_its_checkpoints(made, tmp_path):
    from lslm_jax.train.restore_or_init import find_start

    checkpoints = made / "run" / "checkpoints"
    assert tuple(find_start(f"{made}/run")) == (checkpoints, False, None)
    assert tuple(find_start(str(checkpoints))) == (checkpoints, False, None)
    assert tuple(find_start(f"{checkpoints}/2")) == (checkpoints, False, 2)


def test_epochs_become_steps_and_prepare_tells_rows(made, tmp_path, capsys):
    flags = train_flags(made, tmp_path / "run")
    prepared = json.loads(lslm(capsys, "prepare", *flags[1:]))
    rows = prepared["rows_per_epoch"]
    assert prepared["steps_per_epoch"] == rows / 8 and prepared["tokens"] // 32 - rows in range(-60, 60)
    result = json.loads(lslm(capsys, *flags, "--config.train.epochs=0.2"))
    steps = -(-2 * rows // 80)
    assert result["step"] == steps
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == steps
    assert json.loads(lslm(capsys, *flags, "--config.train.epochs=0.2")) == result  # complete
    assert "is complete" in lslm(capsys, *flags, "--config.train.epochs=0.1", code=76)


# Directories that may only be read.


def _without_privileges(arguments: list[str]) -> None:
    """Runs a command that file modes hold for, also where the tests are root's."""
    if os.geteuid() == 0:
        header = struct.pack("<Ii", 0x20080522, 0)  # of capset: version 3, this process
        assert ctypes.CDLL(None).capset(header, bytes(24)) == 0
    main(arguments)


def test_a_run_that_may_only_be_read_is_evaluated_and_asked(made, tmp_path):
    root = pathlib.Path(shutil.copytree(made, tmp_path / "made"))
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for arguments in (["evaluate"], ["generate", "--prompt=ab", "--json"], ["audit"], ["verify"]):
        process = forked.Process(_without_privileges, [*arguments, f"--workdir={root}/run"], env=os.environ)
        assert process.wait(200) == 0, process.stderr
        if arguments == ["evaluate"]:
            found = json.loads(process.stdout)
            assert "is not writable: the evaluation goes to" in process.stderr
            assert not found["evaluation"].startswith(str(root))
            assert pathlib.Path(found["evaluation"]).exists()
            shutil.rmtree(pathlib.Path(found["evaluation"]).parent)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


# Directories of several hosts.


@pytest.mark.parametrize("is_shared", [True, False])
def test_processes_must_see_the_same_run_directory(tmp_path, monkeypatch, is_shared):
    """As seen by process 1: the file that process 0 has written is there, or in another directory of that name."""
    values = {}
    probe = run_consistency._write_probe(epath.Path(tmp_path)) if is_shared else ".shared-elsewhere"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "is_primary", lambda: False)
    monkeypatch.setattr(multihost, "by_primary", lambda name, work: probe)
    monkeypatch.setattr(multihost, "check_equal", lambda name, found, remedy: values.update(found))
    run_consistency.check_shared(epath.Path(tmp_path), seconds=0.2)
    assert values == {f"a --workdir={tmp_path} that process 0 can write to": is_shared}
