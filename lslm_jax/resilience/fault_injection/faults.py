"""What is done to a run that is under way, and whether it is told as it should be."""

import contextlib
import pathlib
import random
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from lslm_jax.resilience.fault_injection.run import PATIENCE, Broken, Over, Run

Inject = Callable[[Run, random.Random], bool | None]
Spoil = Callable[[pathlib.Path, random.Random], None]


class Fault(NamedTuple):
    """One kind.

    Attributes:
      name: in the table.
      inject: brings it about in a run that is under way, which it leaves ended; whether it was told as it should be;
        None, or Over, where there was no occasion.
      processes: of the runs that it befalls.
    """

    name: str
    inject: Inject
    processes: tuple[int, ...] = (1, 2)


def _kill(run: Run, rng: random.Random) -> list[int]:
    process = rng.randrange(run.processes)
    run.signal(signal.SIGKILL, process)
    codes = run.end()
    if codes == [0] * run.processes:
        raise Over
    others = codes[:process] + codes[process + 1 :]
    if codes[process] != -signal.SIGKILL or not all(code in (77, -signal.SIGABRT) for code in others):
        raise Broken(f"ended with {codes} after process {process} was killed: {run.said()[-300:]}")
    return codes


def _sigkill(run: Run, rng: random.Random) -> bool:
    time.sleep(rng.random() * 0.5)
    _kill(run, rng)
    return True


def _sigkill_in_save(run: Run, rng: random.Random) -> bool | None:
    """As soon as files of a checkpoint appear, or a little later."""
    saved = set(run.workdir.glob("checkpoints/*"))
    if not run.until(lambda: bool(set(run.workdir.glob("checkpoints/*")) - saved)):
        return None if run.end() == [0] * run.processes else False
    time.sleep(rng.choice([0.0, rng.random() * 0.05, rng.random() * 0.3]))
    _kill(run, rng)
    return True


def _sigterm(run: Run, rng: random.Random) -> bool | None:
    """Once or twice."""
    process = rng.randrange(run.processes)
    begun = time.monotonic()
    for _ in range(rng.choice([1, 2])):
        run.signal(signal.SIGTERM, process)
    codes = run.end()
    if time.monotonic() - begun > 10 * run.processes:
        raise Broken(f"SIGTERM took {time.monotonic() - begun:.0f} s")
    if codes == [0] * run.processes:
        return None  # it was at its end
    return codes == [75] * run.processes and "is saved" in run.said()


def _sigstop(run: Run, rng: random.Random) -> bool:
    """One of two, for ever: the other must not wait for ever."""
    process = rng.randrange(2)
    run.signal(signal.SIGSTOP, process)
    code = run.parts[1 - process].wait(timeout=10 * PATIENCE)
    run.signal(signal.SIGKILL, process)
    run.end()
    return code == 77 and "has not answered" in run.said()


def _pause(run: Run, rng: random.Random) -> bool | None:
    """All processes, for a moment; nothing must come of it."""
    for process in range(run.processes):
        run.signal(signal.SIGSTOP, process)
    time.sleep(1.0)
    for process in range(run.processes):
        run.signal(signal.SIGCONT, process)
    reached = run.step() + 2
    if run.until(lambda: run.step() >= reached):
        _kill(run, rng)
        return True
    return None if run.end() == [0] * run.processes else False


def _second_run(run: Run, rng: random.Random) -> bool:
    """On the same directory."""
    code, said = run.alone()
    _kill(run, rng)
    return code == 2 and "is in use by" in said


def _checkpoint(spoil: Spoil, told: str) -> Inject:
    """A file of the newest checkpoint is spoilt, and the next start must say so and go back."""

    def inject(run: Run, rng: random.Random) -> bool | None:
        _kill(run, rng)
        newest = run.newest()
        if newest is None or len(list(run.workdir.glob("checkpoints/*/manifest.json"))) < 2:
            return None  # nothing to go back to
        spoil(rng.choice([path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]), rng)
        run.start()
        run.until(lambda: "resumed from step" in run.said())
        _kill(run, rng)
        return told in run.said() and "going back to step" in run.said()

    return inject


def _shards(spoil: Spoil, of: str) -> Inject:
    """A file of the data is spoilt; the next start must refuse it; then it is put right."""

    def inject(run: Run, rng: random.Random) -> bool:
        _kill(run, rng)
        files = [run.text] if of == "text" else sorted(run.data.glob("*/*.bin"))
        path = rng.choice([path for path in files if path.stat().st_size])
        kept = path.read_bytes()
        spoil(path, rng)
        run.start()
        codes = run.end()
        path.write_bytes(kept)
        return codes == [65] * run.processes and path.name in run.said()

    return inject


def _flip(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _add_line(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"One more line.\n")


def _unfinish(path: pathlib.Path, rng: random.Random) -> None:
    """As a kill between the last array and the manifest leaves it."""
    while not (path / "manifest.json").exists():
        path = path.parent
    (path / "manifest.json").unlink()


def _torn_record(run: Run, rng: random.Random) -> bool:
    """Half a line, as a power cut leaves it."""
    _kill(run, rng)
    path = rng.choice([run.workdir / "metrics.jsonl", run.workdir / "ledger" / "0.jsonl"])
    with open(path, "ab") as file:
        file.write(b'{"step": 1000')
    return True


def _other_seed(run: Run, rng: random.Random) -> bool | None:
    """Another order of the data."""
    _kill(run, rng)
    if run.newest() is None:
        return None
    run.start("--config.seed=1")
    return run.end() == [76] * run.processes and "was made with seed=0" in run.said()


def _full_disk(run: Run, rng: random.Random) -> bool | None:
    """Nothing can be saved until somebody makes room."""
    filler = run.workdir / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    codes = run.end()
    filler.unlink()
    if codes == [0] * run.processes:
        return None  # it had nothing left to save
    return all(code in (74, 77) for code in codes) and "No space left" in run.said()


FAULTS = [
    Fault("SIGTERM", _sigterm),
    Fault("SIGKILL", _sigkill),
    Fault("SIGKILL during a save", _sigkill_in_save),
    Fault("SIGSTOP of one process", _sigstop, (2,)),
    Fault("SIGSTOP for a second", _pause),
    Fault("a second run on the directory", _second_run, (1,)),
    Fault("a bit flipped in a checkpoint", _checkpoint(_flip, "checkpoints")),
    Fault("a file of a checkpoint cut", _checkpoint(_cut, "checkpoints")),
    Fault("a checkpoint without manifest", _checkpoint(_unfinish, "was never finished")),
    Fault("a bit flipped in a shard", _shards(_flip, "shards")),
    Fault("a shard cut", _shards(_cut, "shards")),
    Fault("the text changed", _shards(_add_line, "text")),
    Fault("half a line on the record", _torn_record),
    Fault("another seed", _other_seed),
    Fault("disk full", _full_disk),
]
