"""Files that are whole or not there at all, local or remote."""

import contextlib
import hashlib
import json
import os
import weakref
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from lslm_jax.errors import ConfigError, DataError, SaveError


class WholeFile:
    """A file which takes its name only once it is whole and on disk."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._part = path.parent / f"{path.name}.tmp"
        self._size, self._sha256 = 0, hashlib.sha256()
        with saving(path):
            self._stream = self._part.open("wb")
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
        return {"file": self._path.name, "size": self._size, "sha256": self._sha256.hexdigest()}


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
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error


def is_remote(path: epath.Path) -> bool:
    """Whether a path is an address such as gs://bucket/name."""
    return "://" in os.fspath(path)


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


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file; DataError where it holds anything but an object."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value
