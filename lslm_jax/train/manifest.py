"""The manifest of a checkpoint: size and sha256 of every file, by which damage is noticed before use.

It is written last, and what has none is no checkpoint yet.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import CheckpointRefused, first_line

_NAME = "manifest.json"


def write_manifest(directory: epath.Path) -> None:
    """Lists size and sha256 of every file of a checkpoint in its manifest.json, and so finishes it."""
    found = {str(path.relative_to(directory)): atomic.fingerprint(path) for path in _files(directory)}
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in found.items()}
    atomic.write_json(directory / _NAME, {"files": files})


def has_manifest(directory: epath.Path) -> bool:
    """Whether a checkpoint was finished."""
    return (epath.Path(directory) / _NAME).exists()


def check_manifest(directory: epath.Path, parts: Collection[str] = ()) -> None:
    """Compares the files of a checkpoint with its manifest.json.

    Args:
      directory: of the checkpoint.
      parts: subdirectories that will be read, besides files of the checkpoint itself; (): all.

    Raises:
      CheckpointRefused: there is no manifest; or a file is missing, has another size or another content.
    """
    manifest = epath.Path(directory) / _NAME
    if not has_manifest(directory):
        raise CheckpointRefused(f"{directory} has no {_NAME}: it was never finished")
    for name, (size, sha256) in _read(manifest).items():
        part, slash, _ = name.partition("/")
        if parts and slash and part not in parts:
            continue
        path = epath.Path(directory) / name
        if not path.exists():
            raise CheckpointRefused(f"checkpoint file {path} is missing")
        found = atomic.fingerprint(path)
        if found[0] != size:
            raise CheckpointRefused(f"{path} is {found[0]:,} bytes, its manifest says {size:,}")
        if found[1] != sha256:
            raise CheckpointRefused(f"{path} is damaged: its sha256 is not the one in its manifest")


def discard(directory: epath.Path) -> None:
    """Deletes a checkpoint, its manifest first, so that what a kill leaves of it is none; SaveError if it cannot."""
    with atomic.saving(directory):
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
    directory = epath.Path(directory)
    found = [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    if not found:
        return None
    newest_first = sorted(found, key=lambda path: int(path.name), reverse=True)
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
        to = path.parent.parent / "damaged" / f"{bad.name}-{int(time.time())}"
        log(f"{reason}; going back to step {path.name}, step {bad.name} is set aside in {to}")
        with atomic.saving(to):
            to.parent.mkdir(exist_ok=True)
            bad.rename(to)
    return int(path.name)


def _read(manifest: epath.Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name."""
    try:
        files = json.loads(manifest.read_text())["files"]
        return {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointRefused(f"{manifest} is damaged: {first_line(error)}") from error


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        elif not path.name.startswith(_NAME):
            yield path
