"""Paths as users write them, and files that grow; what lies in a bucket is tested with one (test_bucket.py)."""

import os
import pathlib

import pytest
from etils import epath

from lslm_jax import atomic


def test_a_path_holds_in_any_directory_and_an_address_is_one_already(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert atomic.place("runs/one") == epath.Path(tmp_path / "runs" / "one")
    assert atomic.place("~/runs") == epath.Path(pathlib.Path.home() / "runs")
    assert atomic.place(tmp_path) == epath.Path(tmp_path)
    for address in ("gs://mine/runs/one", "s3://mine/runs/one"):
        assert str(atomic.place(address)) == address
        assert str(atomic.place(epath.Path(address))) == address


@pytest.mark.parametrize("before", ["", "older\n"])
def test_lines_are_added_to_what_is_there_each_at_once(tmp_path, before):
    path = epath.Path(tmp_path) / "new" / "lines"
    if before:
        path.parent.mkdir()
        path.write_text(before)
    lines = atomic.Lines(path)
    lines.add("one")
    assert path.read_text() == before + "one\n"
    lines.sync()
    lines.add("two")
    lines.close()
    assert path.read_text() == before + "one\ntwo\n"


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A power cut after a rename without fsync leaves an empty file under the final name."""
    events, fsync, path = [], os.fsync, tmp_path / "file"

    def record(descriptor):
        size = os.fstat(descriptor).st_size if os.path.isfile(f"/proc/self/fd/{descriptor}") else "directory"
        events.append((size, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    file = atomic.WholeFile(epath.Path(path))
    file.write(b"twelve bytes")
    assert not path.exists()
    file.close()
    assert events[0] == (12, False) and path.read_bytes() == b"twelve bytes"
