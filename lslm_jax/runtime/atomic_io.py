"""Files that are whole or not there at all, local or remote."""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from lslm_jax.errors import ConfigError, DataError, SaveError

_SYNC_SECONDS = 60.0  # after which added lines are put into a bucket unasked
_STALE_SECONDS = 3600.0  # after which nobody writes to what a killed process left
_SCHEMES = ("gs://", "s3://", "az://", "hf://")  # that epath and fsspec open
_LEFTOVER = re.compile(r".+\.[0-9a-f]{16}\.tmp")  # temporary file of a process that was killed


class WholeFile:
    """A file which takes its name only once it is whole and on disk."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._size, self._sha256 = 0, hashlib.sha256()
        with saving(path):
            if is_remote(path):
                self._part = path.parent / f"{path.name}.tmp"
                self._stream: IO[Any] = self._part.open("wb")
            else:
                # Random and exclusive: a link that somebody has put there is not followed.
                self._part = path.parent / f"{path.name}.{secrets.token_hex(8)}.tmp"
                self._stream = open_plain(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "wb")
        weakref.finalize(self, _abandon, self._stream)

    def write(self, data: bytes) -> None:
        """Appends; SaveError where the disk refuses."""
        self._size += len(data)
        self._sha256.update(data)
        with saving(self._path):
            self._stream.write(data)

    def close(self) -> dict[str, Any]:
        """Gives the file its name; returns that as `file`, its `size` in bytes and its `sha256`."""
        with saving(self._path):
            self._stream.flush()
            if not is_remote(self._path):
                os.fsync(self._stream.fileno())
            self._stream.close()
            self._part.replace(self._path)
            sync_directory(self._path.parent)
        return {"file": self._path.name, "size": self._size, "sha256": self._sha256.hexdigest()}


class Lines:
    """A text file that grows by whole lines, each at once on disk.

    What lies in a bucket cannot grow. There the lines are kept here, and the whole file is written anew when `sync` is
    called, and once a minute unasked.
    """

    def __init__(self, path: epath.Path):
        """Goes on with the file that is there, if there is one; SaveError where the disk refuses, as of all methods."""
        self._path, self._stream, self._content = path, None, bytearray()
        self._synced = time.monotonic()
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_remote(path):
                self._stream = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, "a")
                sync_directory(path.parent)
            elif path.exists():
                self._content += path.read_bytes()
        self._whole = len(self._content)  # bytes of it that are in the bucket

    def add(self, line: str) -> None:
        """Appends a line, which is given without its end."""
        if self._stream is not None:
            with saving(self._path):
                self._stream.write(line + "\n")
                self._stream.flush()
            return
        self._content += line.encode() + b"\n"
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Puts what was added where other processes, and later ones, find it, also after a power cut."""
        if self._stream is not None:
            stream = self._stream
            with saving(self._path):
                stream.flush()
                os.fsync(stream.fileno())
        if self._stream is None and len(self._content) > self._whole:
            write(self._path, bytes(self._content))
            self._whole, self._synced = len(self._content), time.monotonic()

    def close(self) -> None:
        """Syncs, and ends."""
        try:
            self.sync()
            if self._stream is not None:
                with saving(self._path):
                    self._stream.close()
        finally:
            if self._stream is not None:
                _abandon(self._stream)


def open_plain(path: epath.Path, flags: int, mode: str) -> IO[Any]:
    """Opens a local file by its own name: a symbolic link is an error (ELOOP), not a way to another file."""
    return os.fdopen(os.open(os.fspath(path), flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), mode)


