"""A directory belongs to one run at a time, and to none whose process is gone."""

import os
import signal
import subprocess
import sys

import pytest
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


def holder(directory):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_whose_the_directory_is(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match=rf"is in use by process {process.pid} on \S+, started 20\d\d-"):
            with lock.hold(epath.Path(tmp_path)):
                raise AssertionError("two runs in one directory")
    finally:
        process.kill()
        process.wait()


def test_a_run_that_was_killed_holds_nobody_up(tmp_path):
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(2):  # nor does one that ended
        with lock.hold(epath.Path(tmp_path)):
            assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()


def test_a_damaged_lock_still_locks(tmp_path):
    process = holder(tmp_path)
    try:
        (tmp_path / "lock").write_text("{")
        with pytest.raises(ConfigError, match="in use by another process"):
            with lock.hold(epath.Path(tmp_path)):
                pass
    finally:
        process.kill()
        process.wait()
