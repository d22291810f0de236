"""What was prepared, from what, and how: the record that tells whether two preparations are the same."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from etils import epath

from lslm_jax.config import Config, Source, TokenizerConfig
from lslm_jax.data.chat import chat_template
from lslm_jax.data.readers import sources
from lslm_jax.data.shard_files import MANIFEST
from lslm_jax.data.shards import Shards
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.runtime import atomic_io

VERSION = 1
_SOURCE_KEYS = {
    "files": ("source", "files", "text_key", "document", "valid_files", "valid_fraction"),
    "tfds": ("source", "tfds", "split", "text_key", "valid_split", "valid_fraction"),
}
_KIND_KEYS = {
    "text": (),
    "pair": ("example", "target_key"),
    "label": ("example", "target_key", "label_key", "labels"),
    "tags": ("example", "label_key", "labels"),
    "qa": ("example",),
    "chat": ("example", "target_key"),
}
_OPTIONAL_KEYS = ("test_files", "test_split", "separator", "input_key", "roles")
_NEW_KEYS = ("bad_records", "deduplicate_over")  # their defaults stand for what was done before they existed
_TRAINED_KEYS = ("model", "vocab_size", "byte_fallback", "sample_bytes")


def read(path: epath.Path) -> dict[str, Any] | None:
    """A record; None where there is none.

    Raises:
      DataError: it is damaged, or of another version of this program.
    """
    if not path.exists():
        return None
    record = atomic_io.read_json(path)
    if record.get("version") != VERSION:
        raise DataError(f"{path} is not a record of version {VERSION}; remove {path.parent} and prepare again")
    needed = {"settings", "inputs", "given_tokenizer"} | ({"tokenizer", "splits"} if path.name == MANIFEST else set())
    if missing := needed - record.keys():
        raise DataError(f"{path} is damaged: it lacks {min(missing)}")
    for key, is_valid in _SHAPES.items():
        if key in record and not is_valid(record[key]):
            raise DataError(f"{path} is damaged: {key} is {json.dumps(record[key])[:60]}")
    return record


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and epath.Path(value).name == value and "\0" not in value


def _is_input(entries: Any) -> bool:
    """True for entries of `sources.fingerprint`; those of earlier versions hold fewer items."""
    return isinstance(entries, list) and all(
        isinstance(entry, list) and len(entry) in (2, 3, 4) and isinstance(entry[0], str) for entry in entries
    )


def _is_tokenizer(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        return False
    ids = [entry.get(name) for name in ("vocab_size", "bos_id", "eos_id")]
    more = [entry[name] for name in ("pad_id", "mask_id", "separators") if entry.get(name) is not None]
    sentinels = entry.get("sentinel_ids", [])
    return (
        isinstance(sentinels, list)
        and all(map(atomic_io.is_count, [*ids, *more, *sentinels]))
        and (not entry.get("file") or _is_plain_name(entry["file"]))
    )


def _is_split(name: Any, split: Any) -> bool:
    plain = pathlib.PurePosixPath(name)
    return (
        not plain.is_absolute()
        and ".." not in plain.parts
        and isinstance(split, dict)
        and isinstance(split.get("manifest_sha256"), str)
    )


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "given_tokenizer": lambda value: isinstance(value, str),
    "inputs": lambda value: isinstance(value, dict) and all(map(_is_input, value.values())),
    "labels": _is_texts,
    "source_labels": lambda value: isinstance(value, dict) and all(map(_is_texts, value.values())),
    "tokenizer": _is_tokenizer,
    "splits": lambda value: isinstance(value, dict) and all(_is_split(*item) for item in value.items()),
    "dropped": lambda value: isinstance(value, dict),
    "chat": lambda value: isinstance(value, dict) and isinstance(value.get("sha256"), str),
    "content_sha256": lambda value: isinstance(value, str),
}


def check_content(record: dict[str, Any], directory: epath.Path) -> None:
    """Compares labels, tokenizer and splits of a manifest with its own hash, which older ones lack."""
    if "content_sha256" in record and record["content_sha256"] != content_sha256(record):
        path = directory / MANIFEST
        raise DataError(f"{path} was altered: its labels, tokenizer or splits are not those that were written")


def changed_inputs(record: dict[str, Any]) -> list[str]:
    """The files on record that have another content now; none of those that are gone."""
    entries = [entry for found in record.get("inputs", {}).values() for entry in found]
    present = [entry for entry in entries if len(entry) == 4 and epath.Path(entry[0]).exists()]
    return [entry[0] for entry in present if sources.has_changed(entry)]


def named_sources(config: Config) -> dict[str, Source]:
    """The source, named "", or those of a mixture."""
    if not config.data.mixture:
        return {"": config.data}
    return {source.name: source for source in config.data.mixture}


def settings(config: Config, named: dict[str, Source]) -> dict[str, Any]:
    """Every setting that the shards' content depends on, by key, as JSON gives it back.

    Keys that make no difference to plain text are left out there: what was prepared before they existed stays valid.
    """
    trains = _trains_vocabulary(config)
    found: dict[str, Any] = {"data.max_documents": config.data.max_documents}
    for name, source in named.items():
        prefix = f"data.mixture.{name}" if name else "data"
        keys = _SOURCE_KEYS[source.source] + (("weight",) if name and trains else ()) + _KIND_KEYS[source.example]
        keys += tuple(key for key in _OPTIONAL_KEYS if getattr(source, key))
        if source.example != "text":
            found["task.objective"] = config.task.objective
            keys += ("prefix",) if config.task.objective == "seq2seq" else ()
        found |= {f"{prefix}.{key}": getattr(source, key) for key in keys}
    for field in dataclasses.fields(config.clean):
        value = getattr(config.clean, field.name)
        if field.name not in _NEW_KEYS or value != field.default:
            found[f"clean.{field.name}"] = value
    found["tokenizer.kind"] = config.tokenizer.kind
    if trains:
        found |= {f"tokenizer.{key}": getattr(config.tokenizer, key) for key in _TRAINED_KEYS}
        # Older manifests lack these.
        given = {key: getattr(config.tokenizer, key) for key in ("character_coverage", "user_symbols")}
        found |= {f"tokenizer.{key}": value for key, value in given.items() if value != getattr(TokenizerConfig(), key)}
    return json.loads(json.dumps(found))


def _trains_vocabulary(config: Config) -> bool:
    return config.tokenizer.kind == "sentencepiece" and not config.tokenizer.path


def verify(directory: epath.Path) -> int:
    """Reads every byte of what was prepared and compares it with the manifests; returns how many there are.

    Raises:
      DataError: a file is missing, truncated, too long or altered, or so is the record of labels and tokenizer.
    """
    record = read(directory / MANIFEST)
    if record is None:
        return 0
    total = 0
    _check_tokenizer(directory, record)
    for name in record["splits"]:
        verify_split(directory, record, name)
        total += sum(file.stat().length for file in (directory / name).iterdir() if file.name != MANIFEST)
    check_content(record, directory)
    return total


def verify_split(directory: epath.Path, record: dict[str, Any], name: str) -> None:
    """Reads every byte of a split, as "valid" or "SOURCE/valid", and compares it with the manifests.

    Raises:
      DataError: a file is missing, truncated, too long or altered.
    """
    path = directory / name / MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing")
    if atomic_io.fingerprint(path)[1] != record["splits"][name]["manifest_sha256"]:
        raise DataError(f"{path} was altered: its sha256 is not the one in {directory / MANIFEST}")
    Shards.open(path.parent, verify=True)


def _check_tokenizer(directory: epath.Path, record: dict[str, Any]) -> None:
    entry = record["tokenizer"] if isinstance(record.get("tokenizer"), dict) else {}
    name, sha256 = entry.get("file"), entry.get("sha256")
    if not name:
        return
    path = directory / name
    if epath.Path(name).name != name or not path.exists():
        raise DataError(
            f"{path} is missing" if epath.Path(name).name == name else f"{name!r} is no file beside {MANIFEST}"
        )
    if atomic_io.fingerprint(path)[1] != sha256:
        raise DataError(f"{path} was altered: its sha256 is not the one in {directory / MANIFEST}")


def place(directory: epath.Path) -> str:
    """Identifies a prepared directory among processes: equal where they see the same one, also through a network."""
    if atomic_io.is_remote(directory):
        return str(directory)
    status = os.stat(directory / MANIFEST) if (directory / MANIFEST).exists() else None
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}" if status else ""


def given_sha256(config: Config) -> str:
    """Of the tokenizer file in the config; empty where there is none."""
    if config.tokenizer.kind == "bytes" or not config.tokenizer.path:
        return ""
    path = epath.Path(config.tokenizer.path).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def content_sha256(manifest: dict[str, Any]) -> str:
    """Sha256 of what the prepared data are, and of nothing else: the same shards may lie elsewhere.

    Labels and the tokenizer's ids are part of it, but in manifests of earlier versions, whose hash is on record.
    """
    contents = {name: split["manifest_sha256"] for name, split in manifest["splits"].items()}
    if "chat" in manifest:
        contents["chat_template"] = manifest["chat"]["sha256"]
    if "content_sha256" in manifest:
        contents |= {key: manifest.get(key) for key in ("labels", "source_labels", "tokenizer")}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def template_sha256(config: Config) -> str:
    """Of the chat template that a config of conversations names; empty where there is none."""
    found = chat_template.read(config) if config.data.is_chat else None
    return chat_template.sha256(found[0]) if found else ""


def check(
    record: dict[str, Any], config: Config, named: dict[str, Source], directory: epath.Path, finished: bool
) -> None:
    """Compares settings and inputs with those on record; where all is finished, inputs may be gone."""
    remedy = f"choose another data.dir, or remove {directory}"
    check_settings(record, config, named, directory, remedy)
    for name, source in named.items():
        if what := sources.changed(source, record["inputs"].get(name, []), missing_ok=finished):
            raise DataError(f"the input has changed since {directory} was prepared: {what}; {remedy}")


def check_settings(
    record: dict[str, Any], config: Config, named: dict[str, Source], directory: epath.Path, remedy: str
) -> None:
    """Compares settings, tokenizer and chat template with those on record, but not the inputs.

    Raises:
      ConfigError: one of them is another; the message ends with `remedy`.
    """
    before, now = record["settings"], settings(config, named)
    for key in before | now:
        if (old := before.get(key)) != (new := now.get(key)):
            raise ConfigError(f"{directory} was prepared with {key}={json.dumps(old)}, not {json.dumps(new)}: {remedy}")
    given = given_sha256(config)
    if given and given != record["given_tokenizer"]:
        raise ConfigError(f"{directory} was prepared with another tokenizer than {config.tokenizer.path}: {remedy}")
    template = template_sha256(config)
    if template and template != record["chat"]["sha256"]:
        raise ConfigError(f"{directory} was prepared with another chat template: {remedy}")
