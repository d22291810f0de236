"""Large pages for what malloc gives: without them, page faults take a fifth of a small step's time on a CPU.

XLA takes the temporaries of a step from malloc in one piece and gives them back at its end, so that every step begins
with fresh memory, which the kernel hands out page by page. glibc asks for large ones if it is told so, but it can only
be told when a process starts.
"""

import os
import sys

_NAME, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def ensure() -> None:
    """Starts this command anew, in its process, with large pages; returns where it was, or where that means nothing."""
    tunables = os.environ.get(_NAME, "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ[_NAME] = ":".join(filter(None, [tunables, _SETTING]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)
