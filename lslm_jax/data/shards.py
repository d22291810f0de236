"""Token shards: the ids of all documents of a split on disk, flat and memory-mapped.

    tokens-00000.bin ...   little-endian uint16 (vocabularies up to 65,536) or uint32, documents without special ids
    starts.bin             int64 [N * F + 1]: document d holds the tokens starts[d]:starts[d + 1] of the whole split
    num_bytes.bin          int64 [N]: UTF-8 bytes of each example's text
    numbers.bin            float64 [N, W], where examples have numbers
    examples.jsonl         the examples as they were read, where they are kept
    manifest.json          counts, and size and sha256 of each file; written last, so a set that has one is whole

An example is F documents in a row (source and target; of plain text one) and W numbers (a class; of plain text none).

While a writer is at work a journal stands in the manifest's place. It lists the shards that are whole; a killed writer
goes on after the last of them.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from lslm_jax.data.shard_files import MANIFEST, check_content, check_sizes, copy, entries, map_array, token_type
from lslm_jax.errors import DataError, InputMissing
from lslm_jax.runtime import atomic_io

_EXAMPLES = "examples.jsonl"
_SLICE = 1 << 22  # tokens converted at once
_JOURNAL = "journal.json"
_CHUNK = 1 << 22  # entries that are checked at once
_INDEX = np.dtype("<i8")
_NUMBER = np.dtype("<f8")
_OURS = "tokens-*.bin* documents-*.bin* starts.bin* num_bytes.bin* numbers.bin* examples.jsonl* *.json.*tmp".split()


class ShardWriter:
    """Writes a split, example by example, and goes on where a killed writer stopped.

    Attributes:
      cursor: raw examples of the source already accounted for in whole shards, 0 when fresh. Examples below it must
        not be added again.
    """

    def __init__(
        self,
        directory: epath.Path,
        vocab_size: int,
        shard_tokens: int,
        fields: int = 1,
        numbers: int = 0,
        keep_examples: bool = False,
    ):
        """Opens `directory` for writing, or for going on.

        Args:
          directory: of this split only; created where missing.
          vocab_size: ids are below it.
          shard_tokens: a shard is closed once it holds so many tokens; examples are never cut.
          fields: documents of one example, F.
          numbers: numbers of one example, W.
          keep_examples: whether examples are written down as they were read, too.

        Raises:
          DataError: the directory holds another writer's shards, of another vocabulary or shard size.
          SaveError: it cannot be written.
        """
        self._directory = epath.Path(directory)
        self._fields, self._numbers, self._keep = fields, numbers, keep_examples
        self._settings: dict[str, Any] = {"version": 1, "vocab_size": vocab_size, "shard_tokens": shard_tokens}
        if fields > 1 or numbers or keep_examples:
            self._settings |= {"version": 2, "fields": fields, "numbers": numbers, "keep_examples": keep_examples}
        self._dtype = np.dtype(token_type(vocab_size)).newbyteorder("<")
        with atomic_io.saving(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manifest = self._read_own(MANIFEST)
            self._shards = self._manifest["shards"] if self._manifest else list(self._whole_shards())
            self._remove_remains()
        self.cursor: int = self._shards[-1]["cursor"] if self._shards else 0
        self._documents = sum(shard["documents"] for shard in self._shards)
        self._open_shard()

    def add(
        self,
        fields: Sequence[np.ndarray],
        num_bytes: int,
        cursor: int,
        numbers: Sequence[float] = (),
        example: dict[str, Any] | None = None,
        more: bool = False,
    ) -> None:
        """Appends one example, closing the shard when that fills it.

        Args:
          fields: F arrays of integers [n] without special ids; n may be 0.
          num_bytes: UTF-8 length of the text that is to be predicted.
          cursor: raw index of this example in its source, plus 1.
          numbers: W of them.
          example: as it was read, where examples are kept.
          more: whether others of this cursor follow, into the same shard.

        Raises:
          DataError: an id outside the vocabulary, or the set is complete already.
          SaveError: the disk is full, or refuses.
        """
        if self._manifest:
            raise DataError(f"{self._directory} is complete and takes no more documents; remove it to write it anew")
        assert (len(fields), len(numbers)) == (self._fields, self._numbers)
        for ids in fields:
            self._check_ids(ids)
        if self._file is None:
            self._file = atomic_io.WholeFile(self._directory / f"tokens-{len(self._shards):05d}.bin")
        for ids in fields:
            for first in range(0, ids.size, _SLICE):  # a document may have 100 million tokens
                self._file.write(ids[first : first + _SLICE].astype(self._dtype).tobytes())
            self._lengths.append(ids.size)
            self._tokens += ids.size
        self._num_bytes.append(int(num_bytes))
        self._values.extend(map(float, numbers))
        if self._keep:
            self._examples.append(json.dumps(example, ensure_ascii=False).encode() + b"\n")
        self._next_cursor = int(cursor)
        if self._tokens >= self._settings["shard_tokens"] and not more:
            self._close_shard(self._file)

    def _check_ids(self, ids: np.ndarray) -> None:
        vocab_size = self._settings["vocab_size"]
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            token = ids[(ids < 0) | (ids >= vocab_size)][0]
            document = self._documents + len(self._num_bytes)
            raise DataError(f"token {token} in document {document} of {self._directory}, vocabulary {vocab_size}")

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
        atomic_io.write_json(self._directory / MANIFEST, manifest)
        self._manifest = manifest
        self._remove_remains()
        return manifest

    def _open_shard(self) -> None:
        self._file: atomic_io.WholeFile | None = None
        self._lengths: list[int] = []
        self._num_bytes: list[int] = []
        self._values: list[float] = []
        self._examples: list[bytes] = []
        self._tokens = 0

    def _close_shard(self, file: atomic_io.WholeFile) -> None:
        table = atomic_io.WholeFile(self._directory / f"documents-{len(self._shards):05d}.bin")
        table.write(np.array(self._lengths + self._num_bytes, _INDEX).tobytes())
        table.write(np.array(self._values, _NUMBER).tobytes())
        table.write(b"".join(self._examples))
        size = table.close()["size"]
        shard = file.close() | {
            "tokens": self._tokens,
            "documents": len(self._num_bytes),
            "bytes": sum(self._num_bytes),
            "cursor": self._next_cursor,
            **({"table": size} if self._settings["version"] > 1 else {}),
        }
        self._shards.append(shard)
        atomic_io.write_json(self._directory / _JOURNAL, self._settings | {"shards": self._shards})
        self._documents += len(self._num_bytes)
        self.cursor = self._next_cursor
        self._open_shard()

    def _write_index(self) -> list[dict[str, Any]]:
        """Joins the shards' tables of documents, one shard in memory at a time."""
        names = ["starts.bin", "num_bytes.bin"]
        names += (["numbers.bin"] if self._numbers else []) + ([_EXAMPLES] if self._keep else [])
        files = {name: atomic_io.WholeFile(self._directory / name) for name in names}
        end = np.zeros(1, _INDEX)
        files["starts.bin"].write(end.tobytes())
        for i, shard in enumerate(self._shards):
            with atomic_io.saving(self._directory):
                table = (self._directory / f"documents-{i:05d}.bin").read_bytes()
            count = shard["documents"]
            ends = [count * width * _INDEX.itemsize for width in np.cumsum([self._fields, 1, self._numbers])]
            lengths = np.frombuffer(table[: ends[0]], _INDEX)
            starts = end[-1] + np.cumsum(lengths, dtype=_INDEX)
            parts = [starts.tobytes(), table[ends[0] : ends[1]], table[ends[1] : ends[2]], table[ends[2] :]]
            for name, part in zip(("starts.bin", "num_bytes.bin", "numbers.bin", _EXAMPLES), parts, strict=True):
                if name in files:
                    files[name].write(part)
            end = starts
        return [file.close() for file in files.values()]

    def _read_own(self, name: str) -> dict[str, Any] | None:
        """The journal or manifest of a writer with the settings of this one; None where there is none."""
        path = self._directory / name
        if not path.exists():
            return None
        found = atomic_io.read_json(path)
        for key, value in self._settings.items():
            if found.get(key) != value:
                raise DataError(f"{path} was written with {key} {found.get(key)}, not {value}; remove {path.parent}")
        return found

    def _whole_shards(self) -> Iterator[dict[str, Any]]:
        """The journal's shards up to the first whose files are not what it says."""
        journal = self._read_own(_JOURNAL)
        for i, shard in enumerate(journal["shards"] if journal else []):
            table = self._directory / f"documents-{i:05d}.bin"
            size = shard["table"] if "table" in shard else 2 * _INDEX.itemsize * shard["documents"]
            sizes = {self._directory / shard["file"]: shard["size"], table: size}
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
        for pattern in [*_OURS, _JOURNAL]:
            for path in self._directory.glob(pattern):
                if path.name not in keep:
                    path.unlink()


