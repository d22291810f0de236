"""Examples from files: which files a source names, and how to read each format.

A reader yields the parts of an example by name, text as bytes where the format leaves it undecoded, and its place: FILE
or FILE:LINE.
"""

import codecs
import contextlib
import csv
import fnmatch
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal

from etils import epath

from lslm_jax.config import Source
from lslm_jax.data import squad
from lslm_jax.data.columns import Column, columns, pick
from lslm_jax.errors import ConfigError, DataError, InputMissing, first_line

Split = Literal["train", "valid", "test"]
Raw = tuple[dict[str, Any], str]


def inputs(source: Source, split: Split) -> list[tuple[epath.Path, ...]]:
    """What a split is read from: files, or pairs of plain text files, source and target.

    Patterns keep their order, and the files of each are sorted; none comes twice, and none that is held out.

    Raises:
      ConfigError: there is no pattern, or a plain text file has no partner.
      InputMissing: a pattern matches no file.
      DataError: two patterns that go together match unequal numbers of files.
    """
    if not source.files:
        raise ConfigError("data.files is empty: name files, directories or globs, or choose another data.source")
    held_out = [_inputs(f"data.{key}", getattr(source, key), source) for key in ("valid_files", "test_files")]
    if split != "train":
        return held_out[split == "test"]
    resolved = {path.resolve() for found in held_out for paths in found for path in paths}  # perhaps written otherwise
    found = _inputs("data.files", source.files, source)
    return [paths for paths in found if not resolved or not any(path.resolve() in resolved for path in paths)]


def matching(source: Source, split: Split) -> list[epath.Path]:
    """All files of a split; see `inputs`."""
    return [path for paths in inputs(source, split) for path in paths]


def _inputs(key: str, patterns: tuple[str, ...], source: Source) -> list[tuple[epath.Path, ...]]:
    if source.example != "pair":
        return [(path,) for path in _expand(key, patterns)]
    found: dict[tuple[epath.Path, ...], None] = {}
    waiting: tuple[str, list[epath.Path]] | None = None
    for pattern in patterns:
        paths = list(_expand(key, (pattern,)))
        if all(_suffix(path) in _FORMATS for path in paths):
            found |= dict.fromkeys((path,) for path in paths)
        elif waiting is None:
            waiting = pattern, paths
        else:
            found |= dict.fromkeys(_partners(key, *waiting, pattern, paths))
            waiting = None
    if waiting is not None:
        raise ConfigError(f"{key}: {waiting[0]} has no partner: pairs in plain text alternate, source then target")
    return list(found)


def _partners(
    key: str, pattern: str, paths: list[epath.Path], other: str, others: list[epath.Path]
) -> Iterator[tuple[epath.Path, ...]]:
    if len(paths) != len(others):
        raise DataError(f"{key}: {pattern} matches {len(paths)} files, {other} matches {len(others)}: no pairs")
    return zip(paths, others, strict=True)


def _expand(key: str, patterns: tuple[str, ...]) -> dict[epath.Path, None]:
    paths: dict[epath.Path, None] = {}
    for pattern in patterns:
        found = sorted(_match(epath.Path(pattern).expanduser()), key=os.fspath)
        if not found:
            raise InputMissing(f"{key}: {pattern} matches no file")
        paths |= dict.fromkeys(found)
    return paths


def _match(pattern: epath.Path) -> Iterator[epath.Path]:
    if pattern.exists():
        yield from _below(pattern)
        return
    parts = pattern.parts
    depth = next((i for i, part in enumerate(parts) if _is_magic(part)), len(parts))
    for path in _glob(epath.Path(*parts[:depth]), parts[depth:]):
        yield from _below(path)


def _glob(path: epath.Path, parts: tuple[str, ...]) -> Iterator[epath.Path]:
    """Paths below one that match the parts of a pattern; epath's own glob knows no `**`."""
    if not parts:
        if path.exists():
            yield path
    elif not _is_magic(parts[0]):
        yield from _glob(path / parts[0], parts[1:])
    elif path.is_dir():
        if parts[0] == "**":
            yield from _glob(path, parts[1:])
        for child in path.iterdir():
            if not _is_hidden(child.name) and fnmatch.fnmatchcase(child.name, parts[0]):
                yield from _glob(child, parts if parts[0] == "**" else parts[1:])


def _is_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _below(path: epath.Path) -> Iterator[epath.Path]:
    if not path.is_dir():
        yield path
        return
    for child in path.iterdir():
        if not _is_hidden(child.name):
            yield from _below(child)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def read(paths: tuple[epath.Path, ...], source: Source) -> Iterator[Raw]:
    """The examples of one file, or of two plain text files line by line, and where each stands.

    Raises:
      DataError: it is not of its format, a record lacks a part, or two files have unequal numbers of lines.
      InputMissing: it cannot be read.
      ConfigError: a package or a setting is missing.
    """
    path, *partner = paths
    if partner:
        yield from _read_pairs(path, *partner)
        return
    suffix = _suffix(path)
    with _reading(path) as stream:
        if suffix == ".json" and source.example == "qa":
            yield from squad.read(path, stream)
        elif suffix in _FORMATS:
            found = _FORMATS[suffix](path, stream, columns(source))
            yield from ((squad.flat(*raw), raw[1]) for raw in found) if source.example == "qa" else found
        elif source.example == "text":
            yield from (_read_lines if source.document == "line" else _read_whole)(path, stream)
        else:
            known = ", ".join([*_FORMATS, *([".json"] if source.example == "qa" else [])])
            raise DataError(f"{path}: data.example={source.example} is read from {known} files")


