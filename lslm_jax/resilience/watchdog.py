"""Ends a run whose steps have stopped coming, with the stacks of all threads on file."""

import contextlib
import faulthandler
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Self

from etils import epath

from lslm_jax.errors import PeerLost, SaveError
from lslm_jax.parallel import heartbeat
from lslm_jax.runtime import atomic_io

_PATIENCE = 10  # usual steps that one may take, at least
_WRITING = 10.0  # seconds that a file may take
_USUAL = 32  # the last steps, of which the median is the usual one


class Watchdog:
    """A context in which `step` must be called again and again, but for pauses.

    A thread that waits for what never comes (a collective, a file system) cannot be woken: the process ends without
    what was begun, and what is saved is left as it is. Its first step, which may compile, is not watched.
    """

    def __init__(self, seconds: float, stacks: epath.Path):
        """Args: how long a step may take at least, 0: for ever; where the stacks are written."""
        self._seconds, self._stacks = seconds, stacks
        self._last: float | None = None
        self._steps, self._took = 0, deque[float](maxlen=_USUAL)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def step(self, number: int) -> None:
        """A step is done."""
        now = time.monotonic()
        if self._last is not None:
            self._took.append(now - self._last)
        self._last, self._steps = now, number

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Whatever happens here may take its time, as an evaluation does."""
        self._last = None
        yield
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            last, usual = self._last, statistics.median(self._took or [0.0])
            silent = time.monotonic() - last if last is not None else 0.0
            if silent > max(self._seconds, _PATIENCE * usual):
                text = f"no step for {silent:.0f} s after step {self._steps}, where one takes {usual:.2g} s"
                heartbeat.end_now(PeerLost.exit_code, text + self._dump())

    def _dump(self) -> str:
        """Says where the stacks are, unless the file system is what everything waits for."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        written = threading.Event()

        def write() -> None:
            with contextlib.suppress(SaveError):
                atomic_io.write(self._stacks, stacks)
                written.set()

        threading.Thread(target=write, daemon=True).start()
        return f"; {self._stacks} has what each thread is at" * written.wait(_WRITING)
