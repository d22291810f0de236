"""Identity of a checkpoint: what made it, compared with the run that is to go on from it or to read it.

Interface for commands that read a checkpoint: `check_inputs` compares its metadata with the config, the data manifest
and the tokenizer at hand.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint.metadata import check_manifest_sha256, data_facts, manifest_sha256, read
from lslm_jax.config import Config, loading
from lslm_jax.data.skipped_batches import Detour, at
from lslm_jax.errors import CheckpointRefused, DataError
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io, environment

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
    "train.frozen",
    "optimizer.name",
    "optimizer.moment_dtype",
)
FREE = tuple(
    f"model.{name}"
    for name in ("attention", "scan_layers", "remat", "microbatches", "pipeline_rounds", "dtype", "dropout")
)


# Model settings that a command may change when it only reads a checkpoint, besides FREE.
_FREE_TO_READ = (*FREE, "model.max_length", "model.num_labels")


def make(
    config: Config,
    tokenizer_sha256: str,
    data_sha256: str,
    mesh: Mesh,
    detours: Sequence[Detour] = (),
    *,
    facts: Mapping[str, Any] | None = None,
    row_offset: int = 0,
) -> dict[str, Any]:
    """Returns what made a checkpoint, as JSON values: config, tokenizer, data, batches left out, versions, mesh.

    Args:
      config: resolved.
      tokenizer_sha256, data_sha256: content hashes of the tokenizer file and of the shards.
      mesh: of the run.
      detours: batches left out so far.
      facts: the data manifest. Its labels and token ids are recorded; None: not recorded.
      row_offset: of the data, see `continued_rows`.
    """
    recorded = {} if facts is None else {"data_facts": data_facts(facts), "manifest_sha256": manifest_sha256(facts)}
    return {
        "config": loading.to_dict(config),
        "tokenizer_sha256": tokenizer_sha256,
        "data_sha256": data_sha256,
        "detours": [list(detour) for detour in detours],
        "mixture": {source.name: source.weight for source in config.data.mixture},
        "versions": {name: _version(name) for name in PACKAGES},
        "mesh": dict(mesh.shape),
        "environment": environment.numeric_settings(),
        **recorded,
        **({"row_offset": row_offset} if row_offset else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout, say


# Settings that may differ from host to host: what they lead to is compared by content.
_LOCAL = ("data.dir", "data.files", "data.valid_files", "data.test_files", "data.data_dir", "tokenizer.path")


def check_processes(config: Config, flags: Mapping[str, Any]) -> None:
    """Compares config, flags, versions and environment of all processes of a run, before anything is done.

    Args:
      config: of this process.
      flags: of its command line, by name; those that name the process itself are left out.

    Raises:
      ConfigError: on all processes; names the setting and its two values.
    """
    settings = {key: value for key, value in _flat(loading.to_dict(config)) if not _below(key, _LOCAL)}
    own = ("process", "coordinator", "processes", "config", "settings", "debug", "verb")
    given = {f"--{name}": value for name, value in flags.items() if name not in own and value not in (None, False)}
    if "--workdir" in given:
        given["--workdir"] = str(atomic_io.place(given["--workdir"]))
    versions = {name: _version(name) for name in (*PACKAGES, "numpy")} | {"python": platform.python_version()}
    shared = {key: value for key, value in environment.numeric_settings().items() if key not in environment.LOCAL}
    values = {"command": flags.get("verb"), **given, **settings, **shared, **versions}
    multihost.check_equal("settings", values, remedy="start all processes with the same settings and environment")


def check_data(facts: Mapping[str, Any]) -> None:
    """Compares the data manifests that all processes have read.

    Raises:
      DataError: on all processes, where one has other data, labels or token ids, or another tokenizer.
    """
    values = {"data_sha256": facts["sha256"], "manifest_sha256": manifest_sha256(facts), **data_facts(facts)}
    values["tokenizer_sha256"] = facts["tokenizer"].get("sha256")
    multihost.check_equal("data", values, DataError, "give all processes the same prepared data")


def continued_rows(saved: Mapping[str, Any], step: int, batch_size: int, detours: Sequence[Detour]) -> int:
    """Row offset with which a run goes on from a checkpoint, so that its next batch starts where that one's ended.

    Row r of batch n is row `offset + n * batch_size + r` of the data order; the offset is 0 until that size changes.

    Args:
      saved: metadata of the checkpoint.
      step: of the checkpoint.
      batch_size: from now on.
      detours: of the run; those after earlier steps count.
    """
    batches = at(step, [detour for detour in detours if detour.after < step])
    before = saved["config"]["train"]["batch_size"]
    return saved.get("row_offset", 0) + batches * (before - batch_size)


def batch_size_change(saved: Mapping[str, Any], config: Config, data: Any, step: int, detours: Sequence[Detour]) -> str:
    """Describes what another batch size changes from a checkpoint on; "" where it stays."""
    before, now = saved["config"]["train"]["batch_size"], config.train.batch_size
    if before == now:
        return ""
    position = data.offset + at(step, [detour for detour in detours if detour.after < step]) * now
    epochs = f", {data.epoch(step):.3g} epochs" if data.num_rows else ""
    return (
        f"train.batch_size {before} -> {now}: step {step + 1} continues at row {position:,} of the data order{epochs}; "
        f"no row is skipped or repeated. The learning rate follows steps, now of {now / before:g} times as many rows: "
        f"{config.train.steps - step} of {config.train.steps} are left"
    )


def check_inputs(
    directory: epath.Path, config: Config, facts: Mapping[str, Any] | None = None, tokenizer_sha256: str | None = None
) -> None:
    """Compares a checkpoint's metadata with what a command is about to use together with its weights.

    Args:
      directory: of the checkpoint.
      config: resolved; its model settings and objective must be those of the checkpoint.
      facts: the data manifest, whose token ids and labels must be those of training. None: not compared.
      tokenizer_sha256: content hash of the tokenizer file that was loaded. None: not compared.

    Raises:
      CheckpointRefused: another model, or another tokenizer.
      DataError: the manifest's labels or token ids are other ones.
    """
    saved = read(directory)
    old = _filled(saved["config"], loading.to_dict(Config()))
    for key, before, now in _differences(old, loading.to_dict(config)):
        if _below(key, ("model", "task.objective")) and not _below(key, _FREE_TO_READ):
            raise CheckpointRefused(f"{directory} was made with {key}={before}, the config says {now}")
    expected = saved.get("tokenizer_sha256")
    given = [tokenizer_sha256] if tokenizer_sha256 else []
    for sha256 in [*given, *([facts["tokenizer"].get("sha256")] if facts is not None else [])]:
        if sha256 != expected and (sha256 or expected):
            raise CheckpointRefused(
                f"{directory} was made with another tokenizer ({str(expected)[:12]}, now {str(sha256)[:12]}): its "
                "embeddings belong to other tokens"
            )
    if facts is None or not saved.get("data_facts"):
        return
    now, before = data_facts(facts), saved["data_facts"]
    for name in ("ids", "labels"):
        if before[name] and now[name] and before[name] != now[name]:
            raise DataError(
                f"{directory} was made with other {name} in the data manifest: {before[name]}, now {now[name]}"
            )
    if facts.get("sha256") == saved["data_sha256"]:
        check_manifest_sha256(directory, saved, manifest_sha256(facts))


def check(directory: epath.Path, saved: Mapping[str, Any], mine: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Compares the identity in a checkpoint with that of the run that wants to go on from it.

    Raises:
      CheckpointRefused: another tokenizer, other data, or a setting that the arrays or the order of the data depend on.
    """
    for other, key in (("another tokenizer", "tokenizer_sha256"), ("other data", "data_sha256")):
        if saved[key] != mine[key]:
            raise CheckpointRefused(
                f"{directory} was made with {other} ({saved[key][:12]}, now {mine[key][:12]}): "
                "use another --workdir, or put the former back"
            )
    check_manifest_sha256(directory, saved, mine.get("manifest_sha256", ""))
    if saved["mixture"] != mine["mixture"]:
        raise CheckpointRefused(
            f"{directory} was made with the mixture {saved['mixture']}, the config says {mine['mixture']}"
        )
    # What lies behind a checkpoint is of no matter to it: a run that goes back adds a detour after it.
    before = lambda identity: [list(d)[:2] for d in identity.get("detours", ()) if d[0] < int(directory.name)]
    if before(saved) != before(mine):
        raise CheckpointRefused(f"{directory} left out other batches ({before(saved)}, now {before(mine)})")
    check_settings(directory, saved["config"], mine["config"], log)
    if warning := environment_warning(saved, mine):
        log(f"warning: {warning}")


