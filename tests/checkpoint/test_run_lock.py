"""A directory belongs to one run at a time, and to none whose process is gone."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys

import pytest
from error_table import assert_told
from etils import epath

from lslm_jax.checkpoint import run_lock
from lslm_jax.errors import ConfigError, SaveError

HOLD = """
import sys, time
from etils import epath
from lslm_jax.checkpoint import run_lock
with run_lock.hold(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(directory):
    """Another process that has the directory."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_whose_the_directory_is(tmp_path):
    with holder(tmp_path) as process:
        said = rf"is in use by process {process.pid} on \S+, started 20\d\d-"
        with pytest.raises(ConfigError, match=said) as error, run_lock.hold(epath.Path(tmp_path)):
            raise AssertionError("two runs in one directory")
    assert_told("A second run in the same directory", error.value.exit_code, str(error.value))


def test_a_run_that_was_killed_holds_nobody_up(tmp_path):
    with holder(tmp_path):
        pass
    for _ in range(2):  # nor does one that ended
        with run_lock.hold(epath.Path(tmp_path)):
            assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()


def test_a_damaged_lock_still_locks(tmp_path):
    with holder(tmp_path):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(ConfigError, match="in use by another process"), run_lock.hold(epath.Path(tmp_path)):
            raise AssertionError("two runs in one directory")


def test_a_lock_that_is_removed_or_replaced_while_it_is_held_is_noticed(tmp_path):
    workdir = epath.Path(tmp_path)
    with run_lock.hold(workdir):
        run_lock.check(workdir)
        (tmp_path / "lock").unlink()
        with pytest.raises(SaveError, match="was removed or replaced while this run held it"):
            run_lock.check(workdir)
        (tmp_path / "lock").write_text("{}")
        with pytest.raises(SaveError, match="was removed or replaced"):
            run_lock.check(workdir)
    run_lock.check(workdir)  # which this process does not hold any more


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(outside)
    with (
        pytest.raises(SaveError, match="symbolic link, which is not followed"),
        run_lock.hold(epath.Path(tmp_path / "run")),
    ):
        raise AssertionError("followed")
    assert outside.read_text() == "precious"


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_file_locks_signs_of_life_keep_a_second_run_out(tmp_path, without_locks, capsys):
    workdir = epath.Path(tmp_path)
    with run_lock.hold(workdir):
        assert "has no file locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on"), run_lock.hold(workdir):
            raise AssertionError("two runs in one directory")
    with run_lock.hold(workdir):  # it is free again
        pass


@pytest.mark.parametrize(("age", "is_free"), [(10, False), (120, True)])
def test_a_holder_on_another_host_is_judged_by_its_last_sign_of_life(tmp_path, without_locks, age, is_free):
    path = tmp_path / "lock.alive"
    path.write_text('{"host": "elsewhere", "pid": 1, "started": "then", "token": "x"}')
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    with contextlib.nullcontext() if is_free else pytest.raises(ConfigError, match="process 1 on elsewhere"):
        with run_lock.hold(epath.Path(tmp_path)):
            pass
