"""The supervisor runs real commands again where that helps, and only there."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from error_table import assert_told

# Each run of it takes the next of the codes it was given; a negative one is a signal; "s" does a step before.
ACT = """
import json, os, sys, time
_, workdir, *plan = sys.argv[1:] if sys.argv[1] == "--workdir" else ["", *sys.argv[1:]]
workdir = workdir.removeprefix("--workdir=")
done = open(f"{workdir}/done", "a+"); done.seek(0)
turn = len(done.read()); done.write("."); done.close()
act = plan[min(turn, len(plan) - 1)]
if act.startswith("s"):
    path = f"{workdir}/metrics.jsonl"
    step = len(open(path).readlines()) if os.path.exists(path) else 0
    open(path, "a").write(json.dumps({"step": step + 1}) + "\\n")
if act == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(f"{workdir}/waiting", "w").close()
    time.sleep(60)
code = int(act.removeprefix("s"))
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


def command(tmp_path, *plan, flags=()):
    (tmp_path / "act.py").write_text(ACT)
    act = [sys.executable, str(tmp_path / "act.py"), f"--workdir={tmp_path}", *plan]
    return [sys.executable, "-m", "lslm_jax.resilience.supervisor", *flags, "--", *act]


def turns(tmp_path):
    return len((tmp_path / "done").read_text())


@pytest.mark.parametrize(
    ("plan", "flags", "code", "runs", "told"),
    [
        (["0"], [], 0, 1, ""),
        (["s75", "s75", "0"], [], 0, 3, "stopped by a signal, and saved (75), at step 2"),
        (["s77", "0"], [], 0, 2, "another process is gone (77) at step 1"),
        (["s-9", "s-6", "0"], [], 0, 3, "killed by SIGABRT (134) at step 2"),
        (["s1", "1", "s1", "1", "0"], [], 0, 5, "crashed (1) at step 2"),
        (["s165", "s193", "s200", "s255", "0"], [], 0, 5, "crashed (200) at step 3"),
        (["s75"], ["--restarts=2"], 75, 3, "2 restarts are all that --restarts allows"),
        *[([str(code), "0"], [], code, 1, "") for code in (2, 65, 66, 70, 74, 76)],
    ],
)
def test_it_runs_again_after_what_another_try_may_mend(tmp_path, plan, flags, code, runs, told):
    found = subprocess.run(command(tmp_path, *plan, flags=flags), capture_output=True, text=True)
    assert (found.returncode, turns(tmp_path)) == (code, runs), found.stderr
    assert told in found.stderr and (told or not found.stderr)


def test_a_crash_loop_is_told_in_the_last_line(tmp_path):
    found = subprocess.run(command(tmp_path, "s1", "1", "1", "1"), capture_output=True, text=True)
    assert_told("A crash loop (`supervise`)", found.returncode, found.stderr)
    assert "no step was done after step 1: " in found.stderr and turns(tmp_path) == 3


def test_a_signal_goes_to_the_command_whose_end_is_the_end(tmp_path):
    supervisor = subprocess.Popen(command(tmp_path, "wait"))
    while not (tmp_path / "waiting").exists():
        assert supervisor.poll() is None
        time.sleep(0.05)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 75 and turns(tmp_path) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["true"], "say what to run behind --"),
        (["--", "/no/such/program"], "cannot run /no/such/program: No such file"),
    ],
)
def test_a_command_that_cannot_be_run_is_told_in_one_line(arguments, message):
    found = subprocess.run(
        [sys.executable, "-m", "lslm_jax.resilience.supervisor", *arguments], capture_output=True, text=True
    )
    assert found.returncode == 2 and message in found.stderr


def test_metrics_that_cannot_be_read_count_as_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4}) + "\n{torn")
    found = subprocess.run(command(tmp_path, "1"), capture_output=True, text=True)
    assert "at step 4" in found.stderr and turns(tmp_path) == 3


def test_a_run_directory_in_a_word_of_its_own_is_found(tmp_path):
    (tmp_path / "act.py").write_text(ACT)
    act = [sys.executable, str(tmp_path / "act.py"), "--workdir", str(tmp_path), "s1", "s1", "s1", "s1", "0"]
    found = subprocess.run(
        [sys.executable, "-m", "lslm_jax.resilience.supervisor", "--", *act], capture_output=True, text=True
    )
    assert found.returncode == 0 and "at step 4" in found.stderr, found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal to children")
def test_the_command_does_not_outlive_a_supervisor_that_was_killed(tmp_path):
    supervisor = subprocess.Popen(command(tmp_path, "wait"))
    while not (tmp_path / "waiting").exists():
        assert supervisor.poll() is None
        time.sleep(0.05)
    (child,) = map(
        int,
        (pathlib.Path("/proc") / str(supervisor.pid) / "task" / str(supervisor.pid) / "children").read_text().split(),
    )
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 20
    while (pathlib.Path("/proc") / str(child)).exists():
        state = (pathlib.Path("/proc") / str(child) / "stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # nobody takes its code here
            break
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)
