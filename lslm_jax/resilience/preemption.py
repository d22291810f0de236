"""Signals that ask a run to stop: noted at once, obeyed between two steps; before the first step, obeyed at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Self

from lslm_jax.errors import Preempted
from lslm_jax.parallel import heartbeat

# SIGHUP: the terminal was closed. SIGUSR1: what many batch scripts of Slurm send.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_RESUMABLE = ("train", "prepare")  # commands that go on where they were stopped


def end_on_signals(arguments: Sequence[str]) -> None:
    """Makes signals end this command with 75 as long as it has nothing to save; for `train` and `prepare` alone.

    Ctrl-C stays what it is (130). A signal that is ignored, as SIGHUP under nohup, stays ignored.

    Args:
      arguments: of the command line; the first that is no flag is the command.
    """
    command = next((word for word in arguments if not word.startswith("-")), "train")
    if command not in _RESUMABLE:
        return
    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    text = f"{signal.Signals(number).name}: nothing to save yet; the same command goes on from there"
    # From another thread: this one may be in the midst of a message to the other processes.
    threading.Thread(target=heartbeat.end_now, args=(Preempted.exit_code, text), daemon=True).start()


class Preemption:
    """A context in which signals only set `requested`; the third, or a second Ctrl-C, ends the process as usual.

    Attributes:
      requested: name of the first signal that came, or None.
    """

    def __init__(self, *, armed: bool = True):
        """With `armed` False signals do what they did before, until `arm` is called: there is nothing to save yet."""
        self.requested: str | None = None
        self._armed = armed
        self._count, self._interrupts = 0, 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def arm(self) -> None:
        """From now on signals are noted."""
        self._armed = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            self._pass_on(number, frame)
            return
        self._count += 1
        self._interrupts += number == signal.SIGINT
        self.requested = self.requested or signal.Signals(number).name
        if self._count >= 3 or self._interrupts >= 2:
            self._abort(number)
        elif self._count == 1:
            again = "press Ctrl-C again to abort without saving" if number == signal.SIGINT else "a third one aborts"
            # Not by print: the signal may have come in the midst of one.
            with contextlib.suppress(OSError):
                os.write(2, f"\nlslm: {self.requested}: finishing this step, then saving; {again}\n".encode())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        else:
            self._abort(number)

    def _abort(self, number: int) -> None:
        self._restore()
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
