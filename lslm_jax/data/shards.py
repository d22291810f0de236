"""Token shards: the ids of all documents of a split on disk, flat and memory-mapped.

    tokens-00000.bin ...   little-endian uint16 (vocabularies up to 65,536) or uint32, documents without special ids
    starts.bin             int64 [N + 1]: document d holds the tokens starts[d]:starts[d + 1] of the whole split
    num_bytes.bin          int64 [N]: UTF-8 bytes of each document's text
    manifest.json          counts, and size and sha256 of each file; written last, so a set that has one is whole

While a writer is at work a journal stands in the manifest's place. It lists the shards that are whole; a killed writer
goes on after the last of them.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import DataError, InputMissing

_VERSION = 1
_MANIFEST = "manifest.json"
_JOURNAL = "journal.json"
_INDEX = np.dtype("<i8")


class ShardWriter:
    """Writes a split, document by document, and goes on where a killed writer stopped.

    Attributes:
      cursor: raw documents of the source already accounted for in whole shards, 0 when fresh. Documents below it must
        not be added again.
    """

    def __init__(self, directory: epath.Path, vocab_size: int, shard_tokens: int):
        """Opens `directory` for writing, or for going on.

        Args:
          directory: of this split only; created where missing.
          vocab_size: ids are below it.
          shard_tokens: a shard is closed once it holds so many tokens; documents are never cut.

        Raises:
          DataError: the directory holds another writer's shards, of another vocabulary or shard size.
          SaveError: it cannot be written.
        """
        self._directory = epath.Path(directory)
        self._settings: dict[str, Any] = {"version": _VERSION, "vocab_size": vocab_size, "shard_tokens": shard_tokens}
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        with atomic.saving(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manifest = self._read_own(_MANIFEST)
            self._shards = self._manifest["shards"] if self._manifest else list(self._whole_shards())
            self._remove_remains()
        self.cursor: int = self._shards[-1]["cursor"] if self._shards else 0
        self._documents = sum(shard["documents"] for shard in self._shards)
        self._open_shard()

    def add(self, ids: np.ndarray, num_bytes: int, cursor: int) -> None:
        """Appends one document, closing the shard when that fills it.

        Args:
          ids: integers [n] without special ids; n may be 0.
          num_bytes: UTF-8 length of the text that the ids spell.
          cursor: raw index of this document in its source, plus 1.

        Raises:
          DataError: an id outside the vocabulary, or the set is complete already.
          SaveError: the disk is full, or refuses.
        """
        if self._manifest:
            raise DataError(f"{self._directory} is complete and takes no more documents; remove it to write it anew")
        vocab_size = self._settings["vocab_size"]
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            token = ids[(ids < 0) | (ids >= vocab_size)][0]
            document = self._documents + len(self._lengths)
            raise DataError(f"token {token} in document {document} of {self._directory}, vocabulary {vocab_size}")
        if self._file is None:
            self._file = atomic.WholeFile(self._directory / f"tokens-{len(self._shards):05d}.bin")
        self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(ids.size)
        self._num_bytes.append(int(num_bytes))
        self._tokens += ids.size
        self._next_cursor = int(cursor)
        if self._tokens >= self._settings["shard_tokens"]:
            self._close_shard(self._file)

    def finish(self) -> dict[str, Any]:
        """Writes the rest, the index, and last the manifest, which it returns.

        Returns:
          `documents`, `tokens`, `bytes`, `vocab_size`, `dtype`, `shards` and `index` (name, size and sha256 of each
          file), and the writer's settings.

        Raises:
          SaveError: the disk is full, or refuses.
        """
        if self._manifest:
            return self._manifest
        if self._file is not None:
            self._close_shard(self._file)
        index = self._write_index()
        manifest = self._settings | {
            "dtype": self._dtype.name,
            **{key: sum(shard[key] for shard in self._shards) for key in ("documents", "tokens", "bytes")},
            "shards": self._shards,
            "index": index,
        }
        atomic.write_json(self._directory / _MANIFEST, manifest)
        self._manifest = manifest
        self._remove_remains()
        return manifest

    def _open_shard(self) -> None:
        self._file: atomic.WholeFile | None = None
        self._lengths: list[int] = []
        self._num_bytes: list[int] = []
        self._tokens = 0

    def _close_shard(self, file: atomic.WholeFile) -> None:
        table = atomic.WholeFile(self._directory / f"documents-{len(self._shards):05d}.bin")
        table.write(np.array([self._lengths, self._num_bytes], _INDEX).tobytes())
        table.close()
        shard = file.close() | {
            "tokens": self._tokens,
            "documents": len(self._lengths),
            "bytes": sum(self._num_bytes),
            "cursor": self._next_cursor,
        }
        self._shards.append(shard)
        atomic.write_json(self._directory / _JOURNAL, self._settings | {"shards": self._shards})
        self._documents += len(self._lengths)
        self.cursor = self._next_cursor
        self._open_shard()

    def _write_index(self) -> list[dict[str, Any]]:
        """Joins the shards' tables of documents, one shard in memory at a time."""
        starts = atomic.WholeFile(self._directory / "starts.bin")
        num_bytes = atomic.WholeFile(self._directory / "num_bytes.bin")
        end = np.zeros(1, _INDEX)
        starts.write(end.tobytes())
        for i in range(len(self._shards)):
            with atomic.saving(self._directory):
                table = (self._directory / f"documents-{i:05d}.bin").read_bytes()
            lengths, sizes = np.frombuffer(table, _INDEX).reshape(2, -1)
            ends = end[-1] + np.cumsum(lengths, dtype=_INDEX)
            starts.write(ends.tobytes())
            num_bytes.write(sizes.tobytes())
            end = ends
        return [starts.close(), num_bytes.close()]

    def _read_own(self, name: str) -> dict[str, Any] | None:
        """The journal or manifest of a writer with the settings of this one; None where there is none."""
        path = self._directory / name
        if not path.exists():
            return None
        found = atomic.read_json(path)
        for key, value in self._settings.items():
            if found.get(key) != value:
                raise DataError(f"{path} was written with {key} {found.get(key)}, not {value}; remove {path.parent}")
        return found

    def _whole_shards(self) -> Iterator[dict[str, Any]]:
        """The journal's shards up to the first whose files are not what it says."""
        journal = self._read_own(_JOURNAL)
        for i, shard in enumerate(journal["shards"] if journal else []):
            table = self._directory / f"documents-{i:05d}.bin"
            sizes = {self._directory / shard["file"]: shard["size"], table: 2 * _INDEX.itemsize * shard["documents"]}
            if any(not path.exists() or path.stat().length != size for path, size in sizes.items()):
                return
            yield shard

    def _remove_remains(self) -> None:
        """Removes what a writer leaves and nobody needs: by our own names only, whoever else uses the directory."""
        keep = {shard["file"] for shard in self._shards}
        if self._manifest:
            keep |= {entry["file"] for entry in self._manifest["index"]}
        else:
            keep |= {f"documents-{i:05d}.bin" for i in range(len(self._shards))} | {_JOURNAL}
        for pattern in ("tokens-*.bin*", "documents-*.bin*", "starts.bin*", "num_bytes.bin*", "*.json.tmp", _JOURNAL):
            for path in self._directory.glob(pattern):
                if path.name not in keep:
                    path.unlink()


