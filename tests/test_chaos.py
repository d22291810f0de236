"""A short campaign of faults: every one told, every curve that of the undisturbed run."""

import json
import signal
import subprocess
import sys

import pytest

from lslm_jax.chaos.campaign import Campaign
from lslm_jax.chaos.run import Run


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("flags", "faults"),
    [
        (["--steps=36", "--most=1", "--only=SIGKILL during a save"], 1),
        (["--steps=60", "--most=15", "--seed=3"], 15),
    ],
    ids=["one fault", "fifteen faults"],
)
def test_a_campaign_loses_nothing(flags, faults, tmp_path):
    command = [sys.executable, "-m", "lslm_jax.chaos", *flags, f"--workdir={tmp_path}"]
    campaign = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert campaign.returncode == 0, campaign.stderr
    report = json.loads(campaign.stdout)
    assert report["faults"] == faults and report["runs"] >= 1 and not report["broken"]


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
