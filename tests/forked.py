"""Real processes of the command `lslm`, forked from a server process that has already imported jax and the trainer.

Imports take 3 CPU seconds, more than many of these processes need for everything else. A forked process has its own
pid, signals, exit code, environment, devices and compiled programs. It differs from `python -m lslm_jax.main` in two
ways: its imports are done, and it leaves out the interpreter's own teardown. Tests of these two start Python instead.
"""

import atexit
import contextlib
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

PRELOADED = [
    "jax",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "lslm_jax.main",
    "lslm_jax.cli.commands",
    "lslm_jax.cli.verify",
    "lslm_jax.convert.pretrained",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def xla_flags(devices: int = 1) -> str:
    """The flags that make these tests compile fast, with another number of simulated devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])


class Process:
    """A process that calls `function(*arguments)`, with the methods of `subprocess.Popen` that tests use.

    Attributes:
      pid: process id.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None = None,
    ):
        directory = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, directory)
        paths = [pathlib.Path(directory) / name for name in ("stdout", "stderr")]
        for path in paths:
            path.touch()
        call = function, arguments, dict(env), str(cwd or os.getcwd()), [str(path) for path in paths]
        self._paths, self._process = paths, _context.Process(target=_run, args=call)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._paths[0].read_text()

    @property
    def stderr(self) -> str:
        return self._paths[1].read_text()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0.0, self.stdout, self.stderr)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def lslm(*arguments: str, env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None) -> Process:
    """Starts the command with these arguments."""
    return Process(_command, arguments, env=os.environ if env is None else env, cwd=cwd)


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 300.0,
) -> Process:
    """Runs the command to its end."""
    process = lslm(*arguments, env=env, cwd=cwd)
    try:
        process.wait(timeout)
    finally:
        process.kill()
    return process


def timed(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a new process; returns it and its seconds of a processor, which load by others hardly changes."""
    begin = os.times()
    process = subprocess.run(command, capture_output=True, text=True)
    end = os.times()
    return process, end.children_user + end.children_system - begin.children_user - begin.children_system


def _command(arguments: Sequence[str]) -> NoReturn:
    from lslm_jax.main import main

    main(arguments)


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], cwd: str, output: Sequence[str]
) -> None:
    """Gives the forked process what a new one would get from its parent, then calls the function."""
    for number, path in enumerate(output, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if (path := env.get("PYTHONPATH")) is not None:
        sys.path[:0] = path.split(os.pathsep)
    _set_jax_options(env)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()


def _set_jax_options(env: Mapping[str, str]) -> None:
    """Sets the options that jax took from the server's environment when it was imported."""
    import jax

    for name, text in env.items():
        option = name.lower()
        if not (name.startswith("JAX_") and option in jax.config.values):
            continue
        match jax.config.values[option]:
            case bool():
                jax.config.update(option, text.lower() in ("1", "true", "yes", "on"))
            case int():
                jax.config.update(option, int(text))
            case float():
                jax.config.update(option, float(text))
            case _:
                jax.config.update(option, text)
