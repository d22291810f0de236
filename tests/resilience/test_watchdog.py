"""A run whose steps stop coming ends, and leaves the stacks of its threads; one that pauses goes on."""

import subprocess
import sys
import textwrap

import pytest
from error_table import assert_told

from lslm_jax.errors import PeerLost

STUCK = """
def waits_for_what_never_comes():
    time.sleep(60)

waits_for_what_never_comes()
"""
PAUSED = """
with watchdog.pause():
    time.sleep(3)
watchdog.step(7)
"""


def run(tmp_path, seconds, then, stacks="stacks-0.txt"):
    """Six quick steps, and then what `then` does."""
    program = f"""
import time
from etils import epath
from lslm_jax.resilience.watchdog import Watchdog

with Watchdog({seconds}, epath.Path({str(tmp_path / stacks)!r})) as watchdog:
    for step in range(1, 7):
        watchdog.step(step)
        time.sleep(0.1)
{textwrap.indent(then, "    ")}
print("done")
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_a_run_without_steps_ends_with_77_and_leaves_what_each_thread_is_at(tmp_path):
    ended = run(tmp_path, 1.0, STUCK)
    assert_told("No step for much longer than one takes", ended.returncode, ended.stderr)
    assert ended.stderr.startswith("lslm: no step for 1 s after step 6, where one takes 0.1 s; ") and not ended.stdout
    assert "waits_for_what_never_comes" in (tmp_path / "stacks-0.txt").read_text()


def test_it_ends_as_well_where_nothing_can_be_written(tmp_path):
    ended = run(tmp_path, 1.0, STUCK, "absent/stacks-0.txt")
    assert ended.returncode == PeerLost.exit_code and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("seconds", "then"), [(1.0, PAUSED), (0.0, "time.sleep(2)")])
def test_pauses_may_take_their_time_and_0_watches_nothing(tmp_path, seconds, then):
    ended = run(tmp_path, seconds, then)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
