"""File formats: detection by content and suffix, decompression, transcoding to UTF-8, and size limits."""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from lslm_jax.errors import ConfigError, DataError, InputMissing

MAX_RECORD = 1 << 27
"""Bytes of one line, record or field."""
MAX_FILE = 1 << 29
"""Bytes of a text file that is one document."""

_HEAD = 1 << 16
_CHUNK = 1 << 22
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
NAMES = {
    "text": "text",
    "jsonl": "JSON lines",
    "json": "JSON",
    "tsv": "TSV",
    "csv": "CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
_COMPRESSION_MAGIC = {
    re.compile(rb"\x1f\x8b\x08"): "gzip",
    re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"): "bzip2",  # text may begin with BZh
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstd",
}
_BINARY_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_ENCODINGS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16, which begins alike
_ENCODINGS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or an Office document: unpack it, or save it as plain text",
    b"%PDF-": "a PDF document: extract its text first, as with pdftotext",
    b"\xd0\xcf\x11\xe0": "an Office document: save it as plain text",
    b"{\\rtf": "an RTF document: save it as plain text",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database: export its table as CSV",
    b"\x89HDF": "an HDF5 file: export its text as JSON lines",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model",
    b"FEA1": "a Feather file of version 1: write it anew as version 2",
    b"ORC": "an ORC table: convert it to Parquet",
    b"Obj\x01": "an Avro table: convert it to Parquet",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x04\x22\x4d\x18": "LZ4 data: unpack it",
    b"version https://git-lfs": "a Git LFS pointer in the place of the file: run `git lfs pull`",
}
_TAR = slice(257, 262)
_BLANK_LINES = re.compile(rb"\A(?:[ \t\r]*\n)+")


class Format(NamedTuple):
    """The format of a file.

    Attributes:
      name: a key of `NAMES`.
      compression: gzip, bzip2, xz or zstd; empty for none.
      encoding: utf-16 or utf-32 by its byte order mark; empty for UTF-8 and binary formats.
      line_end: CR where lines end with it alone; empty where they end as usual.
    """

    name: str
    compression: str = ""
    encoding: str = ""
    line_end: str = ""

    @property
    def is_text(self) -> bool:
        """True if its content is plain text, without records."""
        return self.name == "text"


def by_suffix(path: epath.Path) -> str:
    """The format that a file's name stands for, in any case; `text` for unknown suffixes."""
    stem, suffix = os.path.splitext(path.name)
    if suffix.lower() in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix.lower(), "text")


def is_compressed(path: epath.Path) -> bool:
    """True if a file's name stands for compressed or columnar content, which is larger than its file."""
    return os.path.splitext(path.name)[1].lower() in _COMPRESSIONS or by_suffix(path) in ("parquet", "arrow")


def detect(path: epath.Path, keys: tuple[str, ...] = ()) -> Format:
    """The format of a file.

    Compression, binary formats and encodings are recognized by the first bytes, the other formats by the suffix. A
    file without a known suffix whose first line is a JSON object with all of `keys` holds JSON lines.

    Args:
      path: the file.
      keys: fields that a record must have.

    Raises:
      DataError: it is neither text nor a supported format, or its content is not what its name stands for.
      InputMissing: it cannot be read.
    """
    with reading(path):
        status = os.stat(path) if "://" not in os.fspath(path) else None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file: copy its content into one")
    return _detect(path, keys, (status.st_size, status.st_mtime_ns) if status else ())


@functools.lru_cache(maxsize=1 << 16)
def _detect(path: epath.Path, keys: tuple[str, ...], _version: tuple[int, ...]) -> Format:
    with reading(path), path.open("rb") as stream:
        head = stream.read(_HEAD)
    named = _COMPRESSIONS.get(os.path.splitext(path.name)[1].lower(), "")
    compression = _compression_of(head)
    if named and head and compression != named:
        raise DataError(f"{path} is not {named}, as its suffix claims: rename it")
    if compression:
        with reading(path), path.open("rb") as stream, _decompressed(stream, compression, path) as inner:
            head = inner.read(_HEAD)
        if again := _compression_of(head):
            raise DataError(f"{path} is compressed twice: its content is {again} data; decompress it once")
    if what := next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), ""):
        raise DataError(f"{path} is {what}")
    if head[_TAR] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it")
    return _of_content(path, head, keys)._replace(compression=compression)


