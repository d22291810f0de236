"""Progress keeps stdout clean and terminals whole; the timer counts training and nothing else."""

import os
import pty
import subprocess
import sys

import pytest

from lslm_jax.runtime.progress import Progress, StepTimer, clock_time, short, told


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_at_first_at_last_and_every_ten_seconds(capsys):
    clock = Clock()
    with Progress(100, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.25
            evaluation = 5.0 if step == 20 else None
            figures = {"tokens_per_second": 12345, "epoch": step / 100, "eval_loss": evaluation}
            progress.update(step, loss=5 - step / 100, **figures)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/100  epoch 0.01  loss 4.990  12.3k tokens/s  0:00 elapsed",
        "step 41/100  epoch 0.41  loss 4.590  eval loss 5.000  12.3k tokens/s  0:10 elapsed  0:15 left",
        "step 81/100  epoch 0.81  loss 4.190  eval loss 5.000  12.3k tokens/s  0:20 elapsed  0:05 left",
        "step 100/100  epoch 1.00  loss 4.000  eval loss 5.000  12.3k tokens/s  0:25 elapsed",
    ]


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (1, []),
        (4, ["evaluating: 3 of 9 batches  0:24 left", "evaluating: 6 of 9 batches  0:12 left"]),
        (20, [f"evaluating: {n} of 9 batches  {left} left" for n, left in [(1, "2:40"), (2, "2:20"), (3, "2:00")]]),
    ],
)
def test_an_evaluation_that_takes_long_says_how_far_it_is(seconds, lines, capsys):
    clock, seen = Clock(), ""
    for item in told("abcdefghi", "evaluating", 9, clock=clock):
        seen += item
        clock.now += seconds
    assert seen == "abcdefghi"
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[: len(lines)] == lines and bool(err) == bool(lines)


def test_a_figure_that_is_not_given_stays(capsys):
    with Progress(2) as progress:
        progress.update(1, loss=2.5)
        progress.update(2)
    assert capsys.readouterr().err == "step 1/2  loss 2.500  0:00 elapsed\nstep 2/2  loss 2.500  0:00 elapsed\n"


class Closed:
    """A terminal that was closed."""

    def write(self, _):
        raise OSError(5, "Input/output error")

    flush = write


def test_a_terminal_that_was_closed_does_not_end_the_run(monkeypatch):
    with Progress(2) as progress:
        monkeypatch.setattr(sys, "stderr", Closed())
        progress.message("to nobody")
        progress.update(1, loss=2.5)


def test_what_a_model_utters_cannot_drive_the_terminal(capsys):
    with Progress(1) as progress:
        progress.message("one\x1b[2J\rtwo\n\tthree é [bold]")
    assert capsys.readouterr().err == "one\ufffd[2J\ufffdtwo\n\tthree é [bold]\n"


def on_a_terminal(program: str) -> tuple[bytes, str]:
    """Runs a program with stderr on a pseudo-terminal; returns its stdout and what the terminal was sent."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    sent = b""
    try:
        while chunk := os.read(ours, 4096):
            sent += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    out, _ = process.communicate()
    assert process.returncode == 0, sent.decode()
    return out, sent.decode()


def test_on_a_terminal_messages_stand_whole_above_the_bar_and_stdout_is_not_touched():
    program = """
import sys
from lslm_jax.runtime.progress import Progress
with Progress(50) as progress:
    for step in range(1, 51):
        progress.update(step, loss=1.5, tokens_per_second=2e6)
        if step == 25:
            progress.message("a sample of " + "many words " * 20)
            print("a warning from elsewhere", file=sys.stderr)
            print("{}")
"""
    out, terminal = on_a_terminal(program)
    assert out == b"{}\n"
    assert "a sample of " + "many words " * 20 in terminal.replace("\r\n", "\n")
    assert "a warning from elsewhere" in terminal
    assert "step 50/50  loss 1.500  2.0M tokens/s" in terminal
    assert terminal.rstrip().endswith("\x1b[?25h"), "the cursor is given back"


def test_the_timer_counts_neither_compilation_nor_pauses():
    clock = Clock()
    timer = StepTimer(1000, clock=clock)
    clock.now += 60  # compilation
    timer.step()
    assert timer.read() == {}
    for _ in range(4):
        with timer.data():
            clock.now += 0.5
        clock.now += 1.5
        timer.step()
    with timer.pause():
        clock.now += 100
    assert timer.read() == {"tokens_per_second": 500.0, "step_seconds": 2.0, "data_wait": 0.25}


def test_a_pause_belongs_to_its_own_window():
    clock = Clock()
    timer = StepTimer(8, clock=clock)
    timer.step()
    for seconds in (1.0, 2.0):
        with timer.pause():
            clock.now += 7
        clock.now += seconds
        timer.step()
        assert timer.read()["step_seconds"] == pytest.approx(seconds)


def test_numbers_are_short():
    assert [short(n) for n in (12, 999, 12345, 2.5e6, 3.21e9)] == ["12", "999", "12.3k", "2.5M", "3.2G"]
    assert [clock_time(s) for s in (5, 65, 3600, 90061)] == ["0:05", "1:05", "1:00:00", "25:01:01"]
