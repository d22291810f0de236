"""Paths as users write them, and files that grow; what lies in a bucket is tested with one (test_bucket.py)."""

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
