"""The settings of the command line, `--config.KEY=VALUE`, and which of them have an effect on a command.

A command that reads a run takes most settings from the run: what it was trained with, and what its data were prepared
with. A setting that such a command would ignore is rejected, with the way to get what it asks for.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lslm_jax.config import Config, Source, loading
from lslm_jax.errors import ConfigError

PREFIX = "--config."
READERS = ("evaluate", "generate", "export", "audit")

# Settings of the model that change how it is computed, but neither its weights nor their meaning.
COMPUTE = (
    "model.attention",
    "model.scan_layers",
    "model.microbatches",
    "model.pipeline_rounds",
    "model.dtype",
    "model.max_length",
)
# Settings of the model that matter to training alone.
_TRAINING_ONLY = ("model.remat", "model.dropout")
_RUNNING = (*COMPUTE, "mesh", "train.batch_size", "train.loss_chunk", "train.loss_logits", "train.watchdog", "data.dir")
_ROWS = ("data.seq_len", "data.source_len", "data.packing", "data.mask_documents", "task", "generate")
_FORMAT = ("data.text_key", "data.target_key", "data.label_key", "data.document", "data.prefix", "data.max_documents")

EFFECTIVE = {
    "evaluate": (*_RUNNING, *_ROWS, "eval.batches", "checkpoint.best"),
    "generate": (*_RUNNING, *_ROWS, "seed", "checkpoint.best", "data.prefix", "data.text_key", "data.target_key"),
    "export": (*_RUNNING, "generate", "checkpoint.best"),
    "audit": (
        "seed",
        "train.batch_size",
        "data.dir",
        "data.seq_len",
        "data.source_len",
        "data.packing",
        "data.mask_documents",
        "task",
        "mesh",
    ),
}
# Objectives for which a setting has an effect, where it has none for the others.
_OBJECTIVES = {
    "task.mask_rate": ("masked", "span_corruption"),
    "task.whole_words": ("masked",),
    "task.span_length": ("span_corruption",),
    "task.stride": ("qa",),
    "task.max_answer": ("qa",),
}
_WRITING = {"evaluate": ("seq2seq",), "generate": ("causal", "seq2seq")}  # objectives that read section `generate`
# What else `evaluate --files` takes: how files are read and cleaned.
ON_FILES = (*_FORMAT, "clean")

_SECTIONS = {
    "train": "train",
    "optimizer": "train",
    "checkpoint": "train",
    "log": "train",
    "eval": "train and evaluate",
    "generate": "evaluate and generate",
    "seed": "train",
    "model": "train",
}


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of a command line, and the rest of it."""
    settings = [word for word in argv if word.startswith(PREFIX)]
    return settings, [word for word in argv if not word.startswith(PREFIX)]


def assignments(settings: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and the texts of their values.

    Raises:
      ConfigError: a setting has no value.
    """
    found = []
    for setting in settings:
        key, equals, text = setting.removeprefix(PREFIX).partition("=")
        if not equals:
            raise ConfigError(f"{setting} has no value: write {setting}=VALUE")
        found.append((key, text))
    return found


def require_none(settings: Sequence[str], command: str) -> None:
    """Raises a ConfigError where a command that reads no settings is given one."""
    if settings:
        raise ConfigError(f"{settings[0].partition('=')[0]} has no effect on {command}: it reads no settings")


def is_below(key: str, prefixes: Sequence[str]) -> bool:
    """True if a key is one of these, or lies in one of these sections."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_effect(flags: argparse.Namespace, config: Config, own: Config) -> None:
    """Compares the settings of the command line with those that a command takes from its run.

    Settings that the weights depend on pass: they are compared with those of the checkpoint.

    Args:
      flags: of the command line, with the keys that it sets as `settings`.
      config: with these settings.
      own: the config of the run.

    Raises:
      ConfigError: a setting would be ignored.
    """
    command = flags.verb
    effective = EFFECTIVE[command] + (ON_FILES if getattr(flags, "files", None) else ())
    effective += ("data.chat_template",) if flags.chat else ()
    for key in flags.settings:
        trained_with = is_below(key, ("model", "task.objective")) and not is_below(key, (*COMPUTE, *_TRAINING_ONLY))
        if trained_with and command != "audit":
            continue
        if (new := value_of(config, key)) == (old := value_of(own, key)):
            continue
        if is_below(key, effective):
            _check_objective(flags, config, key)
            continue
        raise ConfigError(_ignored(flags, key, old, new))


def _check_objective(flags: argparse.Namespace, config: Config, key: str) -> None:
    """Rejects a setting that has an effect only where the model learned another kind of task."""
    objectives = _WRITING.get(flags.verb) if is_below(key, ("generate",)) else _OBJECTIVES.get(key)
    if objectives and config.task.objective not in objectives and not getattr(flags, "harness", None):
        raise ConfigError(
            f"{PREFIX}{key} has no effect on {flags.verb}: it is for task.objective={' or '.join(objectives)}, not "
            f"{config.task.objective}"
        )


def take_held_out_files(
    flags: argparse.Namespace, assignments: Sequence[tuple[str, str]], own: Config
) -> list[tuple[str, str]]:
    """Makes files that `data.valid_files` or `data.test_files` name for `evaluate` its `--files`.

    Args:
      flags: of the command line; `files` is set.
      assignments: its settings.
      own: the config of the run: files that its data were prepared from stand for their split, which is set.

    Returns:
      The other settings.

    Raises:
      ConfigError: files are named twice, or a split beside them.
    """
    keys = ("data.valid_files", "data.test_files")
    named = {key: loading.items(text, paths=True) for key, text in assignments if key in keys}
    changed = {key: files for key, files in named.items() if files and tuple(files) != value_of(own, key)}
    if not changed and not flags.files and [key for key, files in named.items() if files] == ["data.test_files"]:
        flags.split = flags.split or "test"
    for key, files in changed.items():
        if flags.files:
            raise ConfigError("name the files to evaluate on once, by --files=FILE")
        if flags.split and not key.startswith(f"data.{flags.split}"):
            raise ConfigError(f"{PREFIX}{key} has no effect on --split={flags.split}: use --files=FILE")
        flags.files, flags.split = list(files), None
    return [(key, text) for key, text in assignments if key not in changed]


def check_mixture(settings: Sequence[str], config: Config) -> None:
    """Rejects settings of the single source where a mixture takes its place.

    Raises:
      ConfigError: one of the keys would be ignored.
    """
    names = {field.name for field in dataclasses.fields(Source)}
    for key in settings if config.data.mixture else ():
        if key.startswith("data.") and key.removeprefix("data.") in names:
            sources = ", ".join(source.name for source in config.data.mixture)
            raise ConfigError(
                f"{PREFIX}{key} has no effect on a mixture: set it for each source of data.mixture "
                f"({sources}) in the config file"
            )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _ignored(flags: argparse.Namespace, key: str, old: Any, new: Any) -> str:
    section = key.partition(".")[0]
    start = f"--config.{key} has no effect on {flags.verb}"
    if key.startswith("eval.") and key != "eval.batches":
        return f"{start}: it is a setting of train"
    if section not in ("data", "clean", "tokenizer"):
        return f"{start}: it is a setting of {_SECTIONS.get(section, 'train')}"
    was = f"the data of {flags.workdir} were prepared with {json.dumps(old)}, not {json.dumps(new)}"
    if flags.verb == "evaluate" and section != "tokenizer":
        return f"{start}: {was}; to evaluate on other examples use --files=FILE"
    return f"{start}: {was}"