def sync_directory(directory: epath.Path) -> None:
    """Puts the names in a local directory on disk; without that, a power cut may take a file that was renamed."""
    if is_remote(directory):
        return
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(os.fspath(directory), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(directory: epath.Path) -> None:
    """Removes temporary files that killed processes left in a local directory; nothing may be writing there."""
    if is_remote(directory) or not directory.is_dir():
        return
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def _abandon(stream: IO[Any]) -> None:
    """Closes a file that was given up half-way; that its last bytes found no room was told already."""
    with contextlib.suppress(OSError):
        stream.close()


@contextlib.contextmanager
def saving(path: epath.Path) -> Iterator[None]:
    """Says of an OSError which path could not be written, as a SaveError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SaveError(f"could not write {path}: it is a symbolic link, which is not followed") from error
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error


def similar(path: epath.Path) -> epath.Path | None:
    """The entry beside a path that does not exist whose name is most like it; None for none."""
    names = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as gs://bucket/name."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> epath.Path:
    """Absolute path for a path as a user wrote it; an address is one already (epath would prepend ours).

    Raises:
      ConfigError: an address of a scheme that there is not.
    """
    if is_remote(path) and not os.fspath(path).startswith(_SCHEMES):
        raise ConfigError(f"{os.fspath(path)} is no known address: use a local directory, or gs:// or s3://")
    path = epath.Path(path)
    return path if is_remote(path) else path.expanduser().absolute()


def exists(path: epath.Path) -> bool:
    """Whether a file is there; ConfigError where a package is needed to tell."""
    try:
        return path.exists()
    except ImportError as error:
        raise ConfigError(f"reading {path} needs tensorflow: pip install tensorflow-cpu") from error


def write(path: epath.Path, content: bytes) -> None:
    """Writes a whole file; SaveError where the disk refuses."""
    file = WholeFile(path)
    file.write(content)
    file.close()


@contextlib.contextmanager
def whole_directory(path: epath.Path, is_ours: Callable[[str], bool], last: str) -> Iterator[epath.Path]:
    """A directory to write in, whose files become those of `path` once the block ends without an error.

    Files of an older directory are removed if `is_ours` holds for their names, and stay otherwise. What ends the
    program between these steps leaves a directory without the file `last`, never files of both. In a bucket, which has
    no renaming, the older files are removed first.

    Raises:
      SaveError: it cannot be written, or `path` is a file.
    """
    if is_remote(path):
        _remove(path, is_ours, last)
        yield path
        return
    exists = path.exists()
    with saving(path):
        if exists and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a directory")
        beside = path if exists else path.parent
        beside.mkdir(parents=True, exist_ok=True)
        _remove_old_parts(beside, path.name)
        part = epath.Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=beside))
    try:
        yield part
        with saving(path):
            if exists:
                _remove(path, is_ours, last)
                for file in sorted(part.iterdir(), key=lambda file: file.name == last):
                    file.replace(path / file.name)
                part.rmdir()
            else:
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(part, 0o777 & ~umask)  # mkdtemp keeps others out
                part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _remove_old_parts(directory: epath.Path, name: str) -> None:
    """Removes what `whole_directory` left when it was killed, unless it was written to in the last hour."""
    for path in directory.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.part", path.name) and path.is_dir():
            with contextlib.suppress(OSError):  # removed meanwhile
                newest = max(os.stat(file).st_mtime for file in (path, *path.iterdir()))
                if time.time() - newest > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _remove(path: epath.Path, is_ours: Callable[[str], bool], first: str) -> None:
    """Removes files of a directory, beginning with the one without which it is none."""
    old = [file for file in path.iterdir() if is_ours(file.name) and not file.is_dir()] if path.exists() else []
    for file in sorted(old, key=lambda file: file.name != first):
        file.unlink()


def fingerprint(path: epath.Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file, read in pieces."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Writes a whole JSON file; SaveError where the disk refuses."""
    write(path, json.dumps(value, indent=1).encode())


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that may be damaged or edited by hand.

    Raises:
      ValueError: it is not JSON, nested too deeply, or has an object with the same key twice: one of the two values
        would be dropped in silence.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_count(value: Any) -> bool:
    """True for a JSON number that is whole, not negative and below 2**31."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file; DataError where it holds anything but an object, or cannot be read."""
    try:
        if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a directory" if path.is_dir() else "a device or pipe"
            raise DataError(f"{path} is {kind}, not a file")
        value = parse_json(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value
