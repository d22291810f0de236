"""The safetensors format: a JSON header, then arrays as they lie in memory. Read one array at a time, written likewise.

Nothing a header says is believed before it is checked: files come from strangers.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from etils import epath

from lslm_jax.errors import DataError, InputMissing
from lslm_jax.runtime import atomic_io

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the format's own limit
_CHUNK = 1 << 24  # bytes that are read at once
SHARD_BYTES = 5_000_000_000  # of arrays in one file that is written
_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class Stored(Protocol):
    """An array in a file, of this format or another: which file, its type and shape, and where it begins."""

    @property
    def path(self) -> epath.Path: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def begin(self) -> int: ...

    def read(self) -> np.ndarray:
        """The whole array."""
        ...


class View:
    """A tensor computed from a stored one, with that one's file, type, shape and offset unless a subclass differs."""

    def __init__(self, base: Stored):
        self._base = base

    @property
    def path(self) -> epath.Path:
        """File of the stored tensor."""
        return self._base.path

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored tensor."""
        return self._base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return self._base.shape

    @property
    def begin(self) -> int:
        """Offset of the stored tensor."""
        return self._base.begin


class Tensor(NamedTuple):
    """An array of a safetensors file; it begins at that byte."""

    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self) -> np.ndarray:
        """The whole array, in memory of its own: mapped pages would count as memory in use.

        Raises:
          DataError: the file has become shorter.
        """
        content = np.empty(math.prod(self.shape) * self.dtype.itemsize, np.uint8)
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            for begin in range(0, content.size, _CHUNK):  # not at once: the host would hold it twice
                into = content[begin : begin + _CHUNK]
                part = stream.read(into.size)
                if len(part) < into.size:
                    raise DataError(f"{self.path} is cut short")
                into[:] = np.frombuffer(part, np.uint8)
        return content.view(self.dtype).reshape(self.shape)


def open_directory(directory: epath.Path) -> dict[str, Tensor]:
    """All arrays of a model, by name: of one file, or of several that an index names.

    Raises:
      InputMissing: there is no such file, only weights in another format perhaps.
      DataError: a header or the index is not what it should be.
    """
    if (directory / SINGLE).exists():  # counts where there is an index too, as in transformers
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _open_shards(directory)
    pickled = next((path.name for path in directory.glob("*.bin")), None) if directory.is_dir() else None
    if pickled:
        raise InputMissing(
            f"{directory} holds {pickled} but no {SINGLE}: pickled weights can run code, so they are never opened; "
            "take the model's safetensors, or save it again with transformers (save_pretrained)"
        )
    raise InputMissing(f"{directory} holds no {SINGLE}")


def _open_shards(directory: epath.Path) -> dict[str, Tensor]:
    path = directory / INDEX
    places = atomic_io.read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise DataError(f"{path} has no weight_map from tensors to files")
    files = sorted(set(places.values()))
    for name in files:
        if name != epath.Path(name).name or not name.endswith(".safetensors"):
            raise DataError(f"{path} names {name!r}, which is not a safetensors file beside it")
        if not (directory / name).exists():
            raise InputMissing(f"{path} names {name}, which is missing")
    headers = {name: read_header(directory / name) for name in files}
    for tensor, name in places.items():
        if tensor not in headers[name]:
            raise DataError(f"{path} says that {name} holds {tensor}, which it does not")
    return {tensor: headers[name][tensor] for tensor, name in places.items()}


def read_header(path: epath.Path) -> dict[str, Tensor]:
    """The arrays of one file, by name.

    Raises:
      DataError: the file is not whole, or its header contradicts itself or the file's size.
    """
    size = path.stat().length
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if not 8 < start <= min(size, MAX_HEADER):
            raise DataError(f"{path} is not a safetensors file: its header cannot be {start - 8} bytes long")
        text = stream.read(start - 8)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(path, name, entry, start) for name, entry in entries.items()}
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a safetensors file: its header is malformed") from error
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].shape)):
        if tensor.begin != end:
            raise DataError(f"{path}: {name} does not begin where the tensor before it ends")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise DataError(f"{path} has {size} bytes where its header promises {end}")
    return tensors


def _tensor(path: epath.Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    if entry["dtype"] not in _TYPES:
        raise DataError(f"{path}: {name} is of type {entry['dtype']}, which is not among {', '.join(_TYPES)}")
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise DataError(f"{path}: {name} has a shape or place that is not of whole numbers")
    dtype = _TYPES[entry["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path}: {name} has {end - begin} bytes, not those of {entry['dtype']}{shape}")
    return Tensor(path, dtype, tuple(shape), start + begin)


def same_bytes(one: Stored, other: Stored) -> bool:
    """True if two arrays are equal; read in parts, so that no more than these are in memory."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(np.array_equal(one.read(), other.read()))
    size = math.prod(one.shape) * one.dtype.itemsize
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.begin)
        b.seek(other.begin)
        return all(a.read(min(_CHUNK, size - at)) == b.read(min(_CHUNK, size - at)) for at in range(0, size, _CHUNK))


class Source(NamedTuple):
    """An array to be written: its type and shape are known before it is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(directory: epath.Path, sources: Mapping[str, Source], limit: int = SHARD_BYTES) -> list[str]:
    """Writes arrays, made one after another, as one file or several with an index; returns the names of the files.

    Raises:
      SaveError: the directory cannot be written.
    """
    shards = _shards(sources, limit)
    if len(shards) == 1:
        write_file(directory / SINGLE, sources)
        return [SINGLE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_file(directory / name, {tensor: sources[tensor] for tensor in tensors})
    places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    total = sum(source.nbytes() for source in sources.values())
    atomic_io.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return [*names, INDEX]


def _shards(sources: Mapping[str, Source], limit: int) -> list[list[str]]:
    """Names in the order given, as many to a file as its limit allows, at least one."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, source in sources.items():
        if shards[-1] and size + source.nbytes() > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += source.nbytes()
    return shards


def write_file(path: epath.Path, sources: Mapping[str, Source]) -> None:
    """Writes arrays, made one after another, as one file.

    Raises:
      SaveError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no other
    end = 0
    for name, source in sources.items():
        begin, end = end, end + source.nbytes()
        shape: Sequence[int] = source.shape
        header[name] = {"dtype": _NAMES[source.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = atomic_io.WholeFile(path)
    file.write(len(text).to_bytes(8, "little") + text)
    for source in sources.values():
        file.write(source.make().tobytes())
    file.close()
