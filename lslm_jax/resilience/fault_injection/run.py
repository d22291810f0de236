"""A real run in processes of its own, which can be started, watched, and hurt."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

STEPS, EVERY = 240, 12  # of a run, if not told otherwise; between two checkpoints
PATIENCE = 8.0  # seconds of train.watchdog
_START = 180.0  # seconds that a run may take to get going
CONFIG = {
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 4, "max_length": 32},
    "data": {"document": "line", "seq_len": 32, "valid_fraction": 0.05},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": STEPS, "batch_size": 8, "ema": 0.9, "watchdog": PATIENCE},
    "optimizer": {"warmup_steps": 20},
    "checkpoint": {"every": EVERY, "keep": 4},
    "eval": {"every": 80, "batches": 2},
    "log": {"every": 1, "timing": False, "tensorboard": False},
}


class Broken(Exception):
    """Something was lost, or not told."""


class Over(Exception):
    """The run was at its end before anything could be done to it."""


class Run:
    """One run of so many processes, started as often as needed.

    Attributes:
      processes: how many.
      parts: those of the last start.
      workdir: the run directory.
      data: what its shards are.
      text: what they were made from.
    """

    def __init__(self, root: pathlib.Path, workdir: pathlib.Path, processes: int):
        self.workdir, self.text, self.data = workdir, root / "corpus.txt", workdir / "data"
        self._config, self.processes = root / "config.json", processes
        self._cache = root / "compiled"
        self.parts: list[subprocess.Popen[bytes]] = []
        self._said = root / "said"
        workdir.mkdir(parents=True, exist_ok=True)

    def start(self, *flags: str) -> None:
        """The command, as every time."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            at = f"127.0.0.1:{free.getsockname()[1]}"
        devices = f"--xla_force_host_platform_device_count={2 // self.processes} --xla_backend_optimization_level=0"
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
        environ |= {"JAX_COMPILATION_CACHE_DIR": str(self._cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", "lslm_jax.main", f"--config={self._config}", f"--workdir={self.workdir}"]
        command += [f"--config.data.files={self.text}", "--config.mesh.fsdp=2", "--config.mesh.data=1", *flags]
        self.parts = []
        for process in range(self.processes):
            join = [f"--coordinator={at}", f"--processes={self.processes}", f"--process={process}"]
            with open(f"{self._said}-{process}", "wb") as said:
                whole = [*command, *(join if self.processes > 1 else [])]
                self.parts.append(subprocess.Popen(whole, env=environ, stdout=said, stderr=said))

    def alone(self, *arguments: str) -> tuple[int, str]:
        """Exit code and words of another command on the same directory, by one process."""
        other = Run(self._config.parent, self.workdir, 1)
        other._said = self._said.with_name("other")
        other.start(*arguments)
        return other.end()[0], other.said()

    def end(self, seconds: float = 300.0) -> list[int]:
        """The exit codes."""
        try:
            return [part.wait(timeout=seconds) for part in self.parts]
        except subprocess.TimeoutExpired as error:
            raise Broken(f"still there after {seconds:.0f} s: {self.said()[-300:]}") from error
        finally:
            self.kill()

    def kill(self) -> None:
        """Whatever is still there."""
        for part in self.parts:
            part.kill()
            part.wait()

    def signal(self, number: int, process: int) -> None:
        """Sends one to a process."""
        self.parts[process].send_signal(number)

    def said(self) -> str:
        """What all processes printed since the last start."""
        files = [pathlib.Path(f"{self._said}-{process}") for process in range(self.processes)]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def step(self) -> int:
        """The last step on the record."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def until(self, reached: Callable[[], bool]) -> bool:
        """Waits; False if the run ended before."""
        deadline = time.monotonic() + _START
        while not reached():
            if any(part.poll() is not None for part in self.parts):
                return False
            if time.monotonic() > deadline:
                raise Broken(f"no progress for {_START:.0f} s: {self.said()[-300:]}")
            time.sleep(0.002)
        return True

    def newest(self) -> pathlib.Path | None:
        """The newest checkpoint that is finished."""
        found = [path.parent for path in self.workdir.glob("checkpoints/*/manifest.json")]
        return max(found, key=lambda path: int(path.name), default=None)
