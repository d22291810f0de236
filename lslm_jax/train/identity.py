"""Who made a checkpoint, and whether a run may go on from it."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lslm_jax import config_loading
from lslm_jax.config import Config
from lslm_jax.data.detours import Detour
from lslm_jax.errors import CheckpointRefused

PACKAGES = ("lslm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

# Settings that a checkpoint's arrays or its place in the data depend on. The others may change from run to run.
FIXED = (
    "seed",
    "model",
    "data.seq_len",
    "data.packing",
    "data.mask_documents",
    "data.source_len",
    "task.objective",
    "task.mask_rate",
    "task.whole_words",
    "task.span_length",
    "task.stride",
    "train.batch_size",
    "train.frozen",
    "optimizer.name",
    "optimizer.moment_dtype",
)
FREE = tuple(
    f"model.{name}"
    for name in ("attention", "scan_layers", "remat", "microbatches", "pipeline_rounds", "dtype", "dropout")
)


def make(
    config: Config, tokenizer_sha256: str, data_sha256: str, mesh: Mesh, detours: Sequence[Detour] = ()
) -> dict[str, Any]:
    """Who made a checkpoint: config, tokenizer, data, what was left out of them, versions, mesh, as JSON values."""
    return {
        "config": config_loading.to_dict(config),
        "tokenizer_sha256": tokenizer_sha256,
        "data_sha256": data_sha256,
        "detours": [list(detour) for detour in detours],
        "mixture": {source.name: source.weight for source in config.data.mixture},
        "versions": {name: _version(name) for name in PACKAGES},
        "mesh": dict(mesh.shape),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout, say


def check(
    directory: epath.Path, saved: Mapping[str, Any] | None, mine: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Compares the identity in a checkpoint with that of the run that wants to go on from it.

    Raises:
      CheckpointRefused: another tokenizer, other data, or a setting that the arrays or the order of the data depend on.
    """
    if saved is None:
        raise CheckpointRefused(f"{directory} does not say what made it")
    for other, key in (("another tokenizer", "tokenizer_sha256"), ("other data", "data_sha256")):
        if saved[key] != mine[key]:
            raise CheckpointRefused(
                f"{directory} was made with {other} ({saved[key][:12]}, now {mine[key][:12]}): "
                "use another --workdir, or put the former back"
            )
    if saved["mixture"] != mine["mixture"]:
        raise CheckpointRefused(
            f"{directory} was made with the mixture {saved['mixture']}, the config says {mine['mixture']}"
        )
    # What lies behind a checkpoint is of no matter to it: a run that goes back adds a detour after it.
    before = lambda identity: [list(d)[:2] for d in identity.get("detours", ()) if d[0] < int(directory.name)]
    if before(saved) != before(mine):
        raise CheckpointRefused(f"{directory} left out other batches ({before(saved)}, now {before(mine)})")
    check_settings(directory, saved["config"], mine["config"], log)


def check_settings(
    directory: epath.Path, saved: Mapping[str, Any], mine: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Compares the settings that something was made with, as JSON values, with those of the run at hand.

    Raises:
      CheckpointRefused: a setting that the arrays or the order of the data depend on is another one.
    """
    changed = []
    for key, old, new in changes(saved, mine):
        if is_fixed(key):
            raise CheckpointRefused(f"{directory} was made with {key}={old}, the config says {new}")
        changed.append(f"{key} {old} -> {new}")
    if changed:
        log(f"settings changed since {directory}: {', '.join(changed)}")


def changes(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ from saved ones, both as JSON values: dotted key, old and new value.

    A setting that the version which saved them did not have counts as its default of now.
    """
    return _differences(_filled(saved, config_loading.to_dict(Config())), mine)


def is_fixed(key: str) -> bool:
    """Whether a checkpoint's arrays, or its place in the data, depend on a setting."""
    return _below(key, FIXED) and not _below(key, FREE)


def _below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _filled(saved: Any, defaults: Any) -> Any:
    if not (isinstance(saved, Mapping) and isinstance(defaults, Mapping)):
        return saved
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in saved.items()}}


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, as (key, old, new). JSON has no tuples: lists and tuples count as equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict(old) | dict(new):
            name = f"{prefix}.{key}" if prefix else key
            yield from _differences(old[key] if key in old else None, new[key] if key in new else None, name)
    elif json.dumps(old) != json.dumps(new):
        yield prefix, old, new
