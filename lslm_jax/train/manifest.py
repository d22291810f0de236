"""The manifest of a finished checkpoint: size and sha256 of every file, by which damage is noticed before use."""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import CheckpointRefused


def write_manifest(directory: epath.Path) -> None:
    """Lists size and sha256 of every file of a finished checkpoint in its manifest.json."""
    files = {str(path.relative_to(directory)): _fingerprint(path) for path in _files(directory)}
    atomic.write_json(directory / "manifest.json", {"files": files})


def check_manifest(directory: epath.Path, parts: Collection[str] = ()) -> None:
    """Compares files with manifest.json. A run killed before it was written leaves none: nothing to compare.

    Args:
      directory: of the checkpoint.
      parts: subdirectories that will be read, besides files of the checkpoint itself; (): all.

    Raises:
      CheckpointRefused: a file is missing, has another size or another content.
    """
    manifest = epath.Path(directory) / "manifest.json"
    if not manifest.exists():
        return
    for name, (size, sha256) in _read(manifest).items():
        part, slash, _ = name.partition("/")
        if parts and slash and part not in parts:
            continue
        path = epath.Path(directory) / name
        if not path.exists():
            raise CheckpointRefused(f"checkpoint file {path} is missing")
        found = _fingerprint(path)
        if found["bytes"] != size:
            raise CheckpointRefused(f"{path} is {found['bytes']:,} bytes, its manifest says {size:,}")
        if found["sha256"] != sha256:
            raise CheckpointRefused(f"{path} is damaged: its sha256 is not the one in its manifest")


def set_aside_damaged(directory: epath.Path, log: Callable[[str], None]) -> int | None:
    """Moves damaged checkpoints out of the way, so that a run goes on from the newest whole one.

    They go to `damaged/` beside the `checkpoints` directory; nothing is deleted. If none is whole, all stay.

    Returns:
      The step of that one; None where there is no checkpoint.

    Raises:
      CheckpointRefused: there are checkpoints, and none is whole; a run never starts from scratch over them.
      SaveError: one cannot be moved.
    """
    directory = epath.Path(directory)
    found = [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []
    damaged: dict[epath.Path, str] = {}
    for path in sorted(found, key=lambda path: int(path.name), reverse=True):
        try:
            check_manifest(path)
        except CheckpointRefused as error:
            damaged[path] = str(error)
            continue
        for bad, reason in damaged.items():
            to = directory.parent / "damaged" / f"{bad.name}-{int(time.time())}"
            log(f"{reason}; going back to step {path.name}, step {bad.name} is set aside in {to}")
            with atomic.saving(to):
                to.parent.mkdir(exist_ok=True)
                bad.rename(to)
        return int(path.name)
    if damaged:
        raise CheckpointRefused("no checkpoint is whole: " + "; ".join(damaged.values()))
    return None


def _read(manifest: epath.Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name."""
    try:
        files = json.loads(manifest.read_text())["files"]
        return {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointRefused(f"{manifest} is damaged: {str(error).splitlines()[0]}") from error


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        elif not path.name.startswith("manifest.json"):
            yield path


def _fingerprint(path: epath.Path) -> dict[str, Any]:
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
            size += len(block)
    return {"bytes": size, "sha256": hasher.hexdigest()}
