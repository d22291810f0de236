"""How far and how fast a run is: a bar on a terminal, elsewhere a line now and then, always on stderr."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

SECONDS_BETWEEN_LINES = 10.0
_T = TypeVar("_T")


class Progress:
    """Progress of a run of known length; a context manager.

    Attributes:
      total: steps of the whole run.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic):
        """Prepares for `total` steps; `clock` tells seconds."""
        self.total = total
        self._clock, self._begun = clock, clock()
        self._first: tuple[int, float] | None = None
        self._shown: tuple[int, float] | None = None
        self._figures: dict[str, float] = {}
        self._bar = _bar()
        self._task = self._bar and self._bar.add_task("starting", total=total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        epoch: float | None = None,
        eval_loss: float | None = None,
    ) -> None:
        """Shows that `step` steps are done. A figure that is not given stays as it was."""
        now = self._clock()
        self._first = self._first or (step, now)
        given = {"loss": loss, "tokens_per_second": tokens_per_second, "epoch": epoch, "eval_loss": eval_loss}
        self._figures |= {name: value for name, value in given.items() if value is not None}
        line = self._line(step, now - self._begun, self._seconds_left(step, now, self._first))
        if self._bar:
            self._bar.update(self._task, completed=step, description=line)
        elif self._due(step, now):
            self._shown = (step, now)
            say(line)

    def message(self, text: str) -> None:
        """Prints a text above the bar. Control characters, which an untrained model may utter, become U+FFFD."""
        text = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def _due(self, step: int, now: float) -> bool:
        if self._shown is None:
            return True
        last_step, last_time = self._shown
        return now - last_time >= SECONDS_BETWEEN_LINES or (step >= self.total and step != last_step)

    def _seconds_left(self, step: int, now: float, first: tuple[int, float]) -> float | None:
        """Judged by the pace so far, pauses included; the first step, which compiles, is not part of it."""
        first_step, first_time = first
        if not first_step < step < self.total:
            return None
        return (now - first_time) / (step - first_step) * (self.total - step)

    def _line(self, step: int, elapsed: float, seconds_left: float | None) -> str:
        parts = [f"step {step}/{self.total}"]
        if "epoch" in self._figures:
            parts.append(f"epoch {self._figures['epoch']:.2f}")
        if "loss" in self._figures:
            parts.append(f"loss {self._figures['loss']:.3f}")
        if "eval_loss" in self._figures:
            parts.append(f"eval loss {self._figures['eval_loss']:.3f}")
        if "tokens_per_second" in self._figures:
            parts.append(f"{short(self._figures['tokens_per_second'])} tokens/s")
        parts.append(f"{clock_time(elapsed)} elapsed")
        if seconds_left is not None:
            parts.append(f"{clock_time(seconds_left)} left")
        return "  ".join(parts)


class StepTimer:
    """Speed of the training steps alone: evaluation, saving and the first step's compilation do not count."""

    def __init__(self, tokens_per_step: int, *, clock: Callable[[], float] = time.perf_counter):
        """Counts steps of `tokens_per_step` tokens; `clock` tells seconds."""
        self._tokens = tokens_per_step
        self._clock = clock
        self._start: float | None = None
        self._steps, self._paused, self._waited = 0, 0.0, 0.0

    def step(self) -> None:
        """Tells that a step is done. The first call only starts the clock: compilation lies before it."""
        if self._start is None:
            self._begin(self._clock())
        else:
            self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what is done inside out of the window."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Counts what is done inside as time lost waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def read(self) -> dict[str, float]:
        """Ends a window and begins the next.

        Returns:
          `tokens_per_second`, `step_seconds` and `data_wait` (share of the time, 0 to 1); nothing if no step was timed.
        """
        if self._start is None or self._steps == 0:
            return {}
        now = self._clock()
        seconds = max(now - self._start - self._paused, 1e-9)
        figures = {
            "tokens_per_second": self._tokens * self._steps / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait": self._waited / seconds,
        }
        self._begin(now)
        return figures

    def _begin(self, now: float) -> None:
        self._start = now
        self._steps, self._paused, self._waited = 0, 0.0, 0.0


def told(items: Iterable[_T], doing: str, total: int, *, clock: Callable[[], float] = time.monotonic) -> Iterator[_T]:
    """Each of `total` batches, as they are asked for; what takes longer than a moment says how far it is."""
    begun = last = clock()
    for done, item in enumerate(items):
        if done and (now := clock()) - last >= SECONDS_BETWEEN_LINES:
            say(f"{doing}: {done} of {total} batches  {clock_time((now - begun) / done * (total - done))} left")
            last = now
        yield item


def say(line: str) -> None:
    """Prints a line on stderr, if there still is one: a run whose terminal was closed (SIGHUP) has yet to save."""
    if not _quiet:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def be_quiet() -> None:
    """From now on this process, one of several, shows nothing and prints nothing on stdout."""
    global _quiet
    _quiet = True
    sys.stdout = open(os.devnull, "w")


_quiet = False


def short(number: float) -> str:
    """Three figures and a unit: 12345.0 -> '12.3k'."""
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= divisor:
            return f"{number / divisor:.1f}{unit}"
    return f"{number:.0f}"


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds as on a clock: 65.0 -> '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _bar() -> Any:
    """A rich progress bar if stderr is a terminal, else None."""
    if _quiet:
        return None
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_interactive:
        return None
    columns = (progress.BarColumn(bar_width=None), progress.TextColumn("{task.description}", markup=False))
    return progress.Progress(*columns, console=console, refresh_per_second=4, redirect_stdout=False, expand=True)