class Shards:
    """A prepared split, read.

    Attributes:
      directory: where it lies.
      num_documents: N.
      num_tokens: of all documents together.
      vocab_size: of the tokenizer that wrote the ids.
      starts: int64 [N + 1], memory-mapped; document d holds the tokens starts[d]:starts[d + 1].
      num_bytes: int64 [N], memory-mapped; UTF-8 bytes of each document's text.
    """

    def __init__(self, directory: epath.Path, manifest: dict[str, Any], local: pathlib.Path):
        self.directory = directory
        self.num_documents: int = manifest["documents"]
        self.num_tokens: int = manifest["tokens"]
        self.vocab_size: int = manifest["vocab_size"]
        self.starts, self.num_bytes = (_map(local / entry["file"], _INDEX) for entry in manifest["index"])
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [_map(local / entry["file"], dtype) for entry in manifest["shards"]]
        self._begins = np.cumsum([0, *(len(shard) for shard in self._shards)], dtype=np.int64)[:-1]

    @classmethod
    def open(cls, directory: epath.Path, verify: bool = False) -> "Shards":
        """Opens a split for reading; one that is not local is copied into a cache on this machine first, once.

        Args:
          directory: local, or gs://.
          verify: whether to read every byte and compare its sha256, beside the sizes, which are always compared.

        Raises:
          InputMissing: there is no manifest: nothing was prepared, or not to the end.
          DataError: a file is missing, truncated, too long or altered, or the manifest is unreadable.
        """
        directory = epath.Path(directory)
        path = directory / _MANIFEST
        if not atomic.exists(path):
            state = "is half prepared" if atomic.exists(directory / _JOURNAL) else "holds no prepared shards"
            raise InputMissing(f"{directory} {state} (no {_MANIFEST}): run prepare again")
        manifest = atomic.read_json(path)
        entries = _entries(manifest, path)
        _check_sizes(directory, entries)
        local = _copy(directory, entries) if atomic.is_remote(directory) else pathlib.Path(directory)
        if verify:
            _check_content(local, entries)
        shards = cls(directory, manifest, local)
        if len(shards.starts) != shards.num_documents + 1 or shards.starts[-1] != shards.num_tokens:
            raise DataError(f"{directory / 'starts.bin'} does not hold the {shards.num_documents} documents of {path}")
        return shards

    def take(self, index: np.ndarray) -> np.ndarray:
        """Token ids at places of the whole split.

        Args:
          index: int64 of any shape, each in [0, num_tokens).

        Returns:
          int32 ids of the same shape.
        """
        if not index.size:
            return np.zeros(index.shape, np.int32)
        first, last = np.searchsorted(self._begins, (index.min(), index.max()), side="right") - 1
        if first == last:
            return self._shards[first][index - self._begins[first]].astype(np.int32)
        flat = index.reshape(-1)
        shard = np.searchsorted(self._begins, flat, side="right") - 1
        shard = shard.astype(np.min_scalar_type(len(self._begins)))  # NumPy sorts up to 16 bits in linear time
        order = np.argsort(shard, kind="stable")
        ids = np.empty(flat.shape, np.int32)
        for places in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            which = shard[places[0]]
            ids[places] = self._shards[which][flat[places] - self._begins[which]]
        return ids.reshape(index.shape)


