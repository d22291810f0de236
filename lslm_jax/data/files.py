"""Documents from files: which files a source names, and how to read each format.

A reader yields the text, as bytes where the format leaves it undecoded, and its place: FILE or FILE:LINE.
"""

import codecs
import contextlib
import csv
import fnmatch
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal

from etils import epath

from lslm_jax.config import Source
from lslm_jax.errors import ConfigError, DataError, InputMissing

Raw = tuple[bytes | str, str]


def matching(source: Source, split: Literal["train", "valid"]) -> list[epath.Path]:
    """The files of a split: patterns in their order, the files of each sorted, none twice, none held out.

    Raises:
      ConfigError: there is no pattern.
      InputMissing: a pattern matches no file.
    """
    if not source.files:
        raise ConfigError("data.files is empty: name files, directories or globs, or choose another data.source")
    valid = _expand("data.valid_files", source.valid_files)
    if split == "valid":
        return list(valid)
    held_out = {path.resolve() for path in valid}  # which may be written in another way in data.files
    return [path for path in _expand("data.files", source.files) if not held_out or path.resolve() not in held_out]


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


def read(path: epath.Path, source: Source) -> Iterator[Raw]:
    """The documents of one file, and where in it each stands.

    Raises:
      DataError: it is not of its format, or a record has no text.
      InputMissing: it cannot be read.
      ConfigError: a package is missing.
    """
    text = _read_lines if source.document == "line" else _read_whole
    reader = _FORMATS.get(_suffix(path), text)
    try:
        with _open(path) as stream:
            yield from reader(path, stream, source.text_key)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not whole gzip: {error}") from error
    except OSError as error:
        raise InputMissing(f"could not read {path}: {error.strerror or error}") from error


def is_whole(path: epath.Path, source: Source) -> bool:
    """Whether a file is one document."""
    return source.document == "file" and _suffix(path) not in _FORMATS


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


def _read_whole(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    yield stream.read().removeprefix(codecs.BOM_UTF8), os.fspath(path)


def _read_lines(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    for number, line in _lines(stream):
        yield line, f"{path}:{number}"


def _read_jsonl(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    for number, line in _lines(stream):
        if line and not line.isspace():
            origin = f"{path}:{number}"
            yield _json_field(line, key, origin), origin


def _json_field(line: bytes, key: str, origin: str) -> str:
    try:
        # Bytes that are not UTF-8 travel as lone surrogates, for clean.bad_utf8 to decide about.
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a JSON {type(record).__name__}, not an object with the field {key!r}")
    if key not in record:
        raise DataError(f"{origin}: no field {key!r} (data.text_key); it has: {', '.join(record) or 'none'}")
    if not isinstance(record[key], str):
        raise DataError(f"{origin}: field {key!r} is {json.dumps(record[key])[:40]}, not text")
    return record[key]


def _read_tsv(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    lines = _lines(stream)
    header = next(lines, (1, b""))[1].decode(errors="replace").split("\t")
    column = _column(path, header, key)
    for number, line in lines:
        if line:
            fields = line.split(b"\t")
            _check_width(f"{path}:{number}", fields, header)
            yield fields[column], f"{path}:{number}"


def _read_csv(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    csv.field_size_limit((1 << 31) - 1)  # its default refuses documents over 128 kB
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(lines, strict=True)
    first = 1
    try:
        header = next(reader, [])
        column = _column(path, header, key)
        first = reader.line_num + 1
        for row in reader:
            if row:
                _check_width(f"{path}:{first}", row, header)
                yield row[column], f"{path}:{first}"
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{first}: not CSV: {error}") from error
    finally:
        lines.close()


def _column(path: epath.Path, header: list[str], key: str) -> int:
    if key not in header:
        names = ", ".join(header)
        raise DataError(f"{path}: no column {key!r} (data.text_key); its header has: {names or 'nothing'}")
    return header.index(key)


def _check_width(origin: str, fields: list[Any], header: list[str]) -> None:
    if len(fields) != len(header):
        raise DataError(f"{origin}: {len(fields)} columns, the header has {len(header)}")


def _read_parquet(path: epath.Path, stream: IO[bytes], key: str) -> Iterator[Raw]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    row = 0
    try:
        file = pq.ParquetFile(stream)
        _column(path, file.schema_arrow.names, key)
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            texts = batch.column(0)
            if pa.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            # As bytes: decoding is clean's to do.
            for text in texts.cast(pa.large_binary()).to_pylist():
                row += 1
                if text is None:
                    raise DataError(f"{path}:{row}: column {key!r} is null, not text")
                yield text, f"{path}:{row}"
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: column {key!r} is not readable Parquet text: {str(error).splitlines()[0]}") from error


_FORMATS = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".csv": _read_csv, ".parquet": _read_parquet}
