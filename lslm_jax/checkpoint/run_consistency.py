"""The check that a run, its checkpoint, its prepared data, its tokenizer and the settings of a command belong together.

Every command that reads a run opens it here. A checkpoint stores the config, the sha256 of the tokenizer and that of
the prepared data that it was trained with; what a command is about to use is compared with all three.
"""

import argparse
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from lslm_jax.checkpoint import checkpoint, integrity, metadata, provenance, run_dir
from lslm_jax.config import Config, loading, setting_flags
from lslm_jax.data.prepare import data_manifest
from lslm_jax.data.tokenizers import special_tokens
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import CheckpointRefused, ConfigError, InputMissing
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io

_SHOWN = 12  # characters of a sha256 in messages
# Settings by which a complete run's metrics do not change.
_WITHOUT_EFFECT = (
    *(key for key in setting_flags.COMPUTE if key not in ("model.dtype", "model.max_length")),
    "model.remat",
    "mesh",
    "log",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "data.dir",
    "data.verify",
    "data.data_dir",
    "data.shard_tokens",
    "train.accumulate",
    "train.loss_chunk",
    "train.watchdog",
    "train.check_copies",
    "optimizer.offload",
    "eval.every",
    "train.epochs",  # which train.steps was made of
)


class Run(NamedTuple):
    """A run that a command reads.

    Attributes:
      workdir: the run directory.
      data_dir: directory of the prepared data, with the tokenizer.
      config: resolved, with the settings of the command line.
      facts: the manifest of the prepared data, with `special`.
      step: of the checkpoint to use.
    """

    workdir: epath.Path
    data_dir: epath.Path
    config: Config
    facts: dict[str, Any]
    step: int


def open_run(config: Config, flags: argparse.Namespace) -> Run:
    """Opens a run to evaluate it, to generate with it or to export it, after comparing all that must agree.

    Nothing is written, and the directory need not be writable.

    Args:
      config: of the command, unresolved.
      flags: `workdir`, `step`, `best` and `files` are read, and `settings`, the keys that the command line sets.

    Raises:
      InputMissing: there is no such run, checkpoint or data.
      CheckpointRefused: the checkpoint was made with another tokenizer, other data, labels, chat template or model.
      ConfigError: the data were prepared with other settings.
    """
    workdir = run_dir.workdir(flags.workdir, reads=True)
    directory = workdir / "checkpoints"
    open_step = lambda step: _open_step(config, flags, workdir, step)
    if flags.step is None and not flags.best:  # a training run may delete the latest checkpoint meanwhile
        return checkpoint.load_latest(directory, open_step)[0]
    return open_step(find_step(config, directory, flags.step, flags.best))


def _open_step(config: Config, flags: argparse.Namespace, workdir: epath.Path, step: int) -> Run:
    """Compares the checkpoint of a step with data, tokenizer and settings of the command."""
    directory, data_dir = workdir / "checkpoints" / str(step), run_dir.data_dir(config, workdir)
    facts = run_dir.read_manifest(config, data_dir)
    saved = metadata.read(directory)
    check_tokenizer(saved, facts, data_dir, directory)
    resolved, facts = special_tokens.resolve(config, facts)
    provenance.check_inputs(directory, resolved)
    check_data(saved, config, facts, data_dir, workdir, step)
    if not flags.files:
        _check_prepared(config, facts, data_dir, workdir, flags)
    return Run(workdir, data_dir, resolved, facts, step)


def find_step(config: Config, directory: epath.Path, step: int | None, best: bool) -> int:
    """The step of the checkpoint that flags name: that step, the best one, or the latest.

    Raises:
      InputMissing: there is no checkpoint of that step.
      CheckpointRefused: there is none at all, or none was saved with the metric of checkpoint.best.
      ConfigError: checkpoint.best is empty.
    """
    if step is not None:
        if step not in (steps := checkpoint.list_steps(directory)):
            raise InputMissing(f"no checkpoint of step {step} in {directory}; there are {steps}")
        return step
    if not best:
        return checkpoint.latest_step(directory)
    if not config.checkpoint.best:
        raise ConfigError("--best needs checkpoint.best, the metric to go by")
    return checkpoint.best_step(directory, config.checkpoint.best)


def check_tokenizer(
    saved: Mapping[str, Any], facts: Mapping[str, Any], data_dir: epath.Path, directory: epath.Path
) -> None:
    """Compares the tokenizer of prepared data, the file itself, with the one that a checkpoint was trained with.

    Raises:
      CheckpointRefused: it is another one.
    """
    entry = facts["tokenizer"]
    found = [entry["sha256"]]
    if entry.get("file"):
        found.append(load_tokenizer(data_dir / entry["file"]).sha256)
    for sha256 in found:
        if sha256 != saved["tokenizer_sha256"]:
            raise CheckpointRefused(
                f"{directory} was trained with another tokenizer ({saved['tokenizer_sha256'][:_SHOWN]}) than the one "
                f"in {data_dir} ({sha256[:_SHOWN]}): use the data directory of the run"
            )


