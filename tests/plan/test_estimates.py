"""What follows from a step: money, limits, parts of the model, and what binds."""

from dataclasses import replace

import pytest
from tiny_plans import CONFIG, CPU, compiled

from lslm_jax.config import ModelConfig
from lslm_jax.parallel.hardware_specs import DEVICES
from lslm_jax.plan import cost_model, text_report
from lslm_jax.plan.estimates import bounds, figures, run, share_seen


def test_a_run_takes_its_steps_and_costs_its_hours():
    found = run(steps=1000, tokens=4096, step_seconds=3.6, count=64, price=2.5)
    assert found == {
        "steps": 1000,
        "tokens": 4_096_000,
        "days": pytest.approx(1 / 24),
        "device_hours": pytest.approx(64.0),
        "dollars": pytest.approx(160.0),
    }
    assert run(1000, 4096, 3.6, 64, None)["dollars"] is None
    assert run(1000, 4096, None, 64, 2.5) == {
        "steps": 1000, "tokens": 4_096_000, "days": None, "device_hours": None, "dollars": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flops", "size", "sent", "by", "seconds"),
    [(989e12, 1e9, 0.1, "compute", 1.0), (1e12, 9.6e12, 0.1, "memory", 2.0), (1e12, 1e9, 3.0, "network", 3.0)],
)
def test_the_slowest_resource_binds(flops, size, sent, by, seconds):
    joined = [cost_model.Collective("all-gather", ("fsdp",), 8, 1, 1, sent, False, 0.0)]
    found = bounds(cost_model.Cost(flops, 0.0, int(size), 0, joined), DEVICES["H200"], 8 * 989e12, 1000, 8)
    assert found["bound"] == {
        "step_seconds": pytest.approx(seconds),
        "tokens_per_second": pytest.approx(1000 / seconds),
        "mfu": pytest.approx(1 / seconds),
        "by": by,
    }


def test_cycles_kernels_and_what_waits_add_up_to_what_a_tpu_is_expected_to_take():
    device = DEVICES["TPU v5"]
    joined = [cost_model.Collective("all-reduce", ("fsdp",), 64, 1, 1, 0.25, False, 0.25)]
    found = bounds(cost_model.Cost(459e12, 45.9e12, 0, int(1.75e9), joined), device, 459e12, 1, 1)
    assert found["expected_step_seconds"] == pytest.approx(1.0 + 0.1 + 0.25)
    assert found["expected_mfu"] == pytest.approx(1 / 1.35)


def test_every_parameter_belongs_to_one_part():
    counts = figures(compiled(fsdp=8), CPU, None, None)["parameters"]
    D, V, T, L = 64, 512, 32, 3
    assert counts == {
        "embeddings": V * D + T * D,
        "attention": 4 * L * D * D,
        "mlp": 8 * L * D * D,
        "norms": (2 * L + 1) * D,
        "head": V * D,
        "total": 2 * V * D + T * D + 12 * L * D * D + (2 * L + 1) * D,
        "trained": 2 * V * D + T * D + 12 * L * D * D + (2 * L + 1) * D,
    }


def test_a_checkpoint_holds_weights_and_both_moments():
    found = figures(compiled(fsdp=8), CPU, None, None)
    assert found["checkpoint_bytes"] == pytest.approx(12 * found["parameters"]["total"], abs=64)


def test_fits_is_the_need_against_the_limit():
    step, topology = compiled(fsdp=8), CPU
    needed = figures(step, topology, None, None)["memory"]["needed"]
    for limit, fits in ((needed, True), (needed - 1, False)):
        memory = figures(step, topology, limit, None)["memory"]
        assert memory["limit"] == limit and memory["fits"] is fits
    assert "1 B too much" in text_report.verdict(memory)
    assert figures(step, topology, None, None)["memory"]["fits"] is None  # a CPU does not say what it has


def test_a_model_has_its_own_share_of_rows_in_sight():
    seen = lambda **model: share_seen(replace(CONFIG, model=ModelConfig(**model)))
    assert seen(family="encoder") == 1.0
    assert seen() == pytest.approx(33 / 64)
    assert seen(window=1) == pytest.approx(1 / 32)
    assert seen(window=1, layer_types=("full", "window"), num_layers=2) == pytest.approx((33 / 64 + 1 / 32) / 2)
