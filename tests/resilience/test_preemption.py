"""Signals: the first is acknowledged at once, the third ends the process, and afterwards all is as before."""

import signal
import subprocess
import sys
import threading

import pytest

from lslm_jax.resilience.preemption import SIGNALS, Preemption

PATIENT = """
import signal, sys
from lslm_jax.resilience.preemption import Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    for line in sys.stdin:
        print(preemption.requested, flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_two_signals_are_noted_and_the_third_or_a_second_ctrl_c_ends_the_process_as_usual(number):
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def ask() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with process:
        assert process.stdout.readline() == "ready\n"
        assert ask() == "None"
        for _ in range(1 if number == signal.SIGINT else 2):
            process.send_signal(number)
            assert ask() == number.name
        process.send_signal(number)
        assert process.wait(timeout=10) == -number
        assert f"lslm: {number.name}: finishing this step, then saving" in process.stderr.read()


def test_the_first_signal_is_the_one_that_is_told():
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested == "SIGTERM"


def test_handlers_are_put_back_also_after_a_failure():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), Preemption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_handlers_stay_as_they_are():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work() -> None:
        with Preemption() as preemption:
            seen.extend([preemption.requested, *(signal.getsignal(number) for number in SIGNALS)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, *before]


def test_until_there_is_something_to_save_signals_do_what_they_did(capfd):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Preemption(armed=False) as preemption:
            signal.raise_signal(signal.SIGTERM)
            assert preemption.requested is None and seen == [signal.SIGTERM]
            preemption.arm()
            signal.raise_signal(signal.SIGTERM)
            assert preemption.requested == "SIGTERM" and len(seen) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


EARLY = """
import sys, time
from lslm_jax.resilience import preemption
preemption.end_on_signals(sys.argv[1:])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        (["--workdir=a"], signal.SIGTERM, 75),
        (["train"], signal.SIGHUP, 75),
        (["prepare"], signal.SIGUSR1, 75),
        (["evaluate"], signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_signal_before_the_first_step_ends_with_the_code_of_a_preemption(arguments, number, code):
    command = [sys.executable, "-c", EARLY, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        text = process.stderr.read()
        assert text == (
            f"lslm: {number.name}: nothing to save yet; the same command goes on from there\n" if code > 0 else ""
        )


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)