def check_data(
    saved: Mapping[str, Any],
    config: Config,
    facts: Mapping[str, Any],
    data_dir: epath.Path,
    workdir: epath.Path,
    step: int | None = None,
) -> None:
    """Compares prepared data with those that a checkpoint was trained on.

    Data in the directory of the run must be the very same. Other data, which `data.dir` names on the command line, must
    have the same labels and the same chat template.

    Raises:
      CheckpointRefused: they are not.
    """
    directory = workdir / "checkpoints" / str(step) if step is not None else workdir
    own_dir = _own_data_dir(workdir)
    if own_dir is None or data_dir == own_dir:
        if facts["sha256"] != saved["data_sha256"]:
            raise CheckpointRefused(
                f"{directory} was trained on other data ({saved['data_sha256'][:_SHOWN]}) than those in {data_dir} "
                f"({facts['sha256'][:_SHOWN]}): put the former back; `evaluate --files=FILE` scores other examples"
            )
        return
    if facts["sha256"] == saved["data_sha256"]:
        return
    labels = saved.get("data_facts", {}).get("labels")  # which older checkpoints lack
    if labels is not None and list(labels) != list(facts.get("labels") or ()):
        raise CheckpointRefused(
            f"{directory} was trained with the labels {_listed(labels)}; {data_dir} has {_listed(facts['labels'])}"
        )
    if not (own_dir / "manifest.json").exists():
        return
    own = run_dir.read_manifest(config, own_dir)
    template = lambda manifest: manifest["chat"]["sha256"] if "chat" in manifest else None
    for what, mine, theirs in (
        ("labels", own["labels"], facts["labels"]),
        ("chat template", template(own), template(facts)),
    ):
        if mine != theirs:
            raise CheckpointRefused(f"{directory} was trained with the {what} in {own_dir}; {data_dir} has others")


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN]) + ", ..." * (len(labels) > _SHOWN) or "none"


def _own_data_dir(workdir: epath.Path) -> epath.Path | None:
    """The data directory that a run was trained on; None where the run has no config.json."""
    path = workdir / "config.json"
    return run_dir.data_dir(loading.load(str(path)), workdir) if path.exists() else None


def _check_prepared(
    config: Config, facts: dict[str, Any], data_dir: epath.Path, workdir: epath.Path, flags: argparse.Namespace
) -> None:
    """Compares the settings of the command with those that the run's own data were prepared with.

    Raises:
      ConfigError: another value than the one that the data have, which the command would ignore.
    """
    if config.data.source in ("synthetic", "shards") and not config.data.mixture:
        return
    if data_dir != _own_data_dir(workdir) or "settings" not in facts or flags.chat:
        return
    own = loading.load(f"{workdir}/config.json")
    # Some of them are effective as they are: the prefix of a prompt, say.
    for key in flags.settings:
        if key.startswith("data.") and setting_flags.is_below(key, setting_flags.EFFECTIVE[flags.verb]):
            config = loading.with_value(config, key, setting_flags.value_of(own, key))
    remedy = "leave it out" if flags.verb != "evaluate" else "to evaluate on other examples use --files=FILE"
    data_manifest.check_settings(facts, config, data_manifest.named_sources(config), data_dir, remedy)


def check_finished(config: Config, workdir: epath.Path, finished: Mapping[str, Any], data_dir: epath.Path) -> list[str]:
    """Compares what `train` is asked for with a complete run, whose result must not be taken for another one's.

    Args:
      config: of the command, unresolved.
      workdir: of the complete run.
      finished: its result.
      data_dir: that the command names.

    Returns:
      Changed settings by which the result does not change, as text.

    Raises:
      CheckpointRefused: a setting, the tokenizer or the data differ, so that the result would be another one.
      ConfigError, DataError: the data directory was prepared with other settings, or its input has changed.
    """
    made_with = _config_of(workdir)
    if made_with is None:  # of a run that is complete, little may be left
        return []
    own_dir = _own_data_dir(workdir) or run_dir.data_dir(config, workdir)
    prepared = config.data.source == "synthetic" and not config.data.mixture
    if (data_dir / "manifest.json").exists():
        prepared = True
        if config.data.source != "shards" or config.data.mixture:
            record = data_manifest.read(data_dir / "manifest.json")
            assert record is not None
            data_manifest.check(record, config, data_manifest.named_sources(config), data_dir, finished=True)
    elif data_dir != own_dir:
        raise CheckpointRefused(
            f"{workdir} is complete and was trained on the data in {own_dir}, not {data_dir}: use another --workdir"
        )
    if prepared:
        facts = run_dir.read_manifest(config, data_dir)
        for directory in _checkpoints(workdir)[-1:]:
            saved = metadata.read(directory)
            check_tokenizer(saved, facts, data_dir, directory)
            if saved["data_sha256"] != facts["sha256"]:
                raise CheckpointRefused(
                    f"{workdir} is complete and was trained on other data ({saved['data_sha256'][:_SHOWN]}, now "
                    f"{facts['sha256'][:_SHOWN]}): use another --workdir, or put the former back"
                )
        config, _ = special_tokens.resolve(config, facts)
    harmless = _WITHOUT_EFFECT + ("tokenizer.path",) * prepared  # its content was compared
    return _harmless_changes(config, made_with, workdir, finished, harmless)