def _of_content(path: epath.Path, head: bytes, keys: tuple[str, ...]) -> Format:
    named = by_suffix(path)
    for magic, name in _BINARY_MAGIC.items():
        if head.startswith(magic):
            return Format(name)
    if named in ("parquet", "arrow"):
        raise DataError(f"{path}: not readable {NAMES[named]}: its first bytes are not those of a {NAMES[named]} file")
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return Format(named, "", encoding)
    _require_utf8(path, head)
    line_end = "CR" if b"\r" in head and b"\n" not in head else ""
    if named == "text" and keys and _is_json_record(head, keys):
        return Format("jsonl", line_end=line_end)
    if named == "jsonl" and _is_json_document(head):
        return Format("json")
    return Format(named, line_end=line_end)


def _require_utf8(path: epath.Path, head: bytes) -> None:
    """Rejects content that is not text in UTF-8 at all; single bad bytes are left to `clean.bad_utf8`."""
    zeros = [head[offset::2].count(0) for offset in (0, 1)]
    if max(zeros) > 0.3 * len(head) / 2 and min(zeros) < 0.1 * max(zeros):
        order = "BE" if zeros[0] > zeros[1] else "LE"
        wide = f"UTF-16{order}"
        raise DataError(
            f"{path} looks like UTF-16 without a byte order mark: convert it, as by iconv -f {wide} -t UTF-8"
        )
    controls = len(head) - len(head.translate(None, bytes([*range(9), *range(14, 27), *range(28, 32)])))
    if controls > 16 and controls > 0.1 * len(head):
        raise DataError(f"{path} is a binary file, not text: leave it out")
    good = len(head.decode(errors="ignore").encode())
    if (bad := len(head) - good) > 32 and bad > 0.2 * len(head):
        share = f"{100 * bad / len(head):.0f} %"
        raise DataError(f"{path} is not UTF-8: {share} of its first bytes are bad; convert it, as by iconv -t UTF-8")


def _is_json_record(head: bytes, keys: tuple[str, ...]) -> bool:
    line = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
    if not line.startswith(b"{"):
        return False
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and all(key in record or key.split("/")[0] in record for key in keys)


def _is_json_document(head: bytes) -> bool:
    """True for a list of objects, or for an object that is written over several lines: neither is JSON lines."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, rest = text.partition(b"\n")
    return bool(re.match(rb"\[\s*\{", text)) or (first.strip() == b"{" and rest.lstrip().startswith(b'"'))


def _compression_of(head: bytes) -> str:
    return next((name for magic, name in _COMPRESSION_MAGIC.items() if magic.match(head)), "")


def decompress(data: bytes, path: epath.Path) -> bytes:
    """Decompressed data, if their first bytes are those of a compression; else the data as they are.

    Raises:
      DataError: they are truncated or damaged; the message names `path`.
    """
    if not (compression := _compression_of(data)):
        return data
    with reading(path), _decompressed(io.BytesIO(data), compression, path) as stream:
        return stream.read()


@contextlib.contextmanager
def opened(path: epath.Path, kind: Format) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed and in UTF-8; errors while it is read name the file."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(path))
        raw = stack.enter_context(path.open("rb"))
        stream = stack.enter_context(_decompressed(raw, kind.compression, path))
        if kind.name in ("parquet", "arrow") and kind.compression:
            yield stack.enter_context(_spooled(stream))  # their readers seek
        elif kind.encoding:
            yield io.BufferedReader(_Transcoded(stream, kind.encoding), 1 << 20)
        else:
            yield io.BufferedReader(_WithLineFeeds(stream), 1 << 20) if kind.line_end else stream


def _spooled(stream: IO[bytes]) -> IO[bytes]:
    """A temporary file with the content of a stream, from its start."""
    file = tempfile.TemporaryFile(prefix="lslm-")
    shutil.copyfileobj(stream, file, _CHUNK)
    file.seek(0)
    return file


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Turns errors of reading a file into one line that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(f"{path} is not whole compressed data: {error}") from error
    except UnicodeError as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise InputMissing(f"{path} is a link to {os.readlink(path)}, which does not exist") from error
        raise InputMissing(f"could not read {path}: {error.strerror or error}") from error
    except OSError as error:
        if error.errno is None:  # a decompressor's
            raise DataError(f"{path} is not whole compressed data: {error}") from error
        raise InputMissing(f"could not read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _decompressed(raw: IO[bytes], compression: str, path: epath.Path) -> Iterator[IO[bytes]]:
    match compression:
        case "gzip":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream, 1 << 20)
        case "bzip2":
            yield io.BufferedReader(_Decompressor(raw, bz2.BZ2Decompressor), 1 << 20)
        case "xz":
            yield io.BufferedReader(_Decompressor(raw, lzma.LZMADecompressor), 1 << 20)
        case "zstd":
            yield io.BufferedReader(_Stream(import_pyarrow(path).CompressedInputStream(raw, "zstd")), 1 << 20)
        case _:
            yield raw if isinstance(raw, io.BufferedIOBase) else io.BufferedReader(_Stream(raw), 1 << 20)


def import_pyarrow(path: epath.Path) -> Any:
    """The package that reads Parquet, Arrow and zstd; a ConfigError that names the file where it is missing."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    return pyarrow


