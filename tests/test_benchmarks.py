"""The benchmarks run, and say what they promise; how fast is for a quiet machine to tell."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.num_heads=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        (
            "train_step",
            [*SMALL, "--windows=1", "--steps=1"],
            {"step_ms", "dispatch_ms", "tokens_per_second", "compile_seconds", "compiler"},
        ),
        (
            "attention",
            ["--batch_size=1", "--seq_len=64", "--steps=1", "--xla", "packed 8"],
            {"ms", "tflops", "error", "alone"},
        ),
        ("decode", [*SMALL, "--rounds=1", "--tokens=8", "--batch_sizes=2"], {"first_token_ms", "tokens_per_second"}),
        ("checkpoint", [*SMALL, "--rounds=1"], {"blocking", "total", "restore", "per_gib"}),
        ("start", [*SMALL, "--rounds=1", "--steps=2"], {"cold", "warm"}),
        ("loop", ["--rounds=1", "--steps=6", "--skip=2", "--d_model=32"], {"bare_ms", "trainer_ms", "overhead"}),
        ("input", ["--tokens=2000000", "--seconds=1"], {"tokens_per_second", "first_batch_seconds", "fill"}),
    ],
)
def test_a_benchmark_tells_its_figures(script, flags, told):
    environ = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, BENCHMARKS / f"{script}.py", *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert told <= json.loads(done.stdout.splitlines()[-1]).keys()
