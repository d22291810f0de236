"""The manifest of a checkpoint: size and sha256 of every file, by which damage is noticed before use.

It is written last, and what has none is no checkpoint yet. It also holds the step, and the sha256 of its own entries.
Its list is exact in both directions: a file that it does not list is damage as well.
"""

import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from etils import epath

from lslm_jax.errors import CheckpointRefused, first_line
from lslm_jax.runtime import atomic_io

_NAME = "manifest.json"
_MAX_BYTES = 1 << 28  # of a manifest; one of a large model on thousands of hosts has some ten megabytes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def write_manifest(directory: epath.Path) -> None:
    """Lists size and sha256 of every file of a checkpoint in its manifest.json, and so finishes it."""
    found = {str(path.relative_to(directory)): atomic_io.fingerprint(path) for path in _files(directory)}
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in found.items()}
    content = {"files": files} | ({"step": int(directory.name)} if directory.name.isdigit() else {})
    atomic_io.write_json(directory / _NAME, content | {"sha256": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def has_manifest(directory: epath.Path) -> bool:
    """Whether a checkpoint was finished."""
    return (epath.Path(directory) / _NAME).exists()


def list_steps(directory: epath.Path) -> list[int]:
    """Steps of the finished checkpoints in the `checkpoints` directory of a run, ascending."""
    return [int(path.name) for path in checkpoints_in(directory) if has_manifest(path)]


def checkpoints_in(directory: epath.Path) -> list[epath.Path]:
    """Finished and unfinished checkpoints in the `checkpoints` directory of a run, by step.

    Their names are steps as `str` gives them: 04, or digits of other scripts, name none.
    """
    directory = epath.Path(directory)
    found = [path for path in directory.iterdir() if _STEP.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def check_manifest(directory: epath.Path, parts: Collection[str] = ()) -> None:
    """Compares the files of a checkpoint with its manifest.json.

    Args:
      directory: of the checkpoint.
      parts: subdirectories that will be read, besides files of the checkpoint itself; (): all.

    Raises:
      CheckpointRefused: there is no manifest; or a file is missing, has another size or another content; or there is
        one that the manifest does not list.
    """
    directory = epath.Path(directory)
    if not has_manifest(directory):
        raise CheckpointRefused(f"{directory} has no {_NAME}: it was never finished")
    try:
        _check_files(directory, parts)
    except OSError as error:  # deleted meanwhile, or not to be read
        name = error.filename or directory
        raise CheckpointRefused(f"checkpoint file {name} cannot be read: {error.strerror or error}") from error


def _check_files(directory: epath.Path, parts: Collection[str]) -> None:
    listed = _read(directory / _NAME)
    present = {str(path.relative_to(directory)): path for path in _files(directory)}
    if unlisted := sorted(present.keys() - listed.keys()):
        raise CheckpointRefused(
            f"{directory / unlisted[0]} is not listed in the checkpoint's {_NAME}: it was put there"
        )
    for name, (size, sha256) in listed.items():
        part, slash, _ = name.partition("/")
        if parts and slash and part not in parts:
            continue
        path = directory / name
        if name not in present:
            raise CheckpointRefused(f"checkpoint file {path} is missing")
        _check_size(path, size)
        if atomic_io.fingerprint(path)[1] != sha256:
            raise CheckpointRefused(f"{path} is damaged: its sha256 is not the one in its manifest")


def _check_size(path: epath.Path, size: int) -> None:
    """Compares the size of a regular file before a byte of it is read: a device or a pipe might never end."""
    if atomic_io.is_remote(path):
        found = path.stat().length
    else:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointRefused(f"{path} is not a regular file")
        found = status.st_size
    if found != size:
        raise CheckpointRefused(f"{path} is {found:,} bytes, its manifest says {size:,}")


def discard(directory: epath.Path) -> None:
    """Deletes a checkpoint, its manifest first, so that what a kill leaves of it is none; SaveError if it cannot.

    Of a symbolic link only the link is removed: where it leads to, an archive perhaps, is not this run's.
    """
    with atomic_io.saving(directory):
        if os.path.islink(directory):
            directory.unlink()
            return
        (directory / _NAME).unlink(missing_ok=True)
        directory.rmtree()


def settle(directory: epath.Path, log: Callable[[str], None]) -> int | None:
    """Makes the newest whole checkpoint the newest one, so that a run goes on from it.

    Damaged ones, and those that a kill left without a manifest, go to `damaged/` beside the `checkpoints` directory;
    nothing is deleted. If none is whole, the newest that lacks nothing but the manifest is taken as it is. If there is
    none of these either, all stay.

    Returns:
      The step of that one; None where there is no checkpoint.

    Raises:
      CheckpointRefused: there are checkpoints, and none can be taken; a run never starts from scratch over them.
      SaveError: one cannot be moved.
    """
    newest_first = checkpoints_in(directory)[::-1]
    if not newest_first:
        return None
    refused: dict[epath.Path, str] = {}
    for path in newest_first:
        try:
            check_manifest(path)
        except CheckpointRefused as error:
            refused[path] = str(error)
            continue
        return _go_back(path, refused, log)
    for number, path in enumerate(newest_first):
        if not has_manifest(path):
            log(f"{refused[path]}, but there is no other: it is taken as it is")
            write_manifest(path)
            return _go_back(path, {bad: refused[bad] for bad in newest_first[:number]}, log)
    raise CheckpointRefused("no checkpoint is whole: " + "; ".join(refused.values()))


def _go_back(path: epath.Path, refused: Mapping[epath.Path, str], log: Callable[[str], None]) -> int:
    """Sets aside what is newer."""
    for bad, reason in refused.items():
        to = set_aside(bad, "damaged")
        log(f"{reason}; going back to step {path.name}, step {bad.name} is set aside in {to}")
    return int(path.name)


def set_aside(checkpoint: epath.Path, name: str) -> epath.Path:
    """Moves a checkpoint out of the way, nothing of it deleted; returns where it lies now.

    That is the directory `name` beside `checkpoints`. Where `checkpoints` is a link to another disk, it is `name`
    within that directory: a rename cannot cross file systems.

    Raises:
      SaveError: it cannot be moved.
    """
    stamp, directory = f"{checkpoint.name}-{int(time.time())}", checkpoint.parent
    for parent in (directory.parent / name, directory / name):
        # The clock may stand still or jump back: a name that is taken is not used again.
        names = itertools.chain((stamp,), (f"{stamp}-{number}" for number in itertools.count(2)))
        to = next(parent / each for each in names if not (parent / each).exists())
        with atomic_io.saving(to):
            parent.mkdir(exist_ok=True)
            try:
                checkpoint.rename(to)
            except OSError as error:
                if error.errno != errno.EXDEV or parent.parent == directory:
                    raise
                continue
            return to
    raise AssertionError("unreachable")


def _read(manifest: epath.Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name.

    Raises:
      CheckpointRefused: the manifest is empty, altered, of another step, or names what is no file of the checkpoint.
    """
    try:
        if (length := manifest.stat().length) > _MAX_BYTES:
            raise ValueError(f"{length:,} bytes")
        content = atomic_io.parse_json(manifest.read_text())
        entries = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in content["files"].items()}
        if not entries:
            raise ValueError("it lists no file")
        for name, (size, sha256) in entries.items():
            plain = pathlib.PurePosixPath(name)
            if plain.is_absolute() or ".." in plain.parts or str(plain) != name or size < 0:
                raise ValueError(f"{name!r} with {size} bytes is no file of a checkpoint")
            if not _SHA256.fullmatch(sha256):
                raise ValueError(f"{sha256!r} is no sha256")
        own, step = content.pop("sha256", None), content.get("step")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointRefused(f"{manifest} is damaged: {first_line(error)}") from error
    if (own is not None or "step" in content) and own != _digest(content):  # versions before had neither
        raise CheckpointRefused(f"{manifest} is damaged: its own sha256 does not match its entries")
    if step is not None and str(step) != manifest.parent.name:
        raise CheckpointRefused(f"{manifest.parent} holds the checkpoint of step {step}: it was renamed")
    return entries


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        elif not path.name.startswith(_NAME):
            yield path
