"""What glibc's malloc is asked for: memory in large pages, and that what is free goes back to the system.

XLA takes the temporaries of a step from malloc in one piece and gives them back at its end, so that every step begins
with fresh memory, which the kernel hands out page by page: a fifth of a small step's time on a CPU. glibc asks for
large pages if it is told so, but it can only be told when a process starts.
"""

import ctypes
import os
import sys
from collections.abc import Mapping

_NAME, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """That of a process which is to have large pages, unless it says of them already."""
    tunables = environ.get(_NAME, "")
    if _SETTING in tunables:
        return dict(environ)
    return {**environ, _NAME: ":".join(filter(None, [tunables, f"{_SETTING}=1"]))}


def ensure_large_pages() -> None:
    """Starts this command anew, in its process, with large pages; returns where it was, or where that means nothing."""
    if sys.platform == "linux" and (wanted := environment(os.environ)) != os.environ:
        os.execve(sys.executable, sys.orig_argv, wanted)


def give_back() -> None:
    """Returns what is free to the system: after compiling a small GPT's step 300 MB, which malloc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # which musl has not
        trim(ctypes.c_size_t(0))
