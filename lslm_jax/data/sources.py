"""Raw documents and examples, in an order that depends on nothing but the source: files, or a TFDS data set."""

import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Source
from lslm_jax.data import files, squad, tfds
from lslm_jax.data.columns import columns
from lslm_jax.data.files import Split
from lslm_jax.errors import InputMissing

_MIN_SHARE = 1 << 14
_TFDS_PARTS = 32
_COMPRESSION = 3  # how much larger text is than its file, about

Content = str | bytes | dict[str, Any]


class Document(NamedTuple):
    """One document, or example of another kind, as it was read.

    Attributes:
      content: a text, bytes where its format leaves it undecoded; of other kinds the parts by name: texts, labels,
        lists. A str may hold lone surrogates; `clean.decode` deals with them.
      origin: where it was read, for messages: FILE, FILE:LINE or NAME:INDEX.
      held_out: whether its place in the source makes it part of validation. None: a hash of its content decides.
    """

    content: Content
    origin: str
    held_out: bool | None = None


def documents(source: Source, split: Split, max_documents: int = 0) -> Iterator[Document]:
    """Every document of a split, always in the same order; none where the source has no such split of its own.

    Args:
      source: files or a TFDS data set, which is downloaded and prepared where it was not yet.
      split: `valid` is what valid_files or valid_split name; likewise `test`.
      max_documents: stop after so many. 0: read all.

    Raises:
      InputMissing: a pattern matches no file, or there is no such data set or split.
      DataError: a file is not of its format, or a record has no text.
      ConfigError: the source names no input, or a package is missing.
    """
    found = _from_tfds(source, split) if source.source == "tfds" else _from_files(source, split)
    return itertools.islice(found, max_documents or None)


def _from_files(source: Source, split: Split) -> Iterator[Document]:
    inputs = files.inputs(source, split)
    for paths in inputs:
        found = _documents(files.read(paths, source), source)
        yield from _in_two(found, source) if split == "train" and _is_lone_text(inputs, source) else found


def _documents(found: Iterator[files.Raw], source: Source) -> Iterator[Document]:
    for parts, origin in found:
        yield Document(parts["text"] if source.example == "text" else parts, origin)


def _is_lone_text(inputs: list[tuple[epath.Path, ...]], source: Source) -> bool:
    """Whether the source is one document, of which a share can be held out only by cutting it."""
    return source.valid_fraction > 0 and len(inputs) == 1 and files.is_whole(inputs[0][0], source)


def _in_two(documents: Iterator[Document], source: Source) -> Iterator[Document]:
    """Cuts off the end that is held out, after a line if there is one."""
    for text, origin, _ in documents:
        assert isinstance(text, bytes)  # as whole files are read
        cut = int(len(text) * (1 - source.valid_fraction))
        cut = text.find(b"\n", cut) + 1 or cut
        yield Document(text[:cut], origin, held_out=False)
        yield Document(text[cut:], f"{origin} from byte {cut}", held_out=True)


def _from_tfds(source: Source, split: Split) -> Iterator[Document]:
    if spec := {"train": source.split, "valid": source.valid_split, "test": source.test_split}[split]:
        yield from _from_slice(tfds.builder(source.tfds, source.data_dir), spec, source)


def _from_slice(builder: Any, spec: Any, source: Source) -> Iterator[Document]:
    found = tfds.read(builder, spec, columns(source))
    if source.example == "qa":
        found = ((squad.flat(*raw), raw[1]) for raw in found)
    return _documents(found, source)


def fingerprint(source: Source) -> list[list[Any]]:
    """What the input is: [file, bytes] of each file, or [TFDS name and version, split, examples] of each split."""
    if source.source == "tfds":
        builder = tfds.builder(source.tfds, source.data_dir)
        specs = [spec for spec in (source.split, source.valid_split, source.test_split) if spec]
        return [[builder.info.full_name, spec, tfds.num_examples(builder, spec)] for spec in specs]
    paths = [path for split in ("test", "valid", "train") for path in files.matching(source, split)]
    return [[os.fspath(path), path.stat().length] for path in paths]


def changed(source: Source, before: list[list[Any]], missing_ok: bool) -> str | None:
    """What differs from an earlier fingerprint, in a few words; None where nothing does.

    Args:
      source: the source as configured now.
      before: its fingerprint then.
      missing_ok: whether files may be gone. Then TFDS, whose versions do not change, is not asked either.

    Raises:
      InputMissing: files are gone that may not be.
    """
    if missing_ok and source.source == "tfds":
        return None
    present = _still_there(source, before) if missing_ok else fingerprint(source)
    then, now = ({" ".join(name): size for *name, size in entries} for entries in (before, present))
    for name, size in then.items():
        if name not in now and not missing_ok:
            return f"{name} is gone"
        if name in now and now[name] != size:
            return f"{name} had {size} {'examples' if source.source == 'tfds' else 'bytes'}, now {now[name]}"
    new = [name for name in now if name not in then]
    return f"{new[0]} is new" if new else None


def _still_there(source: Source, before: list[list[Any]]) -> list[list[Any]]:
    with contextlib.suppress(InputMissing):
        return fingerprint(source)
    paths = [epath.Path(path) for path, _ in before]
    return [[os.fspath(path), path.stat().length] for path in paths if path.exists()]


def sample(
    source: Source, sample_bytes: int, seed: int, read: Callable[[Document], list[str]], max_documents: int = 0
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
    """
    if max_documents or (source.source == "files" and _is_lone_text(files.inputs(source, "train"), source)):
        parts, sizes = [lambda: documents(source, "train", max_documents)], [sample_bytes]
    else:
        parts, sizes = _tfds_parts(source, sample_bytes) if source.source == "tfds" else _file_parts(source)
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


def _file_parts(source: Source) -> tuple[list[Callable[[], Iterator[Document]]], list[int]]:
    inputs = files.inputs(source, "train")
    sizes = [sum(map(_text_size, paths)) for paths in inputs]
    return [lambda paths=paths: _documents(files.read(paths, source), source) for paths in inputs], sizes


def _text_size(path: epath.Path) -> int:
    return path.stat().length * (_COMPRESSION if path.suffix in (".gz", ".parquet") else 1)


def _tfds_parts(source: Source, sample_bytes: int) -> tuple[list[Callable[[], Iterator[Document]]], list[int]]:
    builder = tfds.builder(source.tfds, source.data_dir)
    specs = tfds.even_splits(builder, source.split, _TFDS_PARTS)
    return [lambda spec=spec: _from_slice(builder, spec, source) for spec in specs], [sample_bytes] * len(specs)
