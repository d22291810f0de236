"""The command line: help, and how soon a mistake is told. Which ones are told is in test_errors.py."""

import errno
import os
import subprocess
import sys

import forked
import pytest
from etils import epath

from lslm_jax.main import main


def test_a_mistake_is_told_within_three_seconds_and_without_importing_jax(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code = "import sys; from lslm_jax.main import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    arguments = [sys.executable, "-c", code, f"--config={tmp_path}/config.json", "--config.train.step=3"]
    process, seconds = forked.timed(arguments)
    assert process.returncode == 2 and seconds < 3.0
    assert not {"jax", "tensorflow", "numpy", "sentencepiece"} & set(process.stdout.split())


def test_help_lists_every_setting_with_its_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config.help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "optimizer.learning_rate (float; 0.0003)\n    Peak learning rate." in output


@pytest.mark.parametrize("section", ["optimizer", "config.optimizer", "data.mixture", "seed"])
def test_help_of_a_section_lists_its_settings_alone(section, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"--config.help={section}"])
    keys = [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    name = section.removeprefix("config.")
    assert stop.value.code == 0 and keys and all(key == name or key.startswith(f"{name}.") for key in keys)


def test_help_of_a_section_that_does_not_exist_names_the_nearest(capsys):
    for section, hint in (("optimiser", "did you mean optimizer?"), ("zzzz", "the sections are ")):
        with pytest.raises(SystemExit) as stop:
            main([f"--config.help={section}"])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith(f"lslm: --config.help={section}: no such section; {hint}")


def test_a_file_that_may_not_be_opened_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.json").write_text("{}")

    def read_text(path):  # modes of files do not hold for root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_text", read_text)
    with pytest.raises(SystemExit) as stop:
        main([f"--config={tmp_path}/c.json", f"--workdir={tmp_path}/run"])
    assert stop.value.code == 66
    assert capsys.readouterr().err == f"lslm: cannot use {tmp_path}/c.json: Permission denied\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lslm_jax.main", "--config.help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (74, "lslm: could not write the output: No space left on device\n")


def test_a_reader_that_ends_early_makes_no_noise():
    reader, writer = os.pipe()
    os.close(reader)  # as `head` after its lines
    command = [sys.executable, "-m", "lslm_jax.main", "--config.help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 66, "cannot use /a/b: No such file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), 66, "cannot use /a: Is a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 66, "cannot use /a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 74, "could not write /a: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 74, "could not write /a: Read-only file system"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_an_error_of_the_system_that_nobody_expected_is_one_line(monkeypatch, capsys, error, code, line):
    def fail(argv):
        raise error

    monkeypatch.setattr(sys.modules["lslm_jax.main"], "_run", fail)
    with pytest.raises(SystemExit) as stop:
        main(["verify"])
    text = capsys.readouterr().err
    assert stop.value.code == code and text.startswith(f"lslm: {line}") and text.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["verify", "--debug"])
    assert "Traceback" in capsys.readouterr().err
