"""Which fields of a record make an example of each kind, and what they may hold."""

import json
from collections.abc import Container, Iterable
from typing import Any, Literal, NamedTuple

from lslm_jax.config import Source
from lslm_jax.errors import ConfigError, DataError

_MAX_DEPTH = 64
Holds = Literal["text", "more_text", "label", "texts", "labels", "answers", "id", "messages", "tools"]
SAID = {
    "text": "text",
    "more_text": "text",
    "label": "a label",
    "texts": "a list of texts",
    "labels": "a list of labels",
    "answers": "answers as SQuAD has them",
    "id": "an id",
    "messages": "a list of messages",
    "tools": "a list of tools",
}


class RecordError(DataError):
    """A record that does not hold an example; `clean.bad_records=skip` drops and counts it."""


class BadRecord(NamedTuple):
    """The error of a record, in the place of its content."""

    message: str


class Column(NamedTuple):
    """One part of an example.

    Attributes:
      name: of the part.
      key: of the record's field; `a/b` where it is nested.
      holds: what its values may be.
      setting: the key of the config that names it; empty where its name is fixed.
    """

    name: str
    key: str
    holds: Holds
    setting: str = ""

    @property
    def optional(self) -> bool:
        """Whether a record may lack it."""
        return self.holds in ("id", "tools", "more_text")

    @property
    def said(self) -> str:
        """How messages name it."""
        return f"{self.key!r} ({self.setting})" if self.setting else repr(self.key)


def columns(source: Source) -> list[Column]:
    """The fields of a source's records that make its examples.

    Raises:
      ConfigError: a setting that names one is empty.
    """
    match source.example:
        case "text":
            return [_named(source, "text", "text_key", "text")]
        case "pair":
            return [_named(source, "source", "text_key", "text"), _named(source, "target", "target_key", "text")]
        case "label":
            second = [_named(source, "target", "target_key", "text")] if source.target_key else []
            return [_named(source, "text", "text_key", "text"), *second, _named(source, "label", "label_key", "label")]
        case "tags":
            return [_named(source, "words", "text_key", "texts"), _named(source, "tags", "label_key", "labels")]
        case "qa":
            texts = [Column(name, name, "text") for name in ("question", "context")]
            return [Column("id", "id", "id"), *texts, Column("answers", "answers", "answers")]
        case "chat":
            if source.target_key:
                more = [_named(source, "input", "input_key", "more_text")] if source.input_key else []
                target = _named(source, "target", "target_key", "text")
                return [_named(source, "text", "text_key", "text"), *more, target]
            return [_named(source, "messages", "text_key", "messages"), Column("tools", "tools", "tools")]


def _named(source: Source, name: str, setting: str, holds: Holds) -> Column:
    key = getattr(source, setting)
    if not key:
        raise ConfigError(f"data.{setting} is empty: name the field that holds the {name} of each {source.example}")
    return Column(name, key, holds, f"data.{setting}")


def pick(record: Any, column: Column, origin: str) -> Any:
    """A record's value of one column, checked; None for an optional one that is not there.

    Raises:
      RecordError: the record has no such field, or it holds something else.
    """
    value = record
    for part in [column.key] if column.key in record else column.key.split("/"):
        if not isinstance(value, dict) or part not in value:
            if column.optional:
                return None
            raise RecordError(f"{origin}: no field {column.said}; it has: {', '.join(record) or 'none'}")
        value = value[part]
    return check(value, column, origin)


def pick_all(record: dict[str, Any], wanted: list[Column], origin: str) -> dict[str, Any]:
    """The parts of an example by name; errors are those of `pick`, with all missing fields in one."""
    try:
        return {column.name: pick(record, column, origin) for column in wanted}
    except RecordError:
        present = {column.key for column in wanted if _has(record, column)}
        require(present, wanted, f"{origin}: no field", "it has", record)
        raise


def _has(record: dict[str, Any], column: Column) -> bool:
    value: Any = record
    for part in [column.key] if column.key in record else column.key.split("/"):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def require(present: Container[str], wanted: list[Column], prefix: str, has: str, keys: Iterable[str]) -> None:
    """Compares the columns of an example with the keys that are present.

    Args:
      present: keys.
      wanted: columns; optional ones may be missing.
      prefix, has: of the message: `FILE: no column` and `its header has`.
      keys: all, for the message.

    Raises:
      RecordError: columns are missing; all are named.
    """
    missing = [column.said for column in wanted if not column.optional and column.key not in present]
    if missing:
        plural = "s" * (len(missing) > 1)
        nothing = "nothing" if "header" in has else "none"
        raise RecordError(f"{prefix}{plural} {', '.join(missing)}; {has}: {', '.join(keys) or nothing}")


def check(value: Any, column: Column, origin: str) -> Any:
    """The value of a column.

    Raises:
      RecordError: it is not of the kind that the column holds, or nested too deeply.
    """
    if isinstance(value, (dict, list)):
        require_shallow(value, origin)
    if not _fits(value, column.holds):
        shown = json.dumps(value, default=str)[:40]
        raise RecordError(f"{origin}: field {column.key!r} is {shown}, not {SAID[column.holds]}")
    return value


def require_shallow(value: Any, origin: str) -> None:
    """Rejects values nested so deeply that what works by recursion (templates, JSON, pickling) would fail.

    Raises:
      RecordError: there are more than 64 levels.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [part for parts in inner for part in parts]
        if not level:
            return
    raise RecordError(f"{origin}: nested more than {_MAX_DEPTH} levels deep")


def _fits(value: Any, holds: Holds) -> bool:
    match holds:
        case "text":
            return isinstance(value, (str, bytes))
        case "more_text":
            return value is None or isinstance(value, (str, bytes))
        case "label":
            return value is None or isinstance(value, (str, bytes, int, float))  # None: dropped, and counted
        case "id":
            return isinstance(value, (str, bytes, int, float))
        case "answers" | "messages":
            return isinstance(value, (list, dict))
        case "tools":
            return value is None or isinstance(value, list)
        case "texts":
            return isinstance(value, list) and all(_fits(part, "text") for part in value)
        case "labels":
            return isinstance(value, list) and all(_fits(part, "label") for part in value)
