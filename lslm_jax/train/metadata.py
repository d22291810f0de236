"""Metadata of a checkpoint, and content hashes of the data manifest, read without jax."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from lslm_jax import atomic
from lslm_jax.errors import CheckpointRefused, DataError, first_line

_FACTS = ("labels", "splits", "chat")  # of a data manifest: what changes the meaning of the shards
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
        found = atomic.parse_json(path.read_text())["custom_metadata"]
        if not isinstance(found["config"], dict):
            raise TypeError("its config is not an object")
        if missing := {"tokenizer_sha256", "data_sha256"} - found.keys():
            raise KeyError(min(missing))
    except FileNotFoundError as error:
        raise CheckpointRefused(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointRefused(f"{path} is damaged: {first_line(error)}") from error
    return found


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
