"""Signals that ask a run to stop: noted at once, obeyed between two steps."""

import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context in which SIGTERM and Ctrl-C only set `requested`, until the third one ends the process as usual.

    Attributes:
      requested: name of the first signal that came, or None.
    """

    def __init__(self):
        self.requested: str | None = None
        self._count = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.requested = self.requested or signal.Signals(number).name
        if self._count >= 3:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
