"""Faults until the time is over, and what came of them."""

import contextlib
import json
import pathlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator

from lslm_jax.resilience.fault_injection.faults import FAULTS
from lslm_jax.resilience.fault_injection.run import CONFIG, EVERY, STEPS, Broken, Over, Run
from lslm_jax.runtime.progress import say

_SLOWER = 1.5  # times as long as an undisturbed run takes one with a fault, at least
_SPACE = 48 << 20  # bytes of the disk that gets full
_WORDS = "the sea light of old river a stone went under night and over hill by slow wind in grey water".split()


class Campaign:
    """Faults until the time is over, and what came of them."""

    def __init__(
        self,
        root: pathlib.Path,
        minutes: float,
        seed: int,
        only: str = "",
        most: int | None = None,
        steps: int = STEPS,
    ):
        """Prepares one.

        Args:
          root: an empty directory.
          minutes: how long it takes altogether, with undisturbed runs; at least one fault is injected however short.
          seed: of the faults.
          only: those whose names hold this.
          most: as many faults end it sooner.
          steps: of each run.
        """
        self._root, self._rng, self._most = root, random.Random(seed), most
        self._faults = [fault for fault in FAULTS if only in fault.name]
        self._seconds, self._until = 60 * minutes, 0.0
        self._takes: dict[int, float] = {}  # seconds of an undisturbed run, by its processes
        self.counts = {fault.name: {"injected": 0, "told": 0} for fault in self._faults}
        self.broken: list[str] = []
        self.runs, self.repeated = 0, 0
        lines = (" ".join(self._rng.choices(_WORDS, k=self._rng.randint(5, 20))) for _ in range(800))
        (root / "corpus.txt").write_text("".join(f"{line}\n" for line in lines))
        (root / "config.json").write_text(json.dumps(CONFIG | {"train": CONFIG["train"] | {"steps": steps}}))

    def go(self) -> None:
        """Undisturbed runs first, which do not count, then disturbed ones in turn."""
        begun = time.monotonic()
        self._until = begun + self._seconds
        curves: dict[int, bytes] = {}
        for processes in (1, 2):
            start = time.monotonic()
            run = Run(self._root, self._root / f"undisturbed-{processes}", processes)
            run.start()
            if any(codes := run.end()):
                raise Broken(f"the undisturbed run ended with {codes}: {run.said()[-500:]}")
            curves[processes] = (run.workdir / "metrics.jsonl").read_bytes()
            self._takes[processes] = time.monotonic() - start
            if self._left() < _SLOWER * self._takes[1] * 2:
                break  # no time for runs of two processes
        while not self._is_over() or not self.runs:
            processes = 1 + self.runs % len(curves)
            if self.runs and self._left() < _SLOWER * self._takes[processes]:
                break
            self.runs += 1
            with _disk(self._root / f"run-{self.runs}") as (workdir, is_small):
                self._disturb(Run(self._root, workdir, processes), is_small, curves[processes])

    def _disturb(self, run: Run, is_small: bool, curve: bytes) -> None:
        """One run to its end, whatever happens to it."""
        faults = [
            fault
            for fault in self._faults
            if run.processes in fault.processes and (is_small or fault.name != "disk full")
        ]
        try:
            while True:
                run.start()
                place = run.step() + self._rng.randint(1, 3 * EVERY)
                if not faults or self._must_end(run) or not run.until(lambda at=place: run.step() >= at):
                    codes = run.end()
                    if any(codes):
                        raise Broken(f"ended with {codes}: {run.said()[-300:]}")
                    break
                fault = min(faults, key=lambda fault: (self.counts[fault.name]["injected"], self._rng.random()))
                try:
                    told = fault.inject(run, self._rng)
                except Over:
                    told = None
                if told is None:
                    continue
                count = self.counts[fault.name]
                count["injected"] += 1
                if not told:
                    raise Broken(f"{fault.name} was not told as it should be: {run.said()[-300:]}")
                count["told"] += 1
                say(f"chaos: run {self.runs}, step {run.step()}: {fault.name}")
            if (run.workdir / "metrics.jsonl").read_bytes() != curve:
                raise Broken("the curve is not that of the undisturbed run")
            code, said = run.alone("audit")
            if code:
                raise Broken(f"the ledger is not whole: {said[-300:]}")
            self.repeated += json.loads(said.strip().splitlines()[-1])["repeated_steps"]
        except Broken as error:
            self.broken.append(f"run {self.runs} ({run.processes} processes): {error}")
            say(f"chaos: {self.broken[-1]}")
        finally:
            run.kill()

    @property
    def _injected(self) -> int:
        return sum(count["injected"] for count in self.counts.values())

    def _left(self) -> float:
        """Seconds until the campaign is to end."""
        return self._until - time.monotonic()

    def _must_end(self, run: Run) -> bool:
        """True where a run must go on undisturbed to be done in time; the first fault always comes."""
        if self._is_over() and self._injected:
            return True
        return self._injected > 0 and self._left() < self._takes[run.processes]

    def _is_over(self) -> bool:
        return time.monotonic() > self._until or (self._most is not None and self._injected >= self._most)

    def report(self) -> dict[str, object]:
        """Prints the table; returns what counts."""
        say(f"{'fault':34}{'injected':>10}{'survived':>10}")
        for name, count in self.counts.items():
            say(f"{name:34}{count['injected']:10}{count['told']:10}")
        kinds = sum(count["injected"] > 0 for count in self.counts.values())
        return {
            "faults": self._injected,
            "kinds": kinds,
            "runs": self.runs,
            "repeated_steps": self.repeated,
            "broken": self.broken,
        }


@contextlib.contextmanager
def _disk(at: pathlib.Path) -> Iterator[tuple[pathlib.Path, bool]]:
    """A directory, on a small disk of its own where this user may mount one; gone afterwards."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "chaos", str(at)]
    is_small = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield at / "run", is_small
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", str(at)], check=True)
        shutil.rmtree(at)
