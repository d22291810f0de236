"""Hugging Face directories that a run leaves behind: those of exactly the due steps, whatever killed it in between."""

import json
import os
import pathlib
import shutil
import signal
import time

import forked
import pytest
from safetensors.numpy import load_file

from lslm_jax.main import main

STEPS, EVERY, EXPORT = 14, 2, 4
RUN = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 32},
    "data": {"document": "line", "valid_fraction": 0.1, "seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": STEPS, "batch_size": 8, "ema": 0.9},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
    "checkpoint": {"every": EVERY, "keep": 100, "export_every": EXPORT},
    "eval": {"every": EXPORT, "batches": 2},
    "log": {"every": 1, "timing": False, "tensorboard": False},
}
DUE = ["12", "4", "8"]


def killed_at_the_second_export(*arguments: str) -> None:
    """Runs the command; kills the process once the checkpoint of step 8 is complete and its weights are written."""
    from lslm_jax.convert import safetensors_io

    write = safetensors_io.write_directory

    def write_and_die(directory, *rest):
        files = write(directory, *rest)
        if directory.name.startswith("8"):
            while not (directory.parent.parent / "checkpoints/8/manifest.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return files

    safetensors_io.write_directory = write_and_die
    main(arguments)


def flags(root: pathlib.Path, work: str) -> list[str]:
    return [f"--config={root}/config.json", f"--workdir={root}/{work}"]


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def weights_of(path: pathlib.Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A directory with a config, its corpus and a finished run, `work`."""
    root = tmp_path_factory.mktemp("run")
    text = "".join(f"Line {n} of a corpus that is long enough to train on for a few steps.\n" for n in range(400))
    (root / "corpus.txt").write_text(text)
    data = RUN["data"] | {"files": [f"{root}/corpus.txt"], "dir": f"{root}/data"}
    (root / "config.json").write_text(json.dumps(RUN | {"data": data}))
    assert ended(flags(root, "work")) == 0
    return root


def test_exports_are_those_of_the_due_steps_and_hold_their_averaged_weights(finished, tmp_path):
    exports = finished / "work" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == DUE
    assert len({weights_of(exports / step) for step in DUE}) == 3
    for step in DUE:
        assert ended(["export", *flags(finished, "work"), f"--step={step}", f"--to={tmp_path}/{step}"]) == 0
        names = {path.name for path in (tmp_path / step).iterdir()}
        assert {path.name for path in (exports / step).iterdir()} == names
        for name in names - {"README.md"}:
            assert (exports / step / name).read_bytes() == (tmp_path / step / name).read_bytes(), name
        assert "| eval/loss |" in (exports / step / "README.md").read_text()


def test_nothing_else_of_a_run_changes(finished):
    assert ended([*flags(finished, "without"), "--config.checkpoint.export_every=0"]) == 0
    assert not (finished / "without" / "exports").exists()
    lines = [(finished / name / "metrics.jsonl").read_bytes() for name in ("work", "without")]
    assert lines[0] == lines[1]


def test_what_is_missing_is_made_up_from_the_checkpoints_when_the_run_goes_on(finished, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    expected = {step: weights_of(finished / "work" / "exports" / step) for step in DUE}
    for step in ("4", "12"):
        shutil.rmtree(root / "work" / "exports" / step)
    shutil.rmtree(root / "work" / "checkpoints" / "4")  # which cannot be made up any more
    for step in range(13, STEPS + 1):
        shutil.rmtree(root / "work" / "checkpoints" / str(step), ignore_errors=True)
    (root / "work" / "result.json").unlink()
    assert ended([f"--config={finished}/config.json", f"--workdir={root}/work"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "exported now" in line]
    assert len(told) == 1 and told[0].startswith("step 12: ")
    exports = root / "work" / "exports"
    assert {path.name: weights_of(path) for path in exports.iterdir()} == {s: expected[s] for s in ("8", "12")}


@pytest.mark.slow
def test_a_run_killed_between_checkpoint_and_export_makes_it_up(finished, tmp_path):
    arguments = [f"--config={finished}/config.json", f"--workdir={tmp_path}/work"]
    killed = forked.Process(killed_at_the_second_export, *arguments, env=os.environ)
    killed.wait(180)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    exports = tmp_path / "work" / "exports"
    assert (tmp_path / "work/checkpoints/8").exists() and not (exports / "8").exists()
    assert load_file(exports / "8.tmp" / "model.safetensors")
    again = forked.run(*arguments)
    assert again.returncode == 0, again.stderr
    assert "step 8: exported now" in again.stderr
    assert sorted(path.name for path in exports.iterdir()) == DUE
    for step in DUE:
        assert weights_of(exports / step) == weights_of(finished / "work/exports" / step)
    metrics = [root / "metrics.jsonl" for root in (tmp_path / "work", finished / "work")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "checkpoint.export_every=3",
            "checkpoint.export_every=3 is not a multiple of checkpoint.every=2, so that each export has its "
            "checkpoint: use 2 or 4",
        ),
        ("model.norm=rmsnorm", "no family of Hugging Face has such models: gpt2 has no model.norm=rmsnorm; "),
        ("data.source=synthetic", "checkpoint.export_every=4 needs a vocabulary, which data.source=synthetic lacks"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_else(setting, message, finished, tmp_path, capsys):
    arguments = [f"--config={finished}/config.json", f"--workdir={tmp_path}/work", f"--config.data.dir={tmp_path}/data"]
    assert ended([*arguments, f"--config.{setting}"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "data").exists() and not (tmp_path / "work" / "metrics.jsonl").exists()
