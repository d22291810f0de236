"""Exclusive locks of local directories: flock, or a file with a heartbeat on file systems without locks."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from lslm_jax.runtime import atomic_io

_BEAT = 10.0  # seconds between two heartbeats
_STALE = 6 * _BEAT  # seconds without one after which a holder on another host counts as gone


class InUse(Exception):
    """Another process holds the lock; the text describes that process."""


@contextlib.contextmanager
def hold(path: epath.Path, log: Callable[[str], None], *, remove: bool = False) -> Iterator[int | None]:
    """Holds a lock file while the context lasts.

    The kernel releases the lock however its holder ends, so that a file which a kill left behind blocks nobody. On a
    file system without locks, PATH.alive with host, process id and a heartbeat takes its place.

    Args:
      path: of the lock file, which is created if it is missing. It then describes its holder.
      log: receives a line where the file system has no locks.
      remove: deletes the file at the end.

    Yields:
      The descriptor of the locked file; None on a file system without locks.

    Raises:
      InUse: another process holds it.
      SaveError: the file cannot be written, or is a symbolic link.
    """
    try:
        descriptor = _lock(path)
    except BlockingIOError as error:
        raise InUse(_holder(path)) from error
    except OSError as error:
        log(f"{path.parent} has no file locks ({error.strerror}): a heartbeat in {path.name}.alive takes their place")
        with _hold_by_heartbeat(path.parent / f"{path.name}.alive"):
            yield None
        return
    try:
        with atomic_io.saving(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_own_entry()).encode() + b"\n")
        yield descriptor
    finally:
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.close(descriptor)


def is_at(descriptor: int, path: epath.Path) -> bool:
    """True if a locked file is still the one of that name, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def may_be_held(path: epath.Path) -> bool:
    """True if the process that a lock file describes lives, or runs on another host, where this one cannot look."""
    holder = _read(path)
    if not holder:
        return False
    return _is_running(holder) if _is_here(holder) else True


def _lock(path: epath.Path) -> int:
    """Descriptor of the locked file; BlockingIOError where another process holds it, OSError where there are none."""
    while True:
        with atomic_io.saving(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder has removed it


def _own_entry() -> dict[str, Any]:
    """Description of this process in a lock file."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "pids": _pid_namespace()}


def _pid_namespace() -> str:
    """Identity of the table of process ids: containers on one host may each have their own. "": unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@contextlib.contextmanager
def _hold_by_heartbeat(path: epath.Path) -> Iterator[None]:
    token, over = secrets.token_hex(8), threading.Event()
    if _is_alive(path):
        raise InUse(_holder(path))
    atomic_io.write_json(path, _own_entry() | {"token": token})
    time.sleep(0.1)  # of two that begin at once, the one whose file was replaced gives way
    if _read(path).get("token") != token:
        raise InUse(_holder(path))

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
    """True if the holder of a heartbeat file lives: looked up on this host, judged by its last heartbeat elsewhere."""
    holder = _read(path)
    if not holder:
        return False
    if _is_here(holder):
        return _is_running(holder)
    with contextlib.suppress(OSError):
        return _now(path.parent) - os.stat(path).st_mtime < _STALE
    return False


def _is_here(holder: dict[str, Any]) -> bool:
    return (holder.get("host"), holder.get("pids", "")) == (socket.gethostname(), _pid_namespace())


def _is_running(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, ValueError, KeyError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _now(directory: epath.Path) -> float:
    """Time by the clock of the file server, which may differ from that of this host."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock.") as file:
        return os.fstat(file.fileno()).st_mtime


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = atomic_io.parse_json(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _holder(path: epath.Path) -> str:
    found = _read(path)
    try:
        return f"process {found['pid']} on {found['host']}, started {found['started']}"
    except KeyError:
        return "another process"
