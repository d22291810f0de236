"""Raw documents and examples, in an order that depends on nothing but the source: files, or a TFDS data set."""

import contextlib
import hashlib
import itertools
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Source
from lslm_jax.data.readers import files, formats, squad, tfds
from lslm_jax.data.readers.example_schema import BadRecord, columns
from lslm_jax.data.readers.files import Split
from lslm_jax.errors import InputMissing
from lslm_jax.runtime import atomic_io

_MIN_SHARE = 1 << 14
_TFDS_PARTS = 32
_SPLITS: tuple[Split, ...] = ("test", "valid", "train")
_STEPS = 1000  # bytes around the place of a cut that are tried
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"  # within what is read as one character
_COMPRESSION = 3  # how much larger text is than its file, about

Content = str | bytes | dict[str, Any] | BadRecord


class Document(NamedTuple):
    """One document, or example of another kind, as it was read.

    Attributes:
      content: a text, bytes where its format leaves it undecoded; of other kinds the parts by name: texts, labels,
        lists. A str may hold lone surrogates; `clean.decode` deals with them. Or the error of a bad record.
      origin: where it was read, for messages: FILE, FILE:LINE or NAME:INDEX.
      held_out: whether its place in the source makes it part of validation. None: a hash of its content decides.
    """

    content: Content
    origin: str
    held_out: bool | None = None


def documents(source: Source, split: Split, max_documents: int = 0, keep_bad: bool = False) -> Iterator[Document]:
    """Every document of a split, always in the same order; none where the source has no such split of its own.

    Args:
      source: files or a TFDS data set, which is downloaded and prepared where it was not yet.
      split: `valid` is what valid_files or valid_split name; likewise `test`.
      max_documents: stop after so many. 0: read all.
      keep_bad: yield bad records with a `BadRecord` as content rather than raise.

    Raises:
      InputMissing: a pattern matches no file, or there is no such data set or split.
      DataError: a file is not of its format, or a record has no text.
      ConfigError: the source names no input, or a package is missing.
    """
    found = _from_tfds(source, split) if source.source == "tfds" else _from_files(source, split, keep_bad)
    return itertools.islice(found, max_documents or None)


def _from_files(source: Source, split: Split, keep_bad: bool) -> Iterator[Document]:
    inputs = files.inputs(source, split)
    cuts = split == "train" and holds_out_ends(source, inputs)
    for paths in inputs:
        yield from _from_input(paths, source, keep_bad, cuts)


def _from_input(paths: tuple[epath.Path, ...], source: Source, keep_bad: bool, cuts: bool) -> Iterator[Document]:
    """The documents of a file, or of a pair of files; `cuts` parts each in training and validation."""
    found = _documents(files.read(paths, source, keep_bad), source)
    return _in_two(found, source.valid_fraction) if cuts else found


def _documents(found: Iterator[files.Raw], source: Source) -> Iterator[Document]:
    for parts, origin in found:
        if source.example != "text" or isinstance(parts, BadRecord):
            yield Document(parts, origin)
        else:
            yield Document(parts["text"], origin)


def holds_out_ends(source: Source, inputs: list[tuple[epath.Path, ...]]) -> bool:
    """True if validation takes the end of each file: they are whole documents, too few for one to be the share."""
    too_few = 0 < source.valid_fraction * len(inputs) < 1
    return too_few and all(files.is_whole(paths[0], source) for paths in inputs)


def _in_two(documents: Iterator[Document], fraction: float) -> Iterator[Document]:
    """Cuts off the end that is held out; a text too short for that is trained on whole."""
    for text, origin, _ in documents:
        assert isinstance(text, bytes)  # as whole files are read
        cut = _place_of_cut(text, fraction)
        if not cut or not text[cut:].strip():
            yield Document(text, origin, held_out=False)
            continue
        head, tail = text[:cut], text[cut:]
        del text  # which may be large
        yield Document(head, origin, held_out=False)
        yield Document(tail, f"{origin} from byte {cut}", held_out=True)


