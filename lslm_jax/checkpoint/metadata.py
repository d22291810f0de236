"""Metadata of a checkpoint, and content hashes of the data manifest, read without jax."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from lslm_jax.config import Config
from lslm_jax.errors import CheckpointRefused, DataError, first_line
from lslm_jax.runtime import atomic_io

_FACTS = ("labels", "splits", "chat")  # of a data manifest: what changes the meaning of the shards
_MAX = 1e300  # of numbers in metadata
_IDS = ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id", "sentinel_ids")  # of its tokenizer entry


def data_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and token ids of a data manifest, which give the numbers in shards their meaning."""
    entry = facts.get("tokenizer") or {}
    ids = {name: entry[name] for name in _IDS if entry.get(name) is not None}
    return json.loads(json.dumps({"labels": list(facts.get("labels") or ()), "ids": ids}))


def manifest_sha256(facts: Mapping[str, Any]) -> str:
    """Content hash of a data manifest: labels, splits, chat template and tokenizer entry, not where inputs lie."""
    tokenizer = {key: value for key, value in (facts.get("tokenizer") or {}).items() if key != "file"}
    content = {"tokenizer": tokenizer} | {key: facts[key] for key in _FACTS if facts.get(key)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(directory: epath.Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, as `make` wrote them.

    Raises:
      CheckpointRefused: there are none, or they are damaged.
    """
    path = epath.Path(directory) / "_CHECKPOINT_METADATA"
    try:
        found = atomic_io.parse_json(path.read_text())["custom_metadata"]
    except FileNotFoundError as error:
        raise CheckpointRefused(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointRefused(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointRefused(f"{path} is damaged: its custom_metadata is not an object")
    for key, (default, is_valid) in _SHAPES.items():
        value = found.setdefault(key, default)
        if not is_valid(value):
            state = "is missing" if value is None else f"is {json.dumps(value)[:60]}"
            raise CheckpointRefused(f"{path} is damaged: {key} {state}")
    return found


def numbers(values: Any) -> list[float]:
    """Returns a list of finite numbers from metadata that may be damaged; ValueError where it is anything else."""
    if not isinstance(values, list) or not all(map(_is_finite, values)):
        raise ValueError(f"{json.dumps(values)[:60]} is not a list of numbers")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX < value < _MAX


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_config(value: Any) -> bool:
    """True for sections of settings, with the batch size on which the place in the data depends."""
    if not isinstance(value, dict) or not all(map(_is_object, (value.get(name, {}) for name in _SECTIONS))):
        return False
    size = value.get("train", {}).get("batch_size")
    return _is_count(size) and size > 0


def _is_detours(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(detour, list) and len(detour) >= 2 and all(map(_is_count, detour[:2])) for detour in value
    )


def _is_data_facts(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("ids"), dict) and isinstance(value.get("labels"), list)
    )


_SECTIONS = [field.name for field in dataclasses.fields(Config) if field.name != "seed"]
# Default, for checkpoints of earlier versions, and check of each entry. None without a default: it is required.
_SHAPES: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "config": (None, _is_config),
    "tokenizer_sha256": (None, _is_text),
    "data_sha256": (None, _is_text),
    "manifest_sha256": ("", _is_text),
    "data_facts": (None, _is_data_facts),
    "mixture": ({}, _is_object),
    "detours": ([], _is_detours),
    "versions": ({}, _is_object),
    "environment": ({}, _is_object),
    "mesh": ({}, _is_object),
    "memory": ({}, _is_object),
    "row_offset": (0, _is_count),
}


def check_manifest_sha256(directory: epath.Path, saved: Mapping[str, Any], now: str) -> None:
    """Compares the manifest of data with the one from which a checkpoint was trained on the same shards.

    Args:
      directory: of the checkpoint.
      saved: its metadata.
      now: `manifest_sha256` of the data; "" is not compared.

    Raises:
      DataError: it was altered.
    """
    before = saved.get("manifest_sha256")
    if before and now and before != now:
        raise DataError(
            f"data/manifest.json was altered since {directory} was saved ({before[:12]}, now {now[:12]}): restore it"
        )