def _entries(manifest: dict[str, Any], path: epath.Path) -> list[dict[str, Any]]:
    """Name, size and sha256 of every file, none of which may lie outside the manifest's own directory."""
    if manifest.get("version") != _VERSION:
        raise DataError(f"{path} has version {manifest.get('version')}, this program reads {_VERSION}")
    lacking = {"vocab_size", "dtype", "documents", "tokens", "shards", "index"} - manifest.keys()
    if lacking:
        raise DataError(f"{path} lacks {', '.join(sorted(lacking))}: restore or prepare again")
    entries = manifest["shards"] + manifest["index"]
    for entry in entries:
        if pathlib.PurePath(entry["file"]).name != entry["file"]:
            raise DataError(f"{path} names {entry['file']!r}, which is not a file beside it")
    return entries


def _check_sizes(directory: epath.Path, entries: list[dict[str, Any]]) -> None:
    missing = [entry["file"] for entry in entries if not (directory / entry["file"]).exists()]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(missing)} of its {_MANIFEST}: restore or prepare again")
    for entry in entries:
        path = directory / entry["file"]
        size = path.stat().length
        if size != entry["size"]:
            state = "truncated" if size < entry["size"] else "too long"
            raise DataError(f"{path} is {state}: {size} bytes, {_MANIFEST} says {entry['size']}")


def _check_content(directory: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        with (directory / entry["file"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DataError(f"{file.name} was altered: its sha256 is not the one in {_MANIFEST}")


def _copy(directory: epath.Path, entries: list[dict[str, Any]]) -> pathlib.Path:
    """A local copy of a split, kept for later runs under the digest of its content."""
    digest = hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    local = root / "lslm_jax" / "shards" / digest
    with atomic.saving(epath.Path(local)):
        local.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            path = local / entry["file"]
            if not path.exists() or path.stat().st_size != entry["size"]:
                # Several processes of one machine may copy at once; each to its own name, and the last one wins.
                part = local / f"{entry['file']}.{os.getpid()}.tmp"
                (directory / entry["file"]).copy(part, overwrite=True)
                os.replace(part, path)
    return local


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
