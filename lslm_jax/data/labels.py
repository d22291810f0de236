"""Classes and tags: their names, and the number of each."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lslm_jax import atomic
from lslm_jax.config import Config, Source
from lslm_jax.data import sources, tfds
from lslm_jax.errors import DataError, InputMissing

_SHOWN = 20


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
    for document in sources.documents(source, "train", config.data.max_documents):
        assert isinstance(document.content, dict)
        content = document.content
        found |= {spell(label) for label in (content["tags"] if source.example == "tags" else [content["label"]])}
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
    named = atomic.read_json(path).get("id2label")
    if not isinstance(named, dict) or not all(str(key).isdecimal() for key in named):
        return []
    return [str(named[key]) for key in sorted(named, key=int)]


def in_order(found: Iterable[str]) -> list[str]:
    """Names sorted, as numbers where all are numbers."""
    try:
        return sorted(found, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(found)


def spell(label: Any) -> str:
    """The name that a raw label is or stands for: text, or a number."""
    if isinstance(label, bytes):
        return label.decode(errors="replace").strip()
    if isinstance(label, bool):
        return json.dumps(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def name(label: Any, numbers: Mapping[str, int], origin: str) -> str:
    """The name of a raw label, which is one itself or the number of one.

    Args:
      label: as it was read.
      numbers: of all names, in their order.
      origin: where it was read, for the message.

    Raises:
      DataError: it is neither.
    """
    said = spell(label)
    if said in numbers:
        return said
    if said.isdecimal() and int(said) < len(numbers):
        return list(numbers)[int(said)]
    known = ", ".join(list(numbers)[:_SHOWN]) + (", ..." if len(numbers) > _SHOWN else "")
    raise DataError(f"{origin}: unknown label {said!r}; known are: {known}")


def value(label: Any, origin: str) -> float:
    """The number that a raw label is.

    Raises:
      DataError: it is none, or not finite.
    """
    try:
        found = float(spell(label))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{origin}: label {spell(label)!r} is not a number, as task.objective=regression wants")
    return found