def environment_warning(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Names what has changed in the environment since a checkpoint was saved, and what that means; "" for nothing."""
    parts = [
        f"{key} {old or 'unset'} -> {new or 'unset'}"
        for name in ("environment", "versions", "mesh")
        if saved.get(name) and name in mine  # checkpoints of earlier versions lack some
        for key, old, new in _differences(saved[name], mine[name])
        if key in saved[name] or key not in environment.LOCAL  # earlier versions did not record these
    ]
    if not parts:
        return ""
    random = any(part.startswith(("JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE")) for part in parts)
    placed = all(part.startswith(("device_count", *saved.get("mesh", ()))) for part in parts)
    if placed and mine["config"]["train"]["reproducible"]:
        means = "with train.reproducible the bits stay the same"
    elif random:
        means = "random draws (dropout, masks) differ from those of an uninterrupted run"
    else:
        means = "the run goes on, but its bits may differ from those of an uninterrupted run"
    return f"the environment has changed since this checkpoint: {', '.join(parts)}; {means}"


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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changes(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ from saved ones, both as JSON values: dotted key, old and new value.

    A setting that the version which saved them did not have counts as its default of now.
    """
    return _differences(_filled(saved, loading.to_dict(Config())), mine)


def is_fixed(key: str) -> bool:
    """True if a checkpoint's arrays, or its place in the data, depend on a setting."""
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
