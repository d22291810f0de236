"""The manifest of a finished checkpoint: size and sha256 of every file, by which damage is noticed before use."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from lslm_jax.errors import CheckpointRefused


def write_manifest(directory: epath.Path) -> None:
    """Lists size and sha256 of every file of a finished checkpoint in its manifest.json."""
    try:
        files = {str(path.relative_to(directory)): _fingerprint(path) for path in _files(directory)}
        temporary = directory / "manifest.json.tmp"
        temporary.write_text(json.dumps({"files": files}, indent=1))
        temporary.replace(directory / "manifest.json")
    except FileNotFoundError:
        if directory.exists():  # otherwise a newer checkpoint has already taken this one's place
            raise


def check_manifest(directory: epath.Path) -> None:
    """Compares every file with manifest.json. A run killed before it was written leaves none: nothing to compare.

    Raises:
      CheckpointRefused: a file is missing, has another size or another content.
    """
    manifest = epath.Path(directory) / "manifest.json"
    if not manifest.exists():
        return
    for name, wanted in json.loads(manifest.read_text())["files"].items():
        path = epath.Path(directory) / name
        if not path.exists():
            raise CheckpointRefused(f"checkpoint file {path} is missing")
        found = _fingerprint(path)
        if found["bytes"] != wanted["bytes"]:
            raise CheckpointRefused(f"{path} is {found['bytes']:,} bytes, its manifest says {wanted['bytes']:,}")
        if found["sha256"] != wanted["sha256"]:
            raise CheckpointRefused(f"{path} is damaged: its sha256 is not the one in its manifest")


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
