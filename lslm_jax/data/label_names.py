"""Classes and tags: their names, and the number of each."""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lslm_jax.config import Config, Source
from lslm_jax.data.readers import sources, tfds
from lslm_jax.data.readers.example_schema import BadRecord, RecordError
from lslm_jax.errors import DataError, InputMissing
from lslm_jax.runtime import atomic_io

_SHOWN = 20
_MISSING = ("nan", "null", "none", "na", "n/a", "<na>", "#n/a", "nat", "inf", "-inf")  # as tables spell them
_SURROGATE = re.compile("[\ud800-\udfff]")


def names(config: Config, named: Mapping[str, Source]) -> dict[str, list[str]]:
    """Names of each source's labels in the order of their numbers; [] for a source that has none.

    They are those of the config, those of the TFDS feature, or all that the training data hold: sorted, as numbers
    where all are numbers. The last takes reading the source once. The sources of a classifier or tagger share one list.

    Args:
      config: `data.max_documents` and `task.objective` are read.
      named: the sources by name.

    Raises:
      InputMissing: there is nothing to read.
      DataError: the input is bad.
    """
    found = {name: _names(source, config) for name, source in named.items()}
    if config.task.objective == "seq2seq":
        return found
    shared = merged(found)
    return {name: shared if labels else [] for name, labels in found.items()}


def merged(found: Mapping[str, list[str]]) -> list[str]:
    """All names once, in the order of the sources."""
    return list(dict.fromkeys(name for labels in found.values() for name in labels))


def _names(source: Source, config: Config) -> list[str]:
    if source.example not in ("label", "tags") or config.task.objective == "regression":
        return []
    if source.labels:
        return list(source.labels)
    if source.source == "tfds":
        classes = tfds.class_names(tfds.builder(source.tfds, source.data_dir), source.label_key)
        if classes:
            return classes
    found: set[str] = set()
    keep_bad = config.clean.bad_records == "skip"
    for document in sources.documents(source, "train", config.data.max_documents, keep_bad):
        content = document.content
        if isinstance(content, BadRecord):
            continue
        assert isinstance(content, dict)
        part = content["tags"] if source.example == "tags" else [content["label"]]
        found |= {spell(label) for label in part if not is_missing(label)}
    if not found:
        where = " ".join(source.files) or source.tfds
        raise InputMissing(f"nothing to train on in {where}: there are no labels to tell apart")
    known = pretrained_names(config.train.init_from)
    return known if found <= set(known) else in_order(found)


def pretrained_names(directory: str) -> list[str]:
    """Names of the labels that a Hugging Face directory's head tells apart, in its order; [] where it names none."""
    path = epath.Path(directory) / "config.json" if directory else None
    if path is None or "://" in directory or not path.is_file():
        return []
    named = atomic_io.read_json(path).get("id2label")
    if not isinstance(named, dict) or not all(str(key).isdecimal() for key in named):
        return []
    return [str(named[key]) for key in sorted(named, key=int)]


def describe(names: Sequence[str]) -> Iterator[str]:
    """Lines on the labels of prepared data: their names, and those that are hardly meant to differ."""
    if names:
        shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        yield f"{len(names):,} label{'s' * (len(names) > 1)}: {shown}"
    if len(names) == 1:
        yield f"warning: all examples have the label {names[0]!r}: there is nothing to tell apart"
    if missing := [name for name in names if name.casefold() in _MISSING]:
        several = len(missing) > 1
        verb = "look like missing values, and are classes" if several else "looks like a missing value and is a class"
        yield f"warning: the label{'s' * several} {' and '.join(map(repr, missing))} {verb}"
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_key(name), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            yield f"warning: the labels {' and '.join(map(repr, same))} are different classes, though alike"


def _key(name: str) -> str:
    """A text that names share which are hardly meant to differ: `Pos` and `pos`, `1` and `1.0`."""
    text = unicodedata.normalize("NFKC", name).casefold()
    number = float(text) if _is_number(text) else math.nan
    return text if math.isnan(number) else f"{number:.17g}"


def in_order(found: Iterable[str]) -> list[str]:
    """Names sorted, as numbers where all are numbers."""
    try:
        return sorted(found, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(found)


def is_missing(label: Any) -> bool:
    """True if a raw label is empty: no text, null, or the not-a-number that tables have for it."""
    return label is None or (isinstance(label, float) and math.isnan(label)) or not spell(label)


def spell(label: Any) -> str:
    """The name that a raw label is or stands for: text, or a number."""
    if isinstance(label, bytes):
        return label.decode(errors="replace").strip()
    if isinstance(label, bool):
        return json.dumps(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return _SURROGATE.sub("\ufffd", str(label)).strip()


def name(label: Any, numbers: Mapping[str, int], origin: str) -> str:
    """The name of a raw label, which is one itself or, where no name is a number, the number of one.

    Args:
      label: as it was read.
      numbers: of all names, in their order.
      origin: where it was read, for the message.

    Raises:
      DataError: it is neither.
    """
    said = label.name if isinstance(label, tfds.ClassNumber) else spell(label)
    if said in numbers:
        return said
    if said.isdecimal() and int(said) < len(numbers) and not any(map(_is_number, numbers)):
        return list(numbers)[int(said)]
    known = ", ".join(list(numbers)[:_SHOWN]) + (", ..." if len(numbers) > _SHOWN else "")
    raise DataError(f"{origin}: unknown label {said!r}; known are: {known}; correct it, or name all by data.labels")


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def value(label: Any, origin: str) -> float:
    """The number that a raw label is.

    Raises:
      RecordError: it is none, or not finite.
    """
    try:
        found = float(spell(label))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise RecordError(f"{origin}: label {spell(label)!r} is not a number, as task.objective=regression wants")
    return found
