"""Numeric health: a budget of skipped updates, in a row and over a window, and a loss that diverges finitely."""

import math
from dataclasses import replace

import pytest

from lslm_jax.config import Config, ModelConfig, TaskConfig
from lslm_jax.errors import NumericAbort
from lslm_jax.resilience.health import DIVERGED_STEPS, Health, uniform_loss

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


@pytest.mark.parametrize(("objective", "expected"), [("causal", 100), ("classification", 3), ("regression", None)])
def test_a_uniform_guess_is_that_of_the_targets(objective, expected):
    config = replace(CONFIG, task=TaskConfig(objective=objective), model=replace(CONFIG.model, num_labels=3))
    assert uniform_loss(config) == (None if expected is None else math.log(expected))
