"""Real processes, one of which is killed, stopped, or fails: the others end, and say why."""

import os
import signal
import socket
import subprocess
import sys
import time

import forked
import pytest
from error_table import assert_told
from loopback import free_port

from lslm_jax.errors import DataError, PeerLost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PATIENCE = 4.0


def add_up(coordinator, processes, process, patience, failing, rounds):
    """Adds up over all processes, again and again, as a train step does; process `failing` fails in the third round."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from lslm_jax.parallel import heartbeat, multihost

    multihost.start(coordinator, processes, process, patience)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    add = jax.jit(jnp.sum, out_shardings=replicated)
    try:
        for round in range(rounds):
            ones = jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1))
            assert int(add(ones)) == mesh.size
            if round == 3:
                open(f"up-{process}", "w").close()
                if failing == process:
                    raise DataError("shard 3 is cut")
            time.sleep(0.05)
    except DataError as error:
        print(f"lslm: {error}", file=sys.stderr)
        heartbeat.end(error.exit_code, str(error))
    except Exception as error:
        heartbeat.explain(error)
        heartbeat.end(1, "not explained")
    time.sleep(2.0 * process)
    heartbeat.end()


class Job:
    def __init__(self, tmp_path, processes, failing=None, rounds=100_000, patience=PATIENCE):
        coordinator = f"127.0.0.1:{free_port()}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        arguments = [(coordinator, processes, process, patience, failing, rounds) for process in range(processes)]
        self.parts = [forked.Process(add_up, *each, env=env, cwd=tmp_path) for each in arguments]
        self.marks = [tmp_path / f"up-{process}" for process in range(processes)]

    def up(self):
        """When all have added up a few times."""
        while not all(mark.exists() for mark in self.marks):
            assert all(part.poll() is None for part in self.parts), [part.stderr for part in self.parts]
            time.sleep(0.05)

    def end(self, *processes):
        """Exit codes and what was said."""
        codes = [self.parts[process].wait(timeout=90) for process in processes]
        return codes, [self.parts[process].stdout + self.parts[process].stderr for process in processes]


@pytest.fixture
def start(tmp_path):
    jobs = []
    yield lambda *args, **kwargs: jobs.append(Job(tmp_path, *args, **kwargs)) or jobs[-1]
    for part in jobs[0].parts:
        part.kill()
        part.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_named_and_all_others_end_with_77(start, number):
    job = start(3)
    job.up()
    begun = time.monotonic()
    job.parts[1].send_signal(number)
    codes, texts = job.end(0, 2)
    (line,) = [line for line in texts[0].splitlines() if line.startswith("lslm:")]
    assert_told("Another process that was killed, or hangs", codes[0], line)
    assert line.startswith(f"lslm: process 1 on {socket.gethostname()} has not answered for ")
    assert codes[1] == PeerLost.exit_code, texts
    assert "Traceback" not in texts[0] + texts[1]
    assert time.monotonic() - begun < 60


def test_where_the_first_process_is_stopped_the_others_say_so_and_end_with_77(start):
    job = start(2)
    job.up()
    job.parts[0].send_signal(signal.SIGSTOP)
    codes, texts = job.end(1)
    assert codes == [PeerLost.exit_code], texts
    assert "lslm: process 0 has not answered for " in texts[0]


def test_where_the_first_process_is_killed_the_others_end_with_it(start):
    """JAX itself aborts them, since the first one held its service."""
    job = start(2)
    job.up()
    job.parts[0].kill()
    codes, texts = job.end(1)
    assert codes[0] in (-signal.SIGABRT, PeerLost.exit_code), texts


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_ends_all_with_its_code_and_its_cause(start, failing):
    codes, texts = start(2, failing=failing).end(0, 1)
    assert codes == [65, 65], texts
    assert "shard 3 is cut" in texts[0]


def test_at_a_good_end_those_that_are_done_wait_for_those_that_are_not(start):
    codes, texts = start(3, rounds=5, patience=2.5).end(0, 1, 2)
    assert codes == [0, 0, 0], texts
    assert not any("lslm:" in text for text in texts)


HANGS = """
import sys, threading, time
from lslm_jax.parallel import heartbeat
heartbeat._ENDING = 0.5
threading.Thread(target=time.sleep, args=[60]).start()  # as a save that failed may leave one
heartbeat.end_soon(74)
sys.exit(74)
"""


def test_a_process_that_has_failed_ends_whatever_its_threads_do():
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=30).returncode == 74
