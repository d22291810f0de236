"""A short campaign of faults: every one told, every curve that of the undisturbed run."""

import json
import signal
import subprocess
import sys

import pytest

from lslm_jax.chaos.campaign import Campaign
from lslm_jax.chaos.run import Run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_campaign_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "lslm_jax.chaos", "--steps=60", "--most=3", "--seed=3", f"--workdir={tmp_path}"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["faults"] == 3 and found["runs"] >= 1 and not found["broken"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_killed_during_a_save_is_no_failing_disk_to_the_other(tmp_path):
    """What a collective of the save raises there must not be taken for what a disk does (74: nobody tries again)."""
    Campaign(tmp_path, minutes=0, seed=0, only="")
    run = Run(tmp_path, tmp_path / "run", processes=2)
    run.start()
    assert run.until(lambda: any(run.workdir.glob("checkpoints/*"))), run.said()
    run.signal(signal.SIGKILL, 1)
    assert run.end() == [77, -signal.SIGKILL], run.said()
    assert "process 1" in run.said() and "cannot save" not in run.said()