def _config_of(workdir: epath.Path) -> dict[str, Any] | None:
    """The config that a run was started with, from its latest checkpoint if config.json is gone; None for neither."""
    path = workdir / "config.json"
    if path.exists():
        return atomic_io.read_json(path)
    saved = _checkpoints(workdir)[-1:]
    return metadata.read(saved[0])["config"] if saved else None


def _harmless_changes(
    config: Config,
    made_with: Mapping[str, Any],
    workdir: epath.Path,
    finished: Mapping[str, Any],
    harmless: Sequence[str],
) -> list[str]:
    """Changed settings that leave the result as it is; a CheckpointRefused where one does not."""
    found, now = [], loading.to_dict(config)
    derived = [key for key in ("model.vocab_size", "model.num_labels") if not setting_flags.value_of(config, key)]
    changes = [change for change in provenance.changes(made_with, now) if change[0] not in derived]
    for key, old, new in changes:
        if key == "train.steps" and finished["step"] == new:
            continue
        if provenance.is_fixed(key):
            raise CheckpointRefused(f"{workdir} was made with {key}={old}, the config says {new}")
        if not setting_flags.is_below(key, harmless):
            raise CheckpointRefused(
                f"{workdir} is complete and was made with {key}={json.dumps(old)}, the config says {json.dumps(new)}: "
                "use another --workdir, or raise train.steps to train on"
            )
        found.append(f"{key} {old} -> {new}")
    return found


def _checkpoints(workdir: epath.Path) -> list[epath.Path]:
    """The directories of all finished checkpoints of a run, by step."""
    directory = workdir / "checkpoints"
    return [directory / str(step) for step in integrity.list_steps(directory)]


def check_files(workdir: epath.Path, config: Config, checkpoints: Sequence[epath.Path] | None = None) -> None:
    """Compares config.json, tokenizer and data of a run, or of a copy of one, with its checkpoints.

    For `verify` and `audit`.

    Args:
      workdir: of the run.
      config: names the data directory.
      checkpoints: to compare; None: all that were finished.

    Raises:
      CheckpointRefused: one was made with another model, tokenizer or other data.
      DataError: the data manifest was altered.
    """
    checkpoints = _checkpoints(workdir) if checkpoints is None else checkpoints
    metadata_by_path = {}
    for directory in checkpoints:
        try:
            metadata_by_path[directory] = metadata.read(directory)
        except CheckpointRefused:
            if integrity.has_manifest(directory):  # else a running training has deleted it meanwhile
                raise
    if (path := workdir / "config.json").exists():
        own = loading.to_dict(loading.load(str(path)))
        for directory, saved in metadata_by_path.items():
            for key, old, new in provenance.changes(saved["config"], own):
                if provenance.is_fixed(key):
                    raise CheckpointRefused(f"{directory} was made with {key}={old}, {path} says {new}")
    data_dir = run_dir.data_dir(config, workdir)
    if not (data_dir / "manifest.json").exists():
        return
    facts = run_dir.read_manifest(config, data_dir)
    for directory, saved in metadata_by_path.items():
        if facts["sha256"] == saved["data_sha256"]:
            metadata.check_manifest_sha256(directory, saved, metadata.manifest_sha256(facts))
        check_tokenizer(saved, facts, data_dir, directory)
        check_data(saved, config, facts, data_dir, workdir, int(directory.name))


def check_shared(workdir: epath.Path, seconds: float = 30.0) -> None:
    """Checks that all processes of a run see the same directory: hosts may each have their own of that name.

    Args:
      workdir: of the run.
      seconds: to wait for a file that process 0 has written; network file systems show it late.

    Raises:
      ConfigError: on all processes, where one sees another directory.
    """
    if jax.process_count() == 1 or atomic_io.is_remote(workdir):
        return
    name = multihost.by_primary("shared", lambda: _write_probe(workdir))
    try:
        end = time.monotonic() + seconds
        while not (is_there := name in os.listdir(workdir)) and time.monotonic() < end:
            time.sleep(0.1)
        what = {f"a --workdir={workdir} that process 0 can write to": is_there}
        multihost.check_equal("shared", what, remedy="put it on a file system that all hosts share")
    finally:
        if multihost.is_primary():
            (workdir / name).unlink(missing_ok=True)


def _write_probe(workdir: epath.Path) -> str:
    """Writes an empty file; returns its name."""
    name = f".shared-{secrets.token_hex(8)}"
    atomic_io.write(workdir / name, b"")
    return name
