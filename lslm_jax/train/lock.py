"""One run at a time in a directory."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import ConfigError, SaveError
from lslm_jax.progress import say

_BEAT = 10.0  # seconds between two signs of life in a lock file on a file system without locks
_STALE = 6 * _BEAT  # seconds without one after which its holder counts as gone
_held: dict[str, IO[str]] = {}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
    """Keeps WORKDIR for this process while the context lasts, however the process ends; WORKDIR/lock says whose it is.

    The lock is the file system's (flock), which lets go of it when its holder is gone; a file that a kill left behind
    holds nobody up. On a file system without locks a file with host, process id and signs of life takes its place.
    Remote directories, as gs://, are not kept.

    Raises:
      ConfigError: another process has it.
    """
    if atomic.is_remote(workdir):
        yield
        return
    path = workdir / "lock"
    file = _open(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{workdir} is in use by {_holder(path)}: stop it, or take another --workdir") from error
        except OSError as error:  # a file system without locks
            say(f"{workdir} has no file locks ({error.strerror}): signs of life in lock.alive take their place")
            with _hold_by_heartbeat(workdir):
                yield
            return
        _write(file, path)
        _held[os.fspath(workdir)] = file
        try:
            check(workdir)
            yield
        finally:
            _held.pop(os.fspath(workdir), None)


def check(workdir: epath.Path) -> None:
    """Compares the lock that this process holds with the file of that name, which may have been removed or replaced.

    Raises:
      SaveError: it was, so that another run may have the directory as well.
    """
    file = _held.get(os.fspath(workdir))
    if file is None or file.closed:
        return
    mine, path = os.fstat(file.fileno()), epath.Path(workdir) / "lock"
    try:
        now = os.stat(path, follow_symlinks=False)
    except OSError:
        now = None
    if now is None or (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino):
        raise SaveError(f"{path} was removed or replaced while this run held it: another run may be in the directory")


def _open(path: epath.Path) -> IO[str]:
    with atomic.saving(path):
        return atomic.open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, "a+")


def _write(file: IO[str], path: epath.Path) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with atomic.saving(path):
        file.truncate(0)
        file.write(json.dumps(mine) + "\n")
        file.flush()


@contextlib.contextmanager
def _hold_by_heartbeat(workdir: epath.Path) -> Iterator[None]:
    """Keeps a directory by a file that is touched again and again.

    Raises:
      ConfigError: another process that lives, or did a minute ago, has such a file there.
    """
    path, token, over = workdir / "lock.alive", secrets.token_hex(8), threading.Event()
    if _is_alive(path):
        raise ConfigError(f"{workdir} is in use by {_holder(path)}: stop it, or take another --workdir")
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    atomic.write_json(path, mine | {"token": token})
    time.sleep(0.1)  # of two that begin at once, the one whose file was replaced gives way
    if _read(path).get("token") != token:
        raise ConfigError(f"{workdir} is in use by {_holder(path)}: stop it, or take another --workdir")

    def beat() -> None:
        while not over.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def _is_alive(path: epath.Path) -> bool:
    """True if the process that wrote a lock file lives: looked up on this host, judged by signs of life elsewhere."""
    holder = _read(path)
    if not holder:
        return False
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except (ProcessLookupError, ValueError, KeyError):
            return False
        except PermissionError:
            return True
        return True
    with contextlib.suppress(OSError):
        return time.time() - os.stat(path).st_mtime < _STALE
    return False


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _holder(path: epath.Path) -> str:
    found = _read(path)
    try:
        return f"process {found['pid']} on {found['host']}, started {found['started']}"
    except KeyError:
        return "another process"
