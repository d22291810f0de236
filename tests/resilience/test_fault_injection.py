"""A short campaign of faults: every one told, every curve that of the undisturbed run."""

import json
import signal
import subprocess
import sys

import pytest

from lslm_jax.resilience.fault_injection import campaign as campaigns
from lslm_jax.resilience.fault_injection.campaign import Campaign
from lslm_jax.resilience.fault_injection.faults import Fault
from lslm_jax.resilience.fault_injection.run import Run


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
    command = [sys.executable, "-m", "lslm_jax.resilience.fault_injection", *flags, f"--workdir={tmp_path}"]
    campaign = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert campaign.returncode == 0, campaign.stderr
    report = json.loads(campaign.stdout)
    assert report["faults"] == faults and report["runs"] >= 1 and not report["broken"]


@pytest.mark.exhaustive
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


class Clock:
    """Seconds that pass only where runs take time."""

    now = 0.0

    def monotonic(self):
        return self.now


class Pretended:
    """A run that takes a minute for each of its processes, and a step a second."""

    clock = Clock()

    def __init__(self, root, workdir, processes):
        self.workdir, self.processes, self.done = workdir, processes, 0.0
        workdir.mkdir(parents=True, exist_ok=True)

    def start(self, *_):
        self.clock.now += 5.0

    def step(self):
        return int(self.done)

    def until(self, reached):
        while not reached():
            if self.done >= 60:
                return False
            self.done += 1
            self.clock.now += self.processes
        return True

    def end(self):
        self.until(lambda: False)
        (self.workdir / "metrics.jsonl").write_text("the same\n")
        return [0] * self.processes

    def alone(self, *_):
        self.clock.now += 5.0
        return 0, json.dumps({"repeated_steps": 1})

    def kill(self):
        pass


def kill(run, _):
    run.done -= min(run.done, 6)  # back to the checkpoint
    return True


@pytest.mark.parametrize(("minutes", "at_most"), [(1, 180), (5, 330), (20, 1230)])
def test_minutes_are_those_of_the_whole_campaign(tmp_path, monkeypatch, minutes, at_most):
    clock = Pretended.clock = Clock()
    monkeypatch.setattr(campaigns, "time", clock)
    monkeypatch.setattr(campaigns, "Run", Pretended)
    monkeypatch.setattr(campaigns, "FAULTS", [Fault("killed", kill)])
    campaign = Campaign(tmp_path, minutes=minutes, seed=0)
    campaign.go()
    report = campaign.report()
    assert report["faults"] >= 1 and not report["broken"]
    assert clock.now <= at_most
    assert minutes < 20 or clock.now > 0.7 * 60 * minutes
