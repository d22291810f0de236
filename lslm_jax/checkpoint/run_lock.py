"""One run at a time in a directory."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from lslm_jax.errors import ConfigError, SaveError
from lslm_jax.runtime import atomic_io, file_lock
from lslm_jax.runtime.progress import say

_held: dict[str, int] = {}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
    """Keeps WORKDIR for this process while the context lasts, however the process ends; WORKDIR/lock describes it.

    See `file_lock`. Remote directories, as gs://, are not kept.

    Raises:
      ConfigError: another process has it.
    """
    if atomic_io.is_remote(workdir):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(file_lock.hold(workdir / "lock", say))
        except file_lock.InUse as error:
            raise ConfigError(f"{workdir} is in use by {error}: stop it, or take another --workdir") from error
        if descriptor is not None:
            _held[os.fspath(workdir)] = descriptor
            stack.callback(_held.pop, os.fspath(workdir), None)
        yield


def check(workdir: epath.Path) -> None:
    """Compares the lock that this process holds with the file of that name, which may have been removed or replaced.

    Raises:
      SaveError: it was, so that another run may have the directory as well.
    """
    descriptor, path = _held.get(os.fspath(workdir)), epath.Path(workdir) / "lock"
    if descriptor is not None and not file_lock.is_at(descriptor, path):
        raise SaveError(f"{path} was removed or replaced while this run held it: another run may be in the directory")
