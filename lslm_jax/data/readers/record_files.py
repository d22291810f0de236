"""Readers of files that hold records: JSON, JSON lines, CSV, TSV, Parquet and Arrow."""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from lslm_jax.data.readers.example_schema import BadRecord, Column, RecordError, pick_all, require
from lslm_jax.data.readers.formats import MAX_RECORD, NAMES, import_pyarrow, lines
from lslm_jax.errors import DataError, first_line

Raw = tuple[Any, str]
"""The parts of an example by name, or a BadRecord; and where it stands."""

_BATCH = 1024
_BATCH_BYTES = 1 << 25
_CHUNK = 1 << 16
_DELIMITERS = ",;\t|"
_LONE_RETURN = re.compile("(?<=\r)(?!\n)")


def guarded(make: Callable[[], Any], origin: str, keep_bad: bool) -> Raw:
    """Calls `make`; returns its result and place, or the error of a bad record where such are kept."""
    try:
        return make(), origin
    except RecordError as error:
        if not keep_bad:
            raise
        return BadRecord(str(error)), origin


def read_jsonl(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """A record a line; empty lines are left out."""
    for number, line in lines(path, stream):
        if line and not line.isspace():
            origin = f"{path}:{number}"
            yield guarded(lambda line=line, origin=origin: _of_line(line, wanted, origin), origin, keep_bad)


def _of_line(line: bytes, wanted: list[Column], origin: str) -> dict[str, Any]:
    try:
        # Bytes that are not UTF-8 travel as lone surrogates, for clean.bad_utf8 to decide about.
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{origin}: not JSON: {error}") from error
    return _picked(record, wanted, origin)


def _picked(record: Any, wanted: list[Column], origin: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        keys = ", ".join(repr(column.key) for column in wanted if not column.optional)
        what = f"the field {keys}" if "," not in keys else f"the fields {keys}"
        raise RecordError(f"{origin}: a JSON {type(record).__name__}, not an object with {what}")
    return pick_all(record, wanted, origin)


def read_json(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """The objects of a JSON list, or those that follow one another, with or without line breaks in them."""
    for number, record in enumerate(_json_values(path, stream), 1):
        origin = f"{path}:{number}"
        yield guarded(lambda record=record, origin=origin: _picked(record, wanted, origin), origin, keep_bad)


def _json_values(path: epath.Path, stream: IO[bytes]) -> Iterator[Any]:
    """Values one by one, so that a large file is never in memory as a whole."""
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape")
    try:
        yield from _values(path, _JsonSource(path, text))
    finally:
        text.detach()  # whoever opened the stream closes it


def _values(path: epath.Path, source: "_JsonSource") -> Iterator[Any]:
    in_list = source.peek() == "["
    if in_list:
        source.skip()
    number = 0
    while character := source.peek():
        if in_list and character == "]":
            source.skip()
            if source.peek():
                raise DataError(f"{path}: not JSON: text after the end of the list")
            return
        if in_list and number:
            if character != ",":
                raise DataError(f"{path}: not JSON: no comma after record {number}")
            source.skip()
            source.peek()
        number += 1
        yield source.value(number)
    if in_list:
        raise DataError(f"{path}: not JSON: the list has no end")


class _JsonSource:
    """Text that is decoded value by value."""

    def __init__(self, path: epath.Path, stream: io.TextIOWrapper):
        self._path, self._stream, self._buffer, self._place = path, stream, "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._place < len(self._buffer):
                if self._buffer[self._place] not in " \t\r\n":
                    return self._buffer[self._place]
                self._place += 1
            if not self._more(_CHUNK):
                return ""

    def skip(self) -> None:
        """Passes over the character that `peek` returned."""
        self._place += 1

    def value(self, number: int) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
                length, is_whole = end - self._place, end < len(self._buffer)
                if is_whole or not self._more(_CHUNK):  # else it may be a number that goes on
                    self._place += length
                    return value
            except RecursionError as error:
                raise DataError(f"{self._path}: not JSON: record {number} is nested too deeply") from error
            except ValueError as error:
                if not self._more(max(_CHUNK, len(self._buffer) - self._place)):  # doubled: linear work in all
                    raise DataError(f"{self._path}: not JSON: record {number}: {error}") from error

    def _more(self, count: int) -> bool:
        self._buffer, self._place = self._buffer[self._place :], 0
        if len(self._buffer) > MAX_RECORD:
            raise DataError(f"{self._path}: a record of more than {MAX_RECORD >> 20} MiB, or not JSON")
        part = self._stream.read(count)
        self._buffer += part
        return bool(part)


def read_tsv(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """A header line, then a record a line; quotation marks have no meaning."""
    rows = lines(path, stream)
    header = next(rows, (1, b""))[1].decode(errors="replace").split("\t")
    places = _places(path, header, wanted)
    for number, line in rows:
        if line:
            origin = f"{path}:{number}"
            fields = line.split(b"\t")
            yield guarded(lambda fields=fields, at=origin: _row(at, fields, header, places), origin, keep_bad)


def read_csv(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """A header, then records, whose quoted fields may hold line breaks; separated by whatever separates the header."""
    csv.field_size_limit(MAX_RECORD)  # its default rejects documents over 128 kB
    text = _text_lines(path, stream)
    first_row = next(text, "")
    reader = csv.reader(itertools.chain([first_row], text), delimiter=_delimiter(first_row, wanted), strict=True)
    first = 1
    try:
        header = next(reader, [])
        places = _places(path, header, wanted)
        first = reader.line_num + 1
        for row in reader:
            if row:
                origin = f"{path}:{first}"
                yield guarded(lambda row=row, origin=origin: _row(origin, row, header, places), origin, keep_bad)
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{first}: not CSV: {error}") from error


def _delimiter(header: str, wanted: list[Column]) -> str:
    """The character that separates the wanted columns in a header; a comma where none does."""
    keys = {column.key for column in wanted if not column.optional}
    with contextlib.suppress(csv.Error):
        return next((each for each in _DELIMITERS if keys <= set(next(csv.reader([header], delimiter=each), []))), ",")
    return ","


def quotes_fields(head: bytes) -> bool:
    """True if the fields of a TSV that contain quotation marks are quoted with marks doubled, as in CSV."""
    marked = [field for line in head.splitlines()[:-1] for field in line.split(b"\t") if b'"' in field]
    quoted = [field[1:-1] for field in marked if len(field) > 2 and field.startswith(b'"') and field.endswith(b'"')]
    doubled = [field for field in quoted if b'""' in field and b'"' not in field.replace(b'""', b"")]
    return bool(doubled) and len(doubled) == len(marked)


def _text_lines(path: epath.Path, stream: IO[bytes]) -> Iterator[str]:
    for _, line in lines(path, stream, ends=True):
        text = line.decode("utf-8", "surrogateescape")
        yield from _LONE_RETURN.split(text) if "\r" in text[:-2] else (text,)


def _places(path: epath.Path, header: list[str], wanted: list[Column]) -> dict[str, int]:
    """The index of each part of an example in a row."""
    for column in wanted:
        if column.holds not in ("text", "more_text", "label"):
            raise DataError(f"{path}: a table of plain columns cannot hold {column.key!r}: use JSONL or Parquet")
    _require_columns(path, header, wanted)
    for column in wanted:
        if header.count(column.key) > 1:
            raise DataError(f"{path}: {header.count(column.key)} columns are named {column.said}: rename all but one")
    return {column.name: header.index(column.key) for column in wanted if column.key in header}


def _require_columns(path: epath.Path, header: list[str], wanted: list[Column]) -> None:
    try:
        require(header, wanted, f"{path}: no column", "its header has", header)
    except RecordError as error:  # of the whole file, which no setting skips
        raise DataError(str(error)) from None


def _row(origin: str, fields: list[Any], header: list[str], places: dict[str, int]) -> dict[str, Any]:
    if len(fields) != len(header):
        raise RecordError(f"{origin}: {len(fields)} columns, the header has {len(header)}")
    return {name: fields[place] for name, place in places.items()}


def read_parquet(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """The rows of a Parquet file, a batch of at most so many bytes in memory at a time."""

    def batches(names: list[str], file: Any) -> Iterator[Any]:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        row_size = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        size = min(max(_BATCH_BYTES // max(row_size, 1), 1), _BATCH)
        return file.iter_batches(batch_size=size, columns=names)

    def open_table() -> tuple[Any, list[str]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(stream, buffer_size=_CHUNK)  # else it reads the columns of a row group as a whole
        return file, file.schema_arrow.names

    yield from _read_table(path, wanted, keep_bad, "parquet", open_table, batches)


def read_arrow(path: epath.Path, stream: IO[bytes], wanted: list[Column], keep_bad: bool) -> Iterator[Raw]:
    """The rows of an Arrow file (Feather, IPC) or stream, a batch in memory at a time."""

    def batches(names: list[str], reader: Any) -> Iterator[Any]:
        each = map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        for batch in each:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.select(names).slice(start, _BATCH)

    def open_table() -> tuple[Any, list[str]]:
        import pyarrow as pa

        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        return reader, reader.schema.names

    yield from _read_table(path, wanted, keep_bad, "arrow", open_table, batches)


def _read_table(
    path: epath.Path,
    wanted: list[Column],
    keep_bad: bool,
    kind: str,
    open_table: Callable[[], tuple[Any, list[str]]],
    batches: Callable[[list[str], Any], Iterator[Any]],
) -> Iterator[Raw]:
    pa = import_pyarrow(path)
    number = 0
    with _table_errors(path, kind, pa):
        table, names = open_table()
    found = {column: column.key.split("/")[0] if column.key not in names else column.key for column in wanted}
    tops = {column: top for column, top in found.items() if top in names}
    _require_columns(path, names, [column for column in wanted if column not in tops])
    for column, top in tops.items():
        if names.count(top) > 1:
            raise DataError(f"{path}: {names.count(top)} columns are named {column.said}: rename all but one")
    parts = batches(sorted(set(tops.values())), table)
    while True:
        with _table_errors(path, kind, pa):
            if (batch := next(parts, None)) is None:
                return
            values = {top: _plain(batch.column(batch.schema.names.index(top)), pa) for top in set(tops.values())}
        for row in range(batch.num_rows):
            number += 1
            record = {top: value[row] for top, value in values.items()}
            origin = f"{path}:{number}"
            yield guarded(
                lambda record=record, origin=origin: pick_all(record, wanted, origin),
                origin,
                keep_bad,
            )


@contextlib.contextmanager
def _table_errors(path: epath.Path, kind: str, pa: Any) -> Iterator[None]:
    """Turns errors of pyarrow on damaged files into one line."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: not readable {NAMES[kind]}: {first_line(error) or type(error).__name__}") from error


def _plain(values: Any, pa: Any) -> list[Any]:
    """Python values of a column, after a check of its offsets and indices: a damaged file's may point anywhere."""
    if pa.types.is_dictionary(values.type):
        pa.DictionaryArray.from_arrays(values.indices, values.dictionary, safe=True)
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        is_large = pa.types.is_large_string(values.type)
        values = values.view(pa.large_binary() if is_large else pa.binary())  # decoding is left to clean.bad_utf8
    values.validate(full=True)
    return values.to_pylist()


READERS = {
    "jsonl": read_jsonl,
    "json": read_json,
    "tsv": read_tsv,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