class _Stream(io.RawIOBase):
    """Python's interface for a stream that only has `read`, as those of pyarrow and of buckets."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return hasattr(self._stream, "seek") and bool(getattr(self._stream, "seekable", lambda: False)())

    def seek(self, offset: int, whence: int = 0) -> int:
        self._stream.seek(offset, whence)
        return self._stream.tell()

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Decompressor(io.RawIOBase):
    """Decompressed streams that follow one another, all of them.

    `bz2.BZ2File` and `lzma.LZMAFile` take whatever follows the first stream and is none for the end of the data, so
    that a damaged second one (pbzip2 writes many) is lost without an error.
    """

    def __init__(self, raw: IO[bytes], make: Callable[[], Any]):
        self._raw, self._make, self._decoder, self._input = raw, make, make(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder.eof:
                self._input = self._after_padding(self._decoder.unused_data)
                if not self._input:
                    return 0
                self._decoder = self._make()
            elif self._decoder.needs_input and not self._input:
                self._input = self._raw.read(_HEAD)
                if not self._input:
                    raise EOFError("it ends before the end of its stream")
            data = self._decoder.decompress(self._input, len(buffer))
            self._input = b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _after_padding(self, data: bytes) -> bytes:
        """What follows the zeros after a stream; empty at the end of the file."""
        while not (data := data.lstrip(b"\0")):
            if not (data := self._raw.read(_HEAD)):
                break
        return data


class _WithLineFeeds(io.RawIOBase):
    """The bytes of a stream, whose CR and CR LF become LF."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._is_after_return = stream, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while data := self._stream.read(len(buffer)):
            after, self._is_after_return = self._is_after_return, data.endswith(b"\r")
            data = data[1:] if after and data.startswith(b"\n") else data
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if data:
                buffer[: len(data)] = data
                return len(data)
        return 0


class _Transcoded(io.RawIOBase):
    """UTF-8 from a stream in another encoding."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self._stream, self._ready = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stream.read(_HEAD)
            self._ready = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def whole(path: epath.Path, stream: IO[bytes]) -> bytes:
    """All of a file, without a byte order mark.

    Raises:
      DataError: it is larger than one document may be.
    """
    parts, size = [], 0
    while part := stream.read(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > MAX_FILE:
            raise DataError(
                f"{path} holds more than {MAX_FILE >> 20} MiB, too much for one document: "
                "split it, or set data.document=line or data.separator"
            )
    return b"".join(parts).removeprefix(codecs.BOM_UTF8)


def lines(path: epath.Path, stream: IO[bytes], ends: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1, without a byte order mark; with their ends on request.

    Raises:
      DataError: one is longer than a record may be.
    """
    number = 0
    while line := stream.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            raise DataError(f"{path}:{number}: a line of more than {MAX_RECORD >> 20} MiB: split it")
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, line if ends else line.removesuffix(b"\n").removesuffix(b"\r")


def separated(path: epath.Path, stream: IO[bytes], separator: str) -> Iterator[tuple[int, bytes]]:
    """Documents between separators, each with the number of its first line.

    Args:
      path: the file, for messages.
      stream: its content.
      separator: the text between documents; `blank_line` for one or more lines without text.

    Raises:
      DataError: a document is larger than a record may be.
    """
    blank = separator == "blank_line"
    mark = re.compile(rb"\n(?:[ \t\r]*\n)+" if blank else re.escape(separator.encode()))
    longest = 0 if blank else len(separator.encode())
    buffer, start, done = b"", 1, False
    while not done:
        part = stream.read(_CHUNK)
        done, buffer = not part, buffer + part
        if start == 1:
            buffer = buffer.removeprefix(codecs.BOM_UTF8)
        place = 0
        for found in mark.finditer(buffer):
            if not done and found.end() > len(buffer) - max(longest, 1):
                break  # it may go on in the next part
            yield from _document(buffer[place : found.start()], start)
            start += buffer.count(b"\n", place, found.end())
            place = found.end()
        buffer = buffer[place:]
        if len(buffer) > MAX_RECORD:
            raise DataError(f"{path}:{start}: more than {MAX_RECORD >> 20} MiB without data.separator")
    yield from _document(buffer, start)


def _document(data: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    if data.strip():
        text = _BLANK_LINES.sub(b"", data)
        yield line + data[: len(data) - len(text)].count(b"\n"), text.rstrip(b"\r\n")
