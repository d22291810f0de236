"""A command starts anew with large pages once, as it was called, and whoever set them otherwise is left alone."""

import os
import subprocess
import sys

import pytest

COMMAND = "import os, sys; from lslm_jax import hugepages; hugepages.ensure(); print(os.environ.get('GLIBC_TUNABLES'))"
COMMAND += "; print(os.getpid(), *sys.argv[1:])"


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
