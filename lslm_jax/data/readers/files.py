"""Examples from files: which files a source names, and how to read each format.

A reader yields the parts of an example by name, text as bytes where the format leaves it undecoded, and its place: FILE
or FILE:LINE.
"""

import collections
import contextlib
import fnmatch
import itertools
import os
from collections.abc import Iterator
from typing import Literal

from etils import epath

from lslm_jax.config import Source
from lslm_jax.data.readers import formats, squad
from lslm_jax.data.readers.example_schema import columns
from lslm_jax.data.readers.formats import Format
from lslm_jax.data.readers.record_files import READERS, Raw, guarded, quotes_fields
from lslm_jax.errors import ConfigError, DataError, InputMissing

Split = Literal["train", "valid", "test"]
_HUB_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MARKUP = (".html", ".htm", ".xhtml", ".xml", ".svg", ".ipynb", ".srt", ".vtt")
_SHOWN = 3
_HEAD = 1 << 16


def inputs(source: Source, split: Split) -> list[tuple[epath.Path, ...]]:
    """What a split is read from: files, or pairs of plain text files, source and target.

    Patterns keep their order, and the files of each are sorted; none comes twice, and none that is held out.

    Raises:
      ConfigError: there is no pattern or an empty one, or a plain text file has no partner.
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
        if all(formats.by_suffix(path) != "text" for path in paths):
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
    if not all(patterns):
        raise ConfigError(f"{key} holds an empty name: name files, directories or globs")
    paths: dict[epath.Path, None] = {}
    seen: set[str] = set()  # real paths: links may lead to one file under several names
    for pattern in patterns:
        found = sorted(_match(epath.Path(pattern).expanduser()), key=os.fspath)
        if not found:
            raise InputMissing(f"{key}: {pattern} matches no file")
        for path in found:
            if (real := _real(path)) not in seen:
                seen.add(real)
                paths[path] = None
    return paths


def _match(pattern: epath.Path) -> Iterator[epath.Path]:
    visited: set[str] = set()
    try:
        if pattern.exists() or os.path.islink(pattern):
            yield from _below(pattern, visited)
            return
        parts = pattern.parts
        depth = next((i for i, part in enumerate(parts) if _is_magic(part)), len(parts))
        for path in _glob(epath.Path(*parts[:depth]), parts[depth:], set()):
            yield from _below(path, visited)
    except OSError as error:
        raise InputMissing(f"could not read {error.filename or pattern}: {error.strerror or error}") from error


def _glob(path: epath.Path, parts: tuple[str, ...], visited: set[tuple[str, int]]) -> Iterator[epath.Path]:
    """Paths below one that match the parts of a pattern; epath's own glob does not support `**`.

    Args:
      path: where to look.
      parts: of the pattern that are left.
      visited: directories looked through for `**`, with the number of parts left: links may lead back to them.
    """
    if not parts:
        if path.exists() or os.path.islink(path):
            yield path
    elif not _is_magic(parts[0]):
        yield from _glob(path / parts[0], parts[1:], visited)
    elif path.is_dir():
        children = sorted((child for child in path.iterdir() if not _is_hidden(child.name)), key=os.path.islink)
        if parts[0] == "**":
            if (here := (_real(path), len(parts))) in visited:
                return
            visited.add(here)
            yield from _glob(path, parts[1:], visited)
        for child in children:
            if fnmatch.fnmatchcase(child.name, parts[0]):
                yield from _glob(child, parts if parts[0] == "**" else parts[1:], visited)


def _is_magic(part: str) -> bool:
    return any(character in part for character in "*?[")


def _below(path: epath.Path, visited: set[str]) -> Iterator[epath.Path]:
    """The files below a path, each directory once, whichever links lead to it."""
    if not path.exists():
        raise InputMissing(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if not path.is_dir():
        yield path
        return
    if (real := _real(path)) in visited:
        return
    visited.add(real)
    for child in sorted(path.iterdir(), key=os.path.islink):  # links last: a link to a sibling changes no names
        if not _is_hidden(child.name):
            yield from _below(child, visited)


def covering(source: Source, directory: epath.Path) -> str:
    """The first pattern of a source that has all files below a directory read; empty where none does.

    The directory need not exist yet.
    """
    patterns = [*source.files, *source.valid_files, *source.test_files] if source.source == "files" else []
    parts = epath.Path(os.path.realpath(directory)).parts
    for pattern in patterns:
        path = epath.Path(pattern).expanduser()
        if "://" in pattern or "://" in os.fspath(directory) or path.is_file():
            continue
        depth = next((i for i, part in enumerate(path.parts) if _is_magic(part)), len(path.parts))
        start = epath.Path(os.path.realpath(epath.Path(*path.parts[:depth])))
        if _covers((*start.parts, *path.parts[depth:]), parts, len(start.parts)):
            return pattern
    return ""


def _covers(pattern: tuple[str, ...], parts: tuple[str, ...], plain: int) -> bool:
    """True if a pattern matches a directory or one above it; of the pattern the first `plain` parts are no globs."""
    if not pattern:
        return not any(map(_is_hidden, parts))
    if plain:
        return parts[:plain] == pattern[:plain] and _covers(pattern[plain:], parts[plain:], 0)
    if pattern[0] == "**":
        deeper = bool(parts) and not _is_hidden(parts[0]) and _covers(pattern, parts[1:], 0)
        return deeper or _covers(pattern[1:], parts, 0)
    matches = bool(parts) and not _is_hidden(parts[0]) and fnmatch.fnmatchcase(parts[0], pattern[0])
    return matches and _covers(pattern[1:], parts[1:], 0)


def _real(path: epath.Path) -> str:
    return os.fspath(path) if "://" in os.fspath(path) else os.path.realpath(path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def format_of(path: epath.Path, source: Source) -> Format:
    """The format in which a file of a source is read; errors are those of `formats.detect`."""
    plain_pair = source.example == "pair" and formats.by_suffix(path) == "text"
    keys = () if plain_pair else tuple(column.key for column in columns(source) if not column.optional)
    return formats.detect(path, keys)


def survey(source: Source, split: Split) -> str:
    """Checks the types of all files of a split before any work; returns how they are read, in a line.

    Raises:
      DataError: a file is of no known format, or one that lies among the data but is none.
      ConfigError: a setting concerns none of the files.
    """
    found: dict[str, list[epath.Path]] = collections.defaultdict(list)
    for path in matching(source, split):
        found[_described(format_of(path, source), source)].append(path)
    named = {os.fspath(epath.Path(pattern).expanduser()) for pattern in _patterns(source, split)}
    text = {path for what, paths in found.items() for path in paths if format_of(path, source).is_text}
    every = list(itertools.chain.from_iterable(found.values()))
    records = [path for path in every if path not in text and path.name not in _HUB_METADATA]
    for path in every:
        if os.fspath(path) not in named:
            _reject_metadata(path, path in text, records, source)
    if split == "train" and source.separator and every and not text:
        raise ConfigError(f"data.separator={source.separator} is for plain text files, of which there are none")
    return "; ".join(f"{len(paths):,} as {what}: {_listed(paths)}" for what, paths in found.items())


def markup(source: Source) -> str:
    """A warning of training files whose markup would be learned as text; empty where there is none."""
    found = [path for path in matching(source, "train") if path.suffix.lower() in _MARKUP]
    if not found or source.example != "text":
        return ""
    count = "1 file holds" if len(found) == 1 else f"{len(found):,} files hold"
    return f"warning: {count} markup, which is trained on as text: {_listed(found)}"


def quotation_marks(source: Source) -> str:
    """A warning of TSV files with quoted fields, whose quotation marks are read as text; empty where there is none."""
    paths = [path for split in ("train", "valid", "test") for path in matching(source, split)]
    found = [path for path in paths if formats.by_suffix(path) == "tsv" and _has_quoted_fields(path, source)]
    if not found:
        return ""
    remedy = "rename to .csv to have them removed"
    return f"warning: quotation marks around fields are read as text, since TSV has none: {_listed(found)}; {remedy}"


def _has_quoted_fields(path: epath.Path, source: Source) -> bool:
    kind = format_of(path, source)
    with formats.opened(path, kind) as stream:
        return kind.name == "tsv" and quotes_fields(stream.read(_HEAD))


def _patterns(source: Source, split: Split) -> tuple[str, ...]:
    return getattr(source, "files" if split == "train" else f"{split}_files")


def _described(kind: Format, source: Source) -> str:
    name = formats.NAMES[kind.name]
    if kind.is_text and source.example == "text":
        unit = "between separators" if source.separator else f"a {source.document}"
        name += f" with one document {unit}"
    if kind.is_text and source.example == "pair":
        name += " with one sentence a line"
    ends = f"lines end with {kind.line_end}" if kind.line_end else ""
    return ", ".join(filter(None, (name, kind.compression, kind.encoding.upper(), ends)))


def _listed(paths: list[epath.Path]) -> str:
    return ", ".join(path.name for path in paths[:_SHOWN]) + ", ..." * (len(paths) > _SHOWN)


def _reject_metadata(path: epath.Path, is_text: bool, records: list[epath.Path], source: Source) -> None:
    """Rejects a file that a folder or glob brought in and that is hardly meant as data."""
    remedy = "name the data files alone"
    if records:
        remedy += f", as {records[0].parent}/*{records[0].suffix}"
    if path.name in _HUB_METADATA:
        raise DataError(f"{path} describes a data set of the Hugging Face Hub and holds no data: {remedy}")
    if not is_text:
        return
    if path.suffix.lower() == ".md" and _is_card(path):
        raise DataError(f"{path} is the card of a data set or model, not data: {remedy}")
    if source.example == "text" and any(path.parent in record.parents for record in records):
        raise DataError(f"{path} would be read as plain text, but lies among files of records: {remedy}")


def _is_card(path: epath.Path) -> bool:
    """True if a Markdown file begins with the YAML header of a card."""
    with formats.reading(path), path.open("rb") as stream:
        return stream.read(1 << 10).lstrip().startswith(b"---")


def read(paths: tuple[epath.Path, ...], source: Source, keep_bad: bool = False) -> Iterator[Raw]:
    """The examples of one file, or of two plain text files line by line, and where each stands.

    Args:
      paths: one file, or source and target.
      source: that they belong to.
      keep_bad: yield bad records as `BadRecord` rather than raise.

    Raises:
      DataError: it is not of its format, a record lacks a part, or two files have unequal numbers of lines.
      InputMissing: it cannot be read.
      ConfigError: a package or a setting is missing.
    """
    path, *partner = paths
    if partner:
        yield from _read_pairs(path, *partner)
        return
    kind = format_of(path, source)
    with formats.opened(path, kind) as stream:
        if kind.name == "json" and source.example == "qa" and not _is_list(path, kind):
            yield from squad.read(path, stream, keep_bad)
        elif kind.name in READERS:
            found = READERS[kind.name](path, stream, columns(source), keep_bad)
            yield from (_flat(raw, keep_bad) for raw in found) if source.example == "qa" else found
        elif source.example != "text":
            known = ", ".join(dict.fromkeys(formats.SUFFIXES))
            raise DataError(f"{path}: data.example={source.example} is read from {known} files")
        elif source.separator:
            for number, text in formats.separated(path, stream, source.separator):
                yield {"text": text}, f"{path}:{number}"
        elif source.document == "line":
            for number, line in formats.lines(path, stream):
                yield {"text": line}, f"{path}:{number}"
        else:
            yield {"text": formats.whole(path, stream)}, os.fspath(path)


def _flat(raw: Raw, keep_bad: bool) -> Raw:
    content, origin = raw
    return guarded(lambda: squad.flat(content, origin), origin, keep_bad) if isinstance(content, dict) else raw


def _is_list(path: epath.Path, kind: Format) -> bool:
    """True if a JSON file holds records, rather than an object as SQuAD has it."""
    with formats.opened(path, kind) as stream:
        head = stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"[") or (b'"data"' not in head and b'"question"' in head)


def _read_pairs(path: epath.Path, other: epath.Path) -> Iterator[Raw]:
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(formats.opened(each, formats.detect(each))) for each in (path, other)]
        lines, other_lines = (formats.lines(*each) for each in zip((path, other), streams, strict=True))
        for number in itertools.count(1):
            pair = [next(found, (0, None))[1] for found in (lines, other_lines)]
            if None in pair:
                break
            yield dict(zip(("source", "target"), pair, strict=True)), f"{path}:{number}"
        if pair != [None, None]:
            counts = [number - 1 + (line is not None) for line in pair]
            counts = [count + sum(1 for _ in rest) for count, rest in zip(counts, (lines, other_lines), strict=True)]
            raise DataError(f"{path} has {counts[0]} lines, {other} has {counts[1]}: pairs are aligned line by line")


def is_whole(path: epath.Path, source: Source) -> bool:
    """Whether a file is one document."""
    if source.example != "text" or source.document != "file" or source.separator:
        return False
    return format_of(path, source).is_text
