"""Runs a command again where that helps: after a preemption, a lost peer, a crash; not where it would fail again.

python -m lslm_jax.resilience.supervisor [--restarts=N] [--workdir=DIR] -- COMMAND...

Bad config or data, numbers that are not finite, refused checkpoints: another try does not mend them, and such an exit
is the end. So are three crashes in a row without a step between them. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C go to the
command, whose end is then the end. If the supervisor itself is killed, the command gets SIGTERM (on Linux). Exits with
the command's last code.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from etils import epath

from lslm_jax.errors import ConfigError, LslmError, PeerLost, Preempted
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.progress import clock_time, say

HOPELESS = {error.exit_code for error in LslmError.__subclasses__()} - {Preempted.exit_code, PeerLost.exit_code}
CRASHES = 3  # without a step between them that end it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # that are passed on
_PR_SET_PDEATHSIG = 1
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds; each crash in a row doubles it


class Supervisor:
    """One command, run until it is done or hopeless."""

    def __init__(self, command: Sequence[str], restarts: int, workdir: epath.Path | None):
        """Args: what to run; how often at most again; where its metrics.jsonl tells how far it came, if known."""
        self._command, self._restarts, self._workdir = list(command), restarts, workdir
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping: str | None = None

    def run(self) -> int:
        """Runs it, again and again; returns the last exit code, as a shell has it."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        crashes, restarts = 0, 0
        while True:
            before, begun = self._step(), time.monotonic()
            code = self._once()
            after = self._step()
            if code == 0 or self._stopping or code in HOPELESS:
                return code
            took = clock_time(time.monotonic() - begun)
            say(f"supervise: {_cause(code)} at step {after}, after {took}")
            crashes = 1 if after > before or code == Preempted.exit_code else crashes + 1
            if crashes >= CRASHES:
                say(f"supervise: {crashes} times in a row no step was done after step {after}: giving up")
                return code
            if restarts == self._restarts:
                say(f"supervise: {restarts} restarts are all that --restarts allows")
                return code
            restarts += 1
            self._wait(min(FIRST_WAIT * 2 ** (crashes - 1), LONGEST_WAIT))
            if self._stopping:
                return code

    def _once(self) -> int:
        try:
            self._child = subprocess.Popen(self._command, preexec_fn=_end_with_parent())
        except OSError as error:
            raise ConfigError(f"cannot run {self._command[0]}: {error.strerror}") from error
        code = self._child.wait()
        self._child = None
        return 128 - code if code < 0 else code

    def _step(self) -> int:
        """The last step on the record; 0 where there is none."""
        if self._workdir is None:
            return 0
        try:
            lines = (self._workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            whole = [line for line in lines[-2:] if line.endswith(b"\n")]
            return int(json.loads(whole[-1])["step"]) if whole else 0
        except Exception:  # not there yet; torn; or whatever a bucket raises
            return 0

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopping:
            time.sleep(0.1)

    def _pass_on(self, number: int, frame: object) -> None:
        self._stopping = signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)


def _end_with_parent() -> Callable[[], None] | None:
    """Returns what a child calls before it becomes the command: it is to get SIGTERM when its parent dies (Linux)."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def call() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            os._exit(128 + signal.SIGTERM)

    return call


def _workdir_of(command: Sequence[str]) -> str | None:
    """The last --workdir of a command, in one word or in two."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word.startswith("--workdir="):
            found = word.removeprefix("--workdir=")
        elif word == "--workdir" and following:
            found = following
    return found


def _cause(code: int) -> str:
    """What an exit code says, in words."""
    if code == Preempted.exit_code:
        return "stopped by a signal, and saved (75),"
    if code == PeerLost.exit_code:
        return "another process is gone (77)"
    with contextlib.suppress(ValueError):  # a code of the command's own, which no signal has
        return f"killed by {signal.Signals(code - 128).name} ({code})"
    return f"crashed ({code})"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1 :]
    about = "Runs COMMAND again after a preemption, a lost peer or a crash, and not where it would fail again."
    flags = argparse.ArgumentParser(
        prog="python -m lslm_jax.resilience.supervisor", usage="%(prog)s [FLAG...] -- COMMAND...", description=about
    )
    flags.add_argument("--restarts", type=int, default=100, metavar="N", help="at most so many (default 100)")
    flags.add_argument("--workdir", metavar="DIR", help="the run's, if COMMAND does not say --workdir=DIR")
    asked, unknown = flags.parse_known_args(argv[:at])
    if unknown or not command:
        flags.error("say what to run behind --" if not command else f"unknown: {' '.join(unknown)}")
    workdir = asked.workdir or _workdir_of(command)
    try:
        directory = None if workdir is None else atomic_io.place(workdir)
        sys.exit(Supervisor(command, asked.restarts, directory).run())
    except LslmError as error:
        print(f"supervise: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
