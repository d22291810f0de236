"""`launch/slurm.sbatch` on a real Slurm, of one machine: two processes, stopped, put back into the queue, finished."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from loopback import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(shutil.which(name, path="/usr/sbin:/sbin:" + os.environ["PATH"]) for name in DAEMONS)
        or os.getuid() != 0,
        reason="needs Slurm and munge (Debian: apt-get install slurm-wlm munge), and root",
    ),
]

# A requeued job is held back for as long as credentials last, by default two minutes: cred_expire.
SLURM = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=120
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CONFIG = """
from lslm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=2, d_model=32, num_heads=4, max_length=32),
        data=DataConfig(source="synthetic", seq_len=32),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=97),
        train=TrainConfig(steps={steps}, batch_size=8),
        checkpoint=CheckpointConfig(every=1_000_000),
        log=LogConfig(every=1, tensorboard=False, timing=False),
    )
"""


def until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path):
    """The environment of commands that speak to a Slurm of this machine alone."""
    host = socket.gethostname().split(".")[0]
    (tmp_path / "key").write_bytes(os.urandom(1024))
    (tmp_path / "key").chmod(0o400)
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    conf = tmp_path / "slurm.conf"
    conf.write_text(SLURM.format(host=host, at=tmp_path, ports=(free_port(), free_port())))
    (tmp_path / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    environ = os.environ | {"SLURM_CONF": str(conf), "PATH": "/usr/sbin:/sbin:" + os.environ["PATH"]}
    munge = ["munged", "--foreground", "--force", f"--key-file={tmp_path}/key", f"--socket={tmp_path}/munge.socket"]
    munge += [f"--pid-file={tmp_path}/munge.pid", f"--log-file={tmp_path}/munge.log", f"--seed-file={tmp_path}/seed"]
    with contextlib.ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            daemon = stack.enter_context(subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL))
            stack.callback(daemon.terminate)
        idle = lambda: "idle" in ask(environ, "sinfo", "--noheader", "--format=%T")
        logs = lambda: "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
        until(idle, 60, logs)
        yield environ
        ask(environ, "scancel", "--full", "--signal=KILL", f"--nodelist={host}")


def ask(environ, *command):
    found = subprocess.run(command, env=environ, capture_output=True, text=True)
    return found.stdout.strip() + found.stderr.strip()


def state(environ, job):
    shown = ask(environ, "scontrol", "show", "job", "--oneliner", job)
    return dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)


def record(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def submit(environ, tmp_path, workdir, steps):
    config = tmp_path / f"{steps}.py"
    config.write_text(CONFIG.format(steps=steps))
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # The one machine may not know its own name, by which the processes would look for each other.
    variables["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    machine = ["--parsable", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={tmp_path}/%j.out"]
    command = ["sbatch", *machine, str(ROOT / "launch" / "slurm.sbatch"), str(config), str(workdir)]
    job = ask(environ | variables, *command)
    assert job.isdigit(), job
    return job


def test_a_job_that_is_stopped_goes_back_into_the_queue_and_ends_as_if_nothing_had_been(slurm, tmp_path):
    steps = 150
    for name, stop in (("whole", False), ("stopped", True)):
        workdir = tmp_path / name
        job = submit(slurm, tmp_path, workdir, steps)
        output = lambda job=job: (tmp_path / f"{job}.out").read_text() + str(state(slurm, job))
        if stop:
            until(lambda at=workdir: len(record(at)) >= 5, 300, output)
            assert ask(slurm, "scancel", "--signal=TERM", job) == ""
            until(lambda job=job: int(state(slurm, job)["Restarts"]) == 1, 120, output)
            (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
            assert 5 <= saved < steps
            assert f"SIGTERM: step {saved} is saved" in output() and "exit 75: back into the queue" in output()
        until(lambda job=job: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), 400, output)
        assert state(slurm, job)["JobState"] == "COMPLETED", output()
        assert json.loads((workdir / "result.json").read_text())["step"] == steps
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")
