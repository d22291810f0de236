"""One preparation at a time in a data directory; others wait until it is done."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from etils import epath

from lslm_jax.runtime import atomic_io, file_lock

_FILE = "prepare.lock"
_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def hold(directory: epath.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keeps a data directory for this process while the context lasts; waits for a process that has it.

    See `file_lock`. The lock file is removed at the end. Remote directories are not kept.

    Raises:
      SaveError: the directory cannot be written.
    """
    if atomic_io.is_remote(directory):
        yield
        return
    shown: dict[str, float] = {}  # when each line was last shown

    def log_seldom(line: str) -> None:
        if time.monotonic() - shown.get(line, -math.inf) > _SECONDS_BETWEEN_LINES:
            log(f"prepare: {line}")
            shown[line] = time.monotonic()

    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock.hold(directory / _FILE, log_seldom, remove=True))
                break
            except file_lock.InUse as holder:
                log_seldom(f"{directory} is in use by {holder}: waiting until it is done")
                time.sleep(_SECONDS)
        yield
