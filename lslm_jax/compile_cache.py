"""What XLA has compiled is kept beside the runs: one that goes on, or that is looked at, need not compile again."""

import os
import stat
from typing import Any, cast

import jax

from lslm_jax import atomic

NAME = ".xla_cache"


def keep(workdir: str) -> None:
    """Makes `.xla_cache` in the parent of a run directory JAX's persistent cache, unless the user has named another.

    Programs from there are run: where everyone may write, as in /tmp, there is none.
    """
    parent, settings = atomic.place(workdir).parent, cast(Any, jax.config)
    if settings.jax_compilation_cache_dir:
        return
    if not atomic.is_remote(parent) and parent.exists():
        if os.stat(parent).st_mode & stat.S_IWOTH or not os.access(parent, os.W_OK):
            return
    settings.update("jax_compilation_cache_dir", str(parent / NAME))
