"""A command starts anew with large pages once, as it was called; whoever set them otherwise is left alone."""

import ctypes
import os
import subprocess
import sys

import pytest

COMMAND = "import os, sys; from lslm_jax.runtime import huge_pages; huge_pages.ensure_large_pages()"
COMMAND += "; print(os.environ.get('GLIBC_TUNABLES')); print(os.getpid(), *sys.argv[1:])"

FRAGMENTED = """
import ctypes
from lslm_jax.runtime import huge_pages

glibc = ctypes.CDLL(None)
glibc.malloc.restype, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) >> 8
blocks = [glibc.malloc(10_000) for _ in range(20_000)]
for block in blocks:
    ctypes.memset(block, 1, 10_000)
for block in blocks[:-1]:
    glibc.free(block)
before = resident()
huge_pages.give_back()
print(before - resident())
"""


def said(**environ):
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", "-c", COMMAND, "--a b", "c"]
    with subprocess.Popen(command, env=clean | environ, stdout=subprocess.PIPE, text=True) as process:
        tunables, line = process.communicate(timeout=60)[0].splitlines()
    assert line == f"{process.pid} --a b c"
    return tunables


@pytest.mark.skipif(sys.platform != "linux", reason="they are glibc's")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_process_is_the_same_but_for_its_pages(before, after):
    assert said(**before) == after


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this libc keeps what is free")
def test_what_is_free_goes_back_though_a_block_behind_it_is_in_use():
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], stdout=subprocess.PIPE, check=True, text=True)
    assert int(done.stdout) > 150  # MiB, of 190
