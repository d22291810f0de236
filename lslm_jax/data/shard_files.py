"""The files of a prepared split: which there are, whether they are whole, and where on this machine they lie."""

import hashlib
import os
import pathlib
from typing import Any

import numpy as np
from etils import epath

from lslm_jax.errors import DataError
from lslm_jax.runtime import atomic_io

MANIFEST = "manifest.json"
VERSIONS = (1, 2)  # 2: examples of several fields, with numbers, or kept as they were read


def entries(manifest: dict[str, Any], path: epath.Path) -> list[dict[str, Any]]:
    """Name, size and sha256 of every file, none of which may lie outside the manifest's own directory."""
    if manifest.get("version") not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise DataError(f"{path} has version {manifest.get('version')}, this program reads {known}")
    needed = {"vocab_size", "dtype", "documents", "tokens", "shards", "index"}
    lacking = (needed | ({"fields", "numbers"} if manifest["version"] > 1 else set())) - manifest.keys()
    if lacking:
        raise DataError(f"{path} lacks {', '.join(sorted(lacking))}: restore or prepare again")
    _check_numbers(manifest, path)
    found = manifest["shards"] + manifest["index"]
    listed = {entry["file"] for entry in manifest["index"]}
    if missing := {"starts.bin", "num_bytes.bin", *["numbers.bin"] * bool(manifest.get("numbers"))} - listed:
        raise DataError(f"{path} does not list {min(missing)}: restore or prepare again")
    for entry in found:
        if pathlib.PurePath(entry["file"]).name != entry["file"]:
            raise DataError(f"{path} names {entry['file']!r}, which is not a file beside it")
    return found


def _check_numbers(manifest: dict[str, Any], path: epath.Path) -> None:
    """Checks the types and ranges of all that a manifest names; nothing of it is used before.

    Raises:
      DataError: names the entry.
    """
    lowest = {"vocab_size": 1, "documents": 0, "tokens": 0, "fields": 1, "numbers": 0}
    for name, least in lowest.items():
        if name in manifest and not _is_count(manifest[name], least):
            raise DataError(f"{path} has {name} {manifest[name]!r}, not a whole number from {least} on")
    if manifest["dtype"] != (expected := token_type(manifest["vocab_size"])):
        raise DataError(f"{path} has dtype {manifest['dtype']!r}; tokens of this vocabulary are {expected}")
    for name in ("shards", "index"):
        if not isinstance(manifest[name], list) or not all(map(_is_entry, manifest[name])):
            raise DataError(f"{path} has {name} that do not list files with size and sha256")


def token_type(vocab_size: int) -> str:
    """Name of the type of token ids on disk; there are two."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    name, sha256 = entry.get("file"), entry.get("sha256")
    return isinstance(name, str) and isinstance(sha256, str) and _is_count(entry.get("size"))


def check_sizes(directory: epath.Path, entries: list[dict[str, Any]]) -> None:
    """Raises a DataError that names the first file that is missing or has another size than its entry says."""
    missing = [entry["file"] for entry in entries if not (directory / entry["file"]).exists()]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(missing)} of its {MANIFEST}: restore or prepare again")
    for entry in entries:
        path = directory / entry["file"]
        size = path.stat().length
        if size != entry["size"]:
            state = "truncated" if size < entry["size"] else "too long"
            raise DataError(f"{path} is {state}: {size} bytes, {MANIFEST} says {entry['size']}")


def check_content(directory: epath.Path, entries: list[dict[str, Any]]) -> None:
    """Reads every file; raises a DataError that names the first whose sha256 is another than its entry says."""
    for entry in entries:
        path = directory / entry["file"]
        if atomic_io.fingerprint(path)[1] != entry["sha256"]:
            raise DataError(f"{path} was altered: its sha256 is not the one in {MANIFEST}")


def copy(directory: epath.Path, entries: list[dict[str, Any]]) -> pathlib.Path:
    """A local copy of a split, kept for later runs under the digest of its content."""
    digest = hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    local = root / "lslm_jax" / "shards" / digest
    with atomic_io.saving(epath.Path(local)):
        local.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            path = local / entry["file"]
            if not path.exists() or path.stat().st_size != entry["size"]:
                # Several processes of one machine may copy at once; each to its own name, and the last one wins.
                part = local / f"{entry['file']}.{os.getpid()}.tmp"
                (directory / entry["file"]).copy(part, overwrite=True)
                os.replace(part, path)
    return local


def map_array(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    """The file's content as a flat array, memory-mapped."""
    # An empty file cannot be mapped.
    if path.stat().st_size % dtype.itemsize:
        raise DataError(f"{path} is {path.stat().st_size} bytes, not a multiple of {dtype.itemsize}")
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