class Shards:
    """A prepared split, read.

    Attributes:
      directory: where it lies.
      name: of what it holds, for messages; the directory by default.
      fields: documents of one example, F.
      num_examples: N.
      num_documents: N * F; field f of example e is document e * F + f.
      num_tokens: of all documents together.
      vocab_size: of the tokenizer that wrote the ids.
      starts: int64 [N * F + 1], memory-mapped; document d holds the tokens starts[d]:starts[d + 1].
      num_bytes: int64 [N], memory-mapped; UTF-8 bytes of each example's text that is to be predicted.
      numbers: float64 [N, W], memory-mapped.
    """

    def __init__(self, directory: epath.Path, manifest: dict[str, Any], local: pathlib.Path):
        self.directory, self.name = directory, str(directory)
        self.fields, width = (manifest["fields"], manifest["numbers"]) if manifest["version"] > 1 else (1, 0)
        self.num_examples: int = manifest["documents"]
        self.num_documents = self.num_examples * self.fields
        self.num_tokens: int = manifest["tokens"]
        self.vocab_size: int = manifest["vocab_size"]
        self.starts, self.num_bytes = (map_array(local / name, _INDEX) for name in ("starts.bin", "num_bytes.bin"))
        numbers = map_array(local / "numbers.bin", _NUMBER) if width else np.empty(0, _NUMBER)
        for name, array, size in (
            ("num_bytes.bin", self.num_bytes, self.num_examples),
            ("numbers.bin", numbers, self.num_examples * width),
        ):
            if len(array) != size:
                raise DataError(
                    f"{directory / name} holds {len(array)} entries instead of the {size} in its {MANIFEST}"
                )
        self.numbers = numbers.reshape(self.num_examples, width)
        self._examples = local / _EXAMPLES
        self._has_examples = any(entry["file"] == _EXAMPLES for entry in manifest["index"])
        dtype = np.dtype(token_type(self.vocab_size)).newbyteorder("<")
        self._shards = [map_array(local / entry["file"], dtype) for entry in manifest["shards"]]
        self._begins = np.cumsum([0, *(len(shard) for shard in self._shards)], dtype=np.int64)[:-1]

    @classmethod
    def open(cls, directory: epath.Path, verify: bool = False, name: str = "") -> "Shards":
        """Opens a split for reading; one that is not local is copied into a cache on this machine first, once.

        Args:
          directory: local, or gs://.
          verify: whether to read every byte and compare its sha256, beside the sizes, which are always compared.
          name: of what it holds, for messages. "": the directory.

        Raises:
          InputMissing: there is no manifest: nothing was prepared, or not to the end.
          DataError: a file is missing, truncated, too long or altered, or the manifest is unreadable.
        """
        directory = epath.Path(directory)
        path = directory / MANIFEST
        if not atomic_io.exists(path):
            state = "is half prepared" if atomic_io.exists(directory / _JOURNAL) else "holds no prepared shards"
            raise InputMissing(f"{directory} {state} (no {MANIFEST}): run prepare again")
        manifest = atomic_io.read_json(path)
        files = entries(manifest, path)
        check_sizes(directory, files)
        local = copy(directory, files) if atomic_io.is_remote(directory) else pathlib.Path(directory)
        if verify:
            check_content(epath.Path(local), files)
        shards = cls(directory, manifest, local)
        shards.name = name or shards.name
        if len(shards.starts) != shards.num_documents + 1 or shards.starts[-1] != shards.num_tokens:
            raise DataError(f"{directory / 'starts.bin'} does not hold the {shards.num_documents} documents of {path}")
        shards._check_starts()
        if verify:
            shards._check_ids()
        return shards

    def _check_starts(self) -> None:
        """Raises a DataError where documents do not begin at 0 and follow each other, or shards lack tokens."""
        if self.starts[0] != 0:
            raise DataError(f"{self.directory / 'starts.bin'} begins with {self.starts[0]}, not with 0")
        for first in range(0, self.num_documents, _CHUNK):
            part = self.starts[first : first + _CHUNK + 1]
            if (wrong := np.flatnonzero(part[1:] < part[:-1])).size:
                raise DataError(f"{self.directory / 'starts.bin'} falls at document {first + wrong[0]}")
        if (found := sum(map(len, self._shards))) != self.num_tokens:
            raise DataError(f"{self.directory} holds {found} tokens instead of the {self.num_tokens} in its {MANIFEST}")

    def _check_ids(self) -> None:
        """Raises a DataError where a token is outside the vocabulary, or a number of bytes is negative."""
        for number, shard in enumerate(self._shards):
            for first in range(0, len(shard), _CHUNK):
                if (largest := shard[first : first + _CHUNK].max()) >= self.vocab_size:
                    raise DataError(
                        f"token {largest} in shard {number} of {self.directory}, vocabulary {self.vocab_size}"
                    )
        if self.num_examples and self.num_bytes.min() < 0:
            raise DataError(f"{self.directory / 'num_bytes.bin'} holds a negative number")

    def examples(self) -> Iterator[dict[str, Any]]:
        """The examples as they were read, in their order.

        Raises:
          InputMissing: they were not kept, as in training splits and those of plain text.
        """
        if not self._has_examples:
            raise InputMissing(f"{self.directory} keeps no examples as they were read (no {_EXAMPLES})")
        with self._examples.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{self._examples}:{number} is damaged: {error}") from error

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
