"""The command line: help, and how soon a mistake is told. Which ones are told is in test_errors.py."""

import errno
import subprocess
import sys
import time

import pytest
from etils import epath

from lslm_jax.main import main, unreadable


def test_a_mistake_is_told_within_three_seconds_and_without_importing_jax(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    begun = time.monotonic()
    code = "import sys; from lslm_jax.main import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    arguments = [sys.executable, "-c", code, f"--config={tmp_path}/config.json", "--config.train.step=3"]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 2 and time.monotonic() - begun < 3.0
    assert not {"jax", "tensorflow", "numpy", "sentencepiece"} & set(process.stdout.split())


def test_help_lists_every_setting_with_its_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config.help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "optimizer.learning_rate (float; 0.0003)\n    Peak learning rate." in output


def test_a_file_that_may_not_be_opened_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.json").write_text("{}")

    def read_text(path):  # modes of files do not hold for root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_text", read_text)
    with pytest.raises(SystemExit) as stop:
        main([f"--config={tmp_path}/c.json", f"--workdir={tmp_path}/run"])
    assert stop.value.code == 66
    assert capsys.readouterr().err == f"lslm: could not read {tmp_path}/c.json: Permission denied\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "could not read a.txt: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), ""),
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), ""),
        (PermissionError("nothing is known"), ""),
        (ValueError("a.txt"), ""),
    ],
)
def test_only_files_that_may_not_be_opened_are_an_error_of_the_user(error, message):
    assert unreadable(error) == message
