"""Numeric health: a budget of skipped updates, in a row and over a window, and a loss that diverges finitely."""

import math
import types
from dataclasses import replace

import pytest

from lslm_jax.config import Config, LogConfig, ModelConfig, TaskConfig
from lslm_jax.errors import CheckpointRefused, NumericAbort
from lslm_jax.resilience.health import DIVERGED_STEPS, Health, uniform_loss
from lslm_jax.resilience.loss_spikes import Detector
from lslm_jax.train import setup
from lslm_jax.train.metrics_logging import Metrics

CONFIG = Config(model=ModelConfig(vocab_size=100))


def test_every_second_step_skipped_without_end_ends_the_run():
    health = Health(CONFIG)
    with pytest.raises(
        NumericAbort, match=r"^loss or gradient was not finite in 26 of the last 52 steps, up to step 52"
    ):
        for step in range(1, 1000):
            health.add(step, math.nan if step % 2 == 0 else 3.0, int(step % 2 == 0))
    assert health.summary()["skipped_steps"] == 26


def test_a_run_that_goes_on_counts_as_one_that_was_never_stopped():
    whole, parts = Health(CONFIG), Health(CONFIG)
    for step in range(1, 61):
        skipped = int(step % 3 == 0)
        for health in (whole, parts):
            health.add(step, 50.0, skipped)
        if step % 7 == 0:
            memory, parts = parts.memory, Health(CONFIG)
            parts.remember(memory)
    assert parts.memory == whole.memory and parts.summary() == whole.summary()
    assert whole.summary() == {"skipped_steps": 20, "diverged_since": 1}


def test_a_finite_divergence_is_reported_once_and_in_the_result():
    health, warnings = Health(CONFIG), []
    for step in range(1, 200):
        warnings.append(health.add(step, 4.6 if step < 100 else 88.0, 0))
    (warning,) = filter(None, warnings)
    assert warnings.index(warning) == 99 + DIVERGED_STEPS - 1 and "training has diverged" in warning
    assert health.summary() == {"skipped_steps": 0, "diverged_since": 100}
    health.add(200, 4.0, 0)
    assert health.summary() == {"skipped_steps": 0}


@pytest.mark.parametrize(
    "memory",
    [
        {"usual": 3},
        {"usual": "123"},
        {"usual": [None]},
        {"usual": [1.0, math.nan]},
        {"high_steps": [1, "x"]},
        {"high_steps": [math.inf]},
        {"high_steps": [10**400]},
        {"best": "low"},
        {"best": [1.0]},
        {"best": 1.0, "best_spread": {}},
        {"health": 3},
        {"health": {"recent": "01"}},
        {"health": {"skipped": None}},
        {"health": {"high": math.inf}},
        {"health": {"last": True}},
        {"metrics": 3},
        {"metrics": {"lines": 3}},
        {"metrics": {"sha256": "x", "lines": "3", "last": 0}},
    ],
)
def test_damaged_memory_of_the_monitors_is_refused(memory, tmp_path):
    inputs = types.SimpleNamespace(checkpoints=types.SimpleNamespace(memory=lambda step: memory))
    record = Metrics(str(tmp_path), LogConfig(tensorboard=False))
    with pytest.raises(CheckpointRefused, match=r"^the checkpoint of step 4 is damaged: its memory is unreadable: "):
        setup._remember(inputs, 4, Detector(6.0, 2), Health(CONFIG), record, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("objective", "expected"), [("causal", 100), ("classification", 3), ("regression", None)])
def test_a_uniform_guess_is_that_of_the_targets(objective, expected):
    config = replace(CONFIG, task=TaskConfig(objective=objective), model=replace(CONFIG.model, num_labels=3))
    assert uniform_loss(config) == (None if expected is None else math.log(expected))
