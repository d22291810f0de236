"""What XLA has compiled is kept beside the runs: one that goes on, or that is looked at, need not compile again."""

import contextlib
import os
import pathlib
import stat
from typing import Any, cast

import jax

from lslm_jax.runtime import atomic_io, environment
from lslm_jax.runtime.progress import say

NAME = ".xla_cache"


def keep(workdir: str) -> None:
    """Makes `.xla_cache` in the parent of a run directory JAX's persistent cache, unless the user has named another.

    Programs from there are run. So the directory, and each on the way to it, must belong to this user or to root, and
    nobody else may write there. Else the cache is a private one in the user's home, or none. Programs for CPUs lie
    apart for each kind: JAX would take one with instructions that this machine may not have.
    """
    parent, settings = atomic_io.place(workdir).parent, cast(Any, jax.config)
    if settings.jax_compilation_cache_dir:
        return
    kind = [environment.processor()] if jax.default_backend() == "cpu" else []
    if atomic_io.is_remote(parent):
        settings.update("jax_compilation_cache_dir", os.fspath(parent.joinpath(NAME, *kind)))
        return
    beside = pathlib.Path(parent, NAME, *kind)
    if problem := _make_private(beside):
        private = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        private = private.joinpath("lslm_jax", "xla", *kind)
        is_usable = not _make_private(private)
        say(f"{problem}: compiled programs are kept in {private}" if is_usable else f"{problem}: no program is kept")
        if not is_usable:
            return
        beside = private
    settings.update("jax_compilation_cache_dir", str(beside))


def _make_private(directory: pathlib.Path) -> str:
    """Creates a directory that only this user can write to; returns why it is not safe or possible, or ""."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a loop of links
        real = directory.resolve()
        if problem := _intruder(directory) or _intruder(real):
            return problem
        for path in (*reversed(real.parents), real):
            path.mkdir(mode=0o700 if NAME in path.parts else 0o755, exist_ok=True)
        if os.access(real, os.W_OK | os.X_OK):
            return _intruder(directory) or _intruder(real)
    return f"{directory} cannot be written"


def _intruder(directory: pathlib.Path) -> str:
    """Names the first directory or link on the way to a path with which another user could change what lies there.

    A directory with the sticky bit, as /tmp, may be on the way: nobody can replace what others have in it.
    """
    for path in (*reversed(directory.parents), directory):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return ""  # from here on it is made
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        if stat.S_ISLNK(status.st_mode):
            continue  # only its owner can change it; where it leads to is looked at as well
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        on_the_way = path not in (directory, *_beside(directory))
        if shared and not (status.st_mode & stat.S_ISVTX and on_the_way):
            return f"others can write to {path}"
    return ""


def _beside(directory: pathlib.Path) -> list[pathlib.Path]:
    """The cache itself and the directory that holds it, for a path within the cache."""
    for path in (directory, *directory.parents):
        if path.name in (NAME, "xla"):
            return [path, path.parent]
    return [directory.parent]
