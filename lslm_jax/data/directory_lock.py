"""One preparation at a time in a data directory; others wait until it is done."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from etils import epath

from lslm_jax import atomic

_FILE = "prepare.lock"
_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def hold(directory: epath.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keeps a data directory for this process while the context lasts; waits for a process that has it.

    The lock is the file system's (flock), which releases it however its holder ends. The lock file is removed at the
    end. Remote directories and file systems without locks are not kept, the latter with a warning.

    Raises:
      SaveError: the directory cannot be written.
    """
    if atomic.is_remote(directory):
        yield
        return
    path = directory / _FILE
    file = _acquire(path, log)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(file)


def _acquire(path: epath.Path, log: Callable[[str], None]) -> int | None:
    shown = 0.0
    while True:
        with atomic.saving(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            if not shown or time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
                log(f"prepare: another process is preparing {path.parent}: waiting until it is done")
                shown = time.monotonic()
            time.sleep(_SECONDS)
        except OSError as error:
            os.close(file)
            log(f"prepare: {path.parent} cannot be locked ({error.strerror}): start no other preparation there")
            return None
        os.close(file)


def _is_at(file: int, path: epath.Path) -> bool:
    """True if the locked file is still the one of that name: its last holder removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
