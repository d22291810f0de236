"""One run at a time in a directory."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import ConfigError


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
    """Keeps WORKDIR for this process while the context lasts, however the process ends; WORKDIR/lock says whose it is.

    The lock is the file system's (flock), which lets go of it when its holder is gone; a file that a kill left behind
    holds nobody up. Remote directories, as gs://, have no such locks, and are not kept.

    Raises:
      ConfigError: another process has it.
    """
    if atomic.is_remote(workdir):
        yield
        return
    path = workdir / "lock"
    with atomic.saving(path):
        file = open(path, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{workdir} is in use by {_holder(path)}: stop it, or take another --workdir") from error
        except OSError:  # a file system without locks
            yield
            return
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with atomic.saving(path):
            file.truncate(0)
            file.write(json.dumps(mine) + "\n")
            file.flush()
        yield


def _holder(path: epath.Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}, started {found['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
