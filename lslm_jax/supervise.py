"""Runs a command again where that helps: after a preemption, a lost peer, a crash; not where it would fail again.

python -m lslm_jax.supervise [--restarts=N] [--workdir=DIR] -- COMMAND...

Bad config or data, numbers that are not finite, refused checkpoints: another try does not mend them, and such an exit
is the end. So are three crashes in a row without a step between them. SIGTERM and Ctrl-C go to the command, whose end
is then the end. Exits with the command's last code.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from lslm_jax.errors import ConfigError, LslmError, PeerLost, Preempted
from lslm_jax.progress import clock_time, say

HOPELESS = {error.exit_code for error in LslmError.__subclasses__()} - {Preempted.exit_code, PeerLost.exit_code}
CRASHES = 3  # without a step between them that end it
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds; each crash in a row doubles it


class Supervisor:
    """One command, run until it is done or hopeless."""

    def __init__(self, command: Sequence[str], restarts: int, workdir: pathlib.Path | None):
        """Args: what to run; how often at most again; where its metrics.jsonl tells how far it came, if known."""
        self._command, self._restarts, self._workdir = list(command), restarts, workdir
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping: str | None = None

    def run(self) -> int:
        """Runs it, again and again; returns the last exit code, as a shell has it."""
        for number in (signal.SIGTERM, signal.SIGINT):
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
            self._child = subprocess.Popen(self._command)
        except OSError as error:
            raise ConfigError(f"cannot run {self._command[0]}: {error.strerror}") from error
        code = self._child.wait()
        self._child = None
        return 128 - code if code < 0 else code

    def _step(self) -> int:
        """The last step on the record; 0 where there is none."""
        path = self._workdir and self._workdir / "metrics.jsonl"
        if not path or not path.exists():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[-2:] if line.endswith(b"\n")]
        try:
            return int(json.loads(whole[-1])["step"]) if whole else 0
        except (ValueError, KeyError, TypeError):
            return 0

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopping:
            time.sleep(0.1)

    def _pass_on(self, number: int, frame: object) -> None:
        self._stopping = signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)


def _cause(code: int) -> str:
    """What an exit code says, in words."""
    if code == Preempted.exit_code:
        return "stopped by a signal, and saved (75),"
    if code == PeerLost.exit_code:
        return "another process is gone (77)"
    if code > 128:
        return f"killed by {signal.Signals(code - 128).name} ({code})"
    return f"crashed ({code})"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1 :]
    about = "Runs COMMAND again after a preemption, a lost peer or a crash, and not where it would fail again."
    flags = argparse.ArgumentParser(
        prog="python -m lslm_jax.supervise", usage="%(prog)s [FLAG...] -- COMMAND...", description=about
    )
    flags.add_argument("--restarts", type=int, default=100, metavar="N", help="at most so many (default 100)")
    flags.add_argument("--workdir", metavar="DIR", help="the run's, if COMMAND does not say --workdir=DIR")
    asked, unknown = flags.parse_known_args(argv[:at])
    if unknown or not command:
        flags.error("say what to run behind --" if not command else f"unknown: {' '.join(unknown)}")
    named = [word.removeprefix("--workdir=") for word in command if word.startswith("--workdir=")]
    workdir = asked.workdir or (named[-1] if named else None)
    local = None if workdir is None or "://" in workdir else pathlib.Path(workdir).expanduser()
    try:
        sys.exit(Supervisor(command, asked.restarts, local).run())
    except LslmError as error:
        print(f"supervise: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
