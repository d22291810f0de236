"""A short campaign of faults: every one told, every curve that of the undisturbed run."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_campaign_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "lslm_jax.chaos", "--steps=60", "--most=3", "--seed=3", f"--workdir={tmp_path}"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["faults"] == 3 and found["runs"] >= 1 and not found["broken"]
