"""Signals: the first two are noted and nothing more, the third ends the process, and afterwards all is as before."""

import signal
import subprocess
import sys
import threading

import pytest

from lslm_jax.train.preemption import SIGNALS, Preemption

PATIENT = """
import signal, sys
from lslm_jax.train.preemption import Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    for line in sys.stdin:
        print(preemption.requested, flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_two_signals_are_noted_and_the_third_ends_the_process_as_usual(number):
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
        for _ in range(2):
            process.send_signal(number)
            assert ask() == number.name
        process.send_signal(number)
        assert process.wait(timeout=10) == -number


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
