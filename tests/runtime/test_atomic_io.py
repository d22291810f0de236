"""Paths as users write them, and files that grow; what lies in a bucket is tested with one (test_bucket.py)."""

import os
import pathlib
import stat

import pytest
from etils import epath

from lslm_jax.errors import ConfigError, DataError, SaveError
from lslm_jax.runtime import atomic_io


def test_a_path_holds_in_any_directory_and_an_address_is_one_already(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert atomic_io.place("runs/one") == epath.Path(tmp_path / "runs" / "one")
    assert atomic_io.place("~/runs") == epath.Path(pathlib.Path.home() / "runs")
    assert atomic_io.place(tmp_path) == epath.Path(tmp_path)
    for address in ("gs://mine/runs/one", "s3://mine/runs/one"):
        assert str(atomic_io.place(address)) == address
        assert str(atomic_io.place(epath.Path(address))) == address


@pytest.mark.parametrize("before", ["", "older\n"])
def test_lines_are_added_to_what_is_there_each_at_once(tmp_path, before):
    path = epath.Path(tmp_path) / "new" / "lines"
    if before:
        path.parent.mkdir()
        path.write_text(before)
    lines = atomic_io.Lines(path)
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
    file = atomic_io.WholeFile(epath.Path(path))
    file.write(b"twelve bytes")
    assert not path.exists()
    file.close()
    assert events[0] == (12, False) and path.read_bytes() == b"twelve bytes"


@pytest.mark.parametrize("address", ["foo://x", "https://example.org/run", "HTTP://example.org", "GS://bucket/run"])
def test_an_address_of_another_scheme_is_refused_in_one_line(address):
    with pytest.raises(ConfigError, match=f"^{address} is no known address: use a local directory, or gs:// or s3://$"):
        atomic_io.place(address)


def test_no_link_that_lies_where_something_is_written_is_followed(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    target = epath.Path(tmp_path) / "config.json"
    for name in ("config.json", "config.json.tmp", "config.json.0123456789abcdef.tmp"):
        (tmp_path / name).symlink_to(outside)
    monkeypatch.setattr(atomic_io.secrets, "token_hex", lambda _: "0123456789abcdef")
    with pytest.raises(SaveError, match="File exists"):
        atomic_io.write(target, b"new")
    monkeypatch.undo()
    atomic_io.write(target, b"new")
    assert outside.read_text() == "precious" and target.read_text() == "new" and not os.path.islink(target)
    (tmp_path / "lines").symlink_to(outside)
    with pytest.raises(SaveError, match="lines: it is a symbolic link, which is not followed"):
        atomic_io.Lines(epath.Path(tmp_path) / "lines")


def test_files_lines_and_the_names_of_both_are_put_on_disk(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_io.write(epath.Path(tmp_path) / "whole", b"content")
    assert synced == ["file", "directory"]
    lines = atomic_io.Lines(epath.Path(tmp_path) / "lines")
    lines.add("one")
    assert synced[2:] == ["directory"]
    lines.sync()
    assert synced[3:] == ["file"]
    lines.close()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    names = ("config.json", "config.json.0123456789abcdef.tmp", "notes.tmp", "a.0123.tmp")
    for name in names:
        (tmp_path / name).write_text("x")
    atomic_io.remove_leftovers(epath.Path(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names) - {names[1]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[1]", "does not hold a JSON object"),
    ],
)
def test_json_that_was_damaged_or_edited_is_one_line(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        atomic_io.read_json(epath.Path(tmp_path / "a.json"))


def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("directory", "pipe", "zero"):
        with pytest.raises(DataError, match=f"{name} is a .*, not a file"):
            atomic_io.read_json(epath.Path(tmp_path / name))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line_of_any_growing_file():
    """/dev/full refuses every byte as a full disk does (ENOSPC)."""
    lines = atomic_io.Lines(epath.Path("/dev/full"))
    for write in (lambda: lines.add("one"), lines.sync, lines.close):
        with pytest.raises(SaveError, match=r"^could not write /dev/full: No space left on device$"):
            write()


def test_what_a_killed_export_left_is_removed_once_nobody_writes_to_it(tmp_path):
    old, young, other = (tmp_path / f".{name}.part" for name in ("out.abcdefgh", "out.abcd1234", "else.abcdefgh"))
    for path in (old, young, other):
        path.mkdir()
        (path / "model.safetensors").write_text("weights")
    for path in (old, old / "model.safetensors", other, other / "model.safetensors"):
        os.utime(path, (1, 1))
    with atomic_io.whole_directory(epath.Path(tmp_path / "out"), lambda name: True, "config.json") as part:
        (part / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name, "out"}
