"""The length of training: steps, or epochs over the prepared rows, and how many rows and steps one epoch has."""

import contextlib
import math
from dataclasses import replace
from typing import Any

from etils import epath

from lslm_jax.checkpoint import run_dir
from lslm_jax.config import Config
from lslm_jax.data import dataloader
from lslm_jax.errors import ConfigError, InputMissing


def resolve(config: Config, data: Any) -> Config:
    """The config with `train.steps` for its `train.epochs`, the last step included that an epoch ends in.

    Args:
      config: resolved.
      data: training rows; all sources of a mixture together are one epoch.
    """
    if not config.train.epochs:
        return config
    steps = max(1, math.ceil(config.train.epochs * data.num_rows / config.train.batch_size))
    return replace(config, train=replace(config.train, steps=steps))


def resolve_prepared(config: Config, data_dir: epath.Path) -> Config | None:
    """Result of `resolve` for data that are prepared already; None where they are needed and are not."""
    if not config.train.epochs:
        return config
    if not (data_dir / "manifest.json").exists():
        return None
    resolved, _ = run_dir.by_data(config, data_dir)
    data = dataloader.open_train(resolved, data_dir, resolved.model.vocab_size)
    return replace(config, train=replace(config.train, steps=resolve(resolved, data).train.steps))


def describe(config: Config, data: Any) -> str:
    """Rows of an epoch and the epochs of the run, for a person; empty where data have no end."""
    if not data.num_rows:
        return ""
    steps, epochs = data.num_rows / config.train.batch_size, data.epoch(config.train.steps)
    total = f"{config.train.steps:,} steps are {epochs:.3g} epochs"
    return f"{data.num_rows:,} rows per epoch ({steps:,.1f} steps); {total}"


def of_prepared(config: Config, data_dir: epath.Path) -> dict[str, Any]:
    """`rows_per_epoch` and `steps_per_epoch` of prepared data; nothing where a run could not be trained on them."""
    with contextlib.suppress(ConfigError, InputMissing):
        resolved, _ = run_dir.by_data(config, data_dir)
        data = dataloader.open_train(resolved, data_dir, resolved.model.vocab_size)
        if data.num_rows:
            return {"rows_per_epoch": data.num_rows, "steps_per_epoch": data.num_rows / config.train.batch_size}
    return {}
