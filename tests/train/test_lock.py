"""A directory belongs to one run at a time, and to none whose process is gone."""

import contextlib
import os
import subprocess
import sys

import pytest
from error_table import assert_told
from etils import epath

from lslm_jax.errors import ConfigError
from lslm_jax.train import lock

HOLD = """
import sys, time
from etils import epath
from lslm_jax.train import lock
with lock.hold(epath.Path(sys.argv[1])):
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
        with pytest.raises(ConfigError, match=said) as error, lock.hold(epath.Path(tmp_path)):
            raise AssertionError("two runs in one directory")
    assert_told("A second run in the same directory", error.value.exit_code, str(error.value))


def test_a_run_that_was_killed_holds_nobody_up(tmp_path):
    with holder(tmp_path):
        pass
    for _ in range(2):  # nor does one that ended
        with lock.hold(epath.Path(tmp_path)):
            assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()


def test_a_damaged_lock_still_locks(tmp_path):
    with holder(tmp_path):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(ConfigError, match="in use by another process"), lock.hold(epath.Path(tmp_path)):
            raise AssertionError("two runs in one directory")