def _place_of_cut(text: bytes, fraction: float) -> int:
    """The offset of the part that is held out: after a line if one ends near, else before a whole character; or 0."""
    end = len(text.rstrip())
    target = max(0, min(int(len(text) * (1 - fraction)), end - 1))
    line = text.find(b"\n", target, target + (end - target) // 2) + 1
    after, before = range(max(target, 1), min(end, target + _STEPS)), range(target - 1, max(0, target - _STEPS), -1)
    return line or next((cut for cut in (*after, *before) if _begins_character(text, cut)), 0)


def _begins_character(text: bytes, cut: int) -> bool:
    """True if what a reader takes for one character begins at an offset, with all that is combined with it."""
    if text[cut] & 0xC0 == 0x80 or text.endswith("\u200d".encode(), 0, cut):
        return False
    character = text[cut : cut + 4].decode(errors="ignore")[:1]
    return not character or not (unicodedata.combining(character) or character in _JOINERS)


def _from_tfds(source: Source, split: Split) -> Iterator[Document]:
    if spec := {"train": source.split, "valid": source.valid_split, "test": source.test_split}[split]:
        yield from _from_slice(tfds.builder(source.tfds, source.data_dir), spec, source)


def _from_slice(builder: Any, spec: Any, source: Source) -> Iterator[Document]:
    found = tfds.read(builder, spec, columns(source), source.labels)
    if source.example == "qa":
        found = ((squad.flat(record, origin), origin) for record, origin in found)
    return _documents(found, source)


def fingerprint(source: Source) -> list[list[Any]]:
    """A record of the input: [file, bytes, mtime in ns, sha256] of each file, or of each TFDS split its examples.

    Of remote files, which would have to be read twice, there is no sha256. An entry of TFDS is [name and version,
    split, examples].
    """
    if source.source == "tfds":
        builder = tfds.builder(source.tfds, source.data_dir)
        specs = [spec for spec in (source.split, source.valid_split, source.test_split) if spec]
        return [[builder.info.full_name, spec, tfds.num_examples(builder, spec)] for spec in specs]
    paths = [path for split in ("test", "valid", "train") for path in files.matching(source, split)]
    return [[*_status(path), _sha256(path)] for path in paths]


def _status(path: epath.Path) -> list[Any]:
    """Name, size and time of modification of a file."""
    with formats.reading(path):
        status = os.stat(path) if not atomic_io.is_remote(path) else None
        if status is None:
            found = path.stat()
            return [os.fspath(path), found.length, int(found.mtime * 1e9)]
        return [os.fspath(path), status.st_size, status.st_mtime_ns]


def _sha256(path: epath.Path) -> str:
    if atomic_io.is_remote(path):
        return ""
    with formats.reading(path):
        return atomic_io.fingerprint(path)[1]


def has_changed(entry: list[Any]) -> bool:
    """True if a file of a fingerprint has another content than it had, judged by size, then time, then content."""
    name, size, mtime, sha256 = entry
    path = epath.Path(name)
    now = _status(path)[1:]
    return now[0] != size or (now[1] != mtime and bool(sha256) and _sha256(path) != sha256)


def changed(source: Source, before: list[list[Any]], missing_ok: bool) -> str | None:
    """What differs from an earlier fingerprint, in a few words; None where nothing does.

    Args:
      source: the source as configured now.
      before: its fingerprint then; those of earlier versions hold sizes alone.
      missing_ok: whether files may be gone. Then TFDS, whose versions do not change, is not asked either, and files
        whose size and time of modification are those on record are not read again.

    Raises:
      InputMissing: files are gone that may not be.
    """
    if missing_ok and source.source == "tfds":
        return None
    if source.source == "tfds":
        then, now = ({" ".join(name): size for *name, size in entries} for entries in (before, fingerprint(source)))
        return _difference(then, now, "examples", missing_ok)
    paths = _present(source, before) if missing_ok else [p for s in _SPLITS for p in files.matching(source, s)]
    then, now = {name: status for name, *status in before}, {os.fspath(path): _status(path)[1:] for path in paths}
    sizes = [{name: status[0] for name, status in each.items()} for each in (then, now)]
    if what := _difference(sizes[0], sizes[1], "bytes", missing_ok):
        return what
    for name, status in then.items():
        if name not in now or len(status) < 3 or (missing_ok and now[name][1] == status[1]):
            continue
        if status[2] and _sha256(epath.Path(name)) != status[2]:
            return f"{name} has the same size but another content"
    return None


def _difference(then: dict[str, int], now: dict[str, int], unit: str, missing_ok: bool) -> str | None:
    for name, size in then.items():
        if name not in now and not missing_ok:
            return f"{name} is gone"
        if name in now and now[name] != size:
            return f"{name} had {size} {unit}, now {now[name]}"
    new = [name for name in now if name not in then]
    return f"{new[0]} is new" if new else None


def _present(source: Source, before: list[list[Any]]) -> list[epath.Path]:
    with contextlib.suppress(InputMissing):
        return [path for split in _SPLITS for path in files.matching(source, split)]
    return [path for path in (epath.Path(name) for name, *_ in before) if path.exists()]


def sample(
    source: Source,
    sample_bytes: int,
    seed: int,
    read: Callable[[Document], Iterable[str]],
    max_documents: int = 0,
    keep_bad: bool = False,
) -> Iterator[str]:
    """Text to train a vocabulary on, about equally much from each file, so that a big one does not crowd out the rest.

    Files are visited in a seeded order. Each gives its first documents, up to a share: the size at which all files,
    cut to it, add up to sample_bytes. Of a TFDS split, 32 even parts are its files.

    Args:
      source: where documents come from.
      sample_bytes: UTF-8 bytes to stop at; the last document of each file is cut to fit.
      seed: of the order.
      read: texts of a document, none to leave it out.
      max_documents: draw from the first so many documents only. 0: from all.
      keep_bad: give bad records to `read`, too, rather than raise.
    """
    if max_documents:
        parts, sizes = [lambda: documents(source, "train", max_documents, keep_bad)], [sample_bytes]
    else:
        parts, sizes = _tfds_parts(source, sample_bytes) if source.source == "tfds" else _file_parts(source, keep_bad)
    share = _share(sizes, sample_bytes)
    left = sample_bytes
    for i in sorted(range(len(parts)), key=lambda i: hashlib.blake2b(f"{seed}/{i}".encode()).digest()):
        texts = (text for document in parts[i]() for text in read(document))
        for text in _cut(texts, min(share, left)):
            left -= len(text.encode())
            yield text
        if left <= 0:
            return


def _share(sizes: list[int], total: int) -> int:
    """The c at which sum(min(size, c)) is total, but not so small that every one of a million files is opened."""
    for i, size in enumerate(sorted(sizes)):
        count = len(sizes) - i
        if size * count >= total:
            return max(total // count, _MIN_SHARE)
        total -= size
    return sys.maxsize


def _cut(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
    for text in texts:
        data = text.encode()[:num_bytes]
        num_bytes -= len(data)
        yield data.decode(errors="ignore")
        if num_bytes <= 0:
            return


def _file_parts(source: Source, keep_bad: bool) -> tuple[list[Callable[[], Iterator[Document]]], list[int]]:
    inputs = files.inputs(source, "train")
    sizes, cuts = [sum(map(_text_size, paths)) for paths in inputs], holds_out_ends(source, inputs)
    return [lambda paths=paths: _from_input(paths, source, keep_bad, cuts) for paths in inputs], sizes


def _text_size(path: epath.Path) -> int:
    return path.stat().length * (_COMPRESSION if formats.is_compressed(path) else 1)


def _tfds_parts(source: Source, sample_bytes: int) -> tuple[list[Callable[[], Iterator[Document]]], list[int]]:
    builder = tfds.builder(source.tfds, source.data_dir)
    specs = tfds.even_splits(builder, source.split, _TFDS_PARTS)
    return [lambda spec=spec: _from_slice(builder, spec, source) for spec in specs], [sample_bytes] * len(specs)
