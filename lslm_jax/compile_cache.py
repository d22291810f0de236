"""What XLA has compiled is kept beside the runs: one that goes on, or that is looked at, need not compile again."""

import hashlib
import os
import pathlib
import platform
import re
import stat
from typing import Any, cast

import jax

from lslm_jax import atomic

NAME = ".xla_cache"


def keep(workdir: str) -> None:
    """Makes `.xla_cache` in the parent of a run directory JAX's persistent cache, unless the user has named another.

    Programs from there are run: where everyone may write, as in /tmp, there is none. Those for CPUs lie apart for each
    kind: JAX would take one with instructions that this machine may not have.
    """
    parent, settings = atomic.place(workdir).parent, cast(Any, jax.config)
    if settings.jax_compilation_cache_dir:
        return
    if not atomic.is_remote(parent) and parent.exists():
        if os.stat(parent).st_mode & stat.S_IWOTH or not os.access(parent, os.W_OK):
            return
    directory = parent / NAME / _processor() if jax.default_backend() == "cpu" else parent / NAME
    settings.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    """The kind of this machine's processor: its instruction set, with all extensions."""
    told = pathlib.Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*$", told.read_text(), re.MULTILINE) if told.exists() else None
    extensions = features[0] if features else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(extensions.encode()).hexdigest()[:8]}"
