"""The manifest of a finished checkpoint: size and sha256 of every file, by which damage is noticed before use."""

import hashlib
import json
from collections.abc import Collection, Iterator
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