def _read_pairs(path: epath.Path, other: epath.Path) -> Iterator[Raw]:
    with _reading(path) as stream, _reading(other) as other_stream:
        lines, other_lines = _lines(stream), _lines(other_stream)
        for number in itertools.count(1):
            pair = [next(found, (0, None))[1] for found in (lines, other_lines)]
            if None in pair:
                break
            yield dict(zip(("source", "target"), pair, strict=True)), f"{path}:{number}"
        if pair != [None, None]:
            counts = [number - 1 + (line is not None) for line in pair]
            counts = [count + sum(1 for _ in rest) for count, rest in zip(counts, (lines, other_lines), strict=True)]
            raise DataError(f"{path} has {counts[0]} lines, {other} has {counts[1]}: pairs are aligned line by line")


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[IO[bytes]]:
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not whole gzip: {error}") from error
    except OSError as error:
        raise InputMissing(f"could not read {path}: {error.strerror or error}") from error


def is_whole(path: epath.Path, source: Source) -> bool:
    """Whether a file is one document."""
    return source.example == "text" and source.document == "file" and _suffix(path) not in _FORMATS


def _suffix(path: epath.Path) -> str:
    return os.path.splitext(path.name.removesuffix(".gz"))[1]


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield io.BufferedReader(unzipped, 1 << 20)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _read_whole(path: epath.Path, stream: IO[bytes]) -> Iterator[Raw]:
    yield {"text": stream.read().removeprefix(codecs.BOM_UTF8)}, os.fspath(path)


def _read_lines(path: epath.Path, stream: IO[bytes]) -> Iterator[Raw]:
    for number, line in _lines(stream):
        yield {"text": line}, f"{path}:{number}"


def _read_jsonl(path: epath.Path, stream: IO[bytes], wanted: list[Column]) -> Iterator[Raw]:
    for number, line in _lines(stream):
        if line and not line.isspace():
            origin = f"{path}:{number}"
            record = _json_object(line, wanted, origin)
            yield {column.name: pick(record, column, origin) for column in wanted}, origin


def _json_object(line: bytes, wanted: list[Column], origin: str) -> dict[str, Any]:
    try:
        # Bytes that are not UTF-8 travel as lone surrogates, for clean.bad_utf8 to decide about.
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from error
    if not isinstance(record, dict):
        keys = ", ".join(repr(column.key) for column in wanted if not column.optional)
        what = f"the field {keys}" if "," not in keys else f"the fields {keys}"
        raise DataError(f"{origin}: a JSON {type(record).__name__}, not an object with {what}")
    return record


def _read_tsv(path: epath.Path, stream: IO[bytes], wanted: list[Column]) -> Iterator[Raw]:
    lines = _lines(stream)
    header = next(lines, (1, b""))[1].decode(errors="replace").split("\t")
    places = _places(path, header, wanted)
    for number, line in lines:
        if line:
            yield _row(f"{path}:{number}", line.split(b"\t"), header, places)


def _read_csv(path: epath.Path, stream: IO[bytes], wanted: list[Column]) -> Iterator[Raw]:
    csv.field_size_limit((1 << 31) - 1)  # its default refuses documents over 128 kB
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(lines, strict=True)
    first = 1
    try:
        header = next(reader, [])
        places = _places(path, header, wanted)
        first = reader.line_num + 1
        for row in reader:
            if row:
                yield _row(f"{path}:{first}", row, header, places)
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{first}: not CSV: {error}") from error
    finally:
        lines.close()


def _places(path: epath.Path, header: list[str], wanted: list[Column]) -> dict[str, int]:
    """Where in each row the parts of an example stand."""
    for column in wanted:
        if column.holds not in ("text", "label"):
            raise DataError(f"{path}: a table of plain columns cannot hold {column.key!r}: use JSONL or Parquet")
    return {column.name: header.index(_known(path, header, column)) for column in wanted}


def _known(path: epath.Path, header: list[str], column: Column) -> str:
    if column.key not in header:
        raise DataError(f"{path}: no column {column.said}; its header has: {', '.join(header) or 'nothing'}")
    return column.key


def _row(origin: str, fields: list[Any], header: list[str], places: dict[str, int]) -> Raw:
    if len(fields) != len(header):
        raise DataError(f"{origin}: {len(fields)} columns, the header has {len(header)}")
    return {name: fields[place] for name, place in places.items()}, origin


def _read_parquet(path: epath.Path, stream: IO[bytes], wanted: list[Column]) -> Iterator[Raw]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        tops = {column: _top(path, names, column) for column in wanted if not column.optional or column.key in names}
        for batch in file.iter_batches(batch_size=1024, columns=sorted(set(tops.values()))):
            values = {top: _plain(batch.column(top), pa) for top in set(tops.values())}
            for row in range(batch.num_rows):
                number += 1
                record = {top: value[row] for top, value in values.items()}
                origin = f"{path}:{number}"
                yield {column.name: pick(record, column, origin) for column in wanted}, origin
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: not readable Parquet: {first_line(error)}") from error


def _top(path: epath.Path, names: list[str], column: Column) -> str:
    """The column of a table that holds a part; of a nested one, the outermost."""
    return top if (top := column.key.split("/")[0]) in names else _known(path, names, column)


def _plain(values: Any, pa: Any) -> list[Any]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = values.cast(pa.large_binary())  # decoding is clean's to do
    return values.to_pylist()


_FORMATS = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".csv": _read_csv, ".parquet": _read_parquet}
