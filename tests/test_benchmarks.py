"""The benchmarks run, and print the figures that they promise; timings need a quiet machine."""

import json
import os
import pathlib
import runpy
import sys

import forked
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
# As on a GPU machine with jax and little else. Importing TensorFlow takes 8 CPU seconds.
SITECUSTOMIZE = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
absent = lambda name, *rest: None if name.partition(".")[0] in {"tensorflow", "clu"} else find_spec(name, *rest)
PathFinder.find_spec = staticmethod(absent)
"""
SMALL = [
    *("--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.num_heads=2"),
    *("--config.model.vocab_size=256", "--config.tokenizer.vocab_size=256"),
    *("--config.data.seq_len=32", "--config.train.batch_size=2"),
]


def run_script(script: str, flags: list[str]) -> None:
    runpy.run_path(f"{os.environ['PYTHONPATH']}/sitecustomize.py")
    sys.path.insert(0, str(BENCHMARKS))
    path = str(BENCHMARKS / f"{script}.py")
    sys.argv = [path, *flags]
    runpy.run_path(path)["main"]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sitecustomize",
    [SITECUSTOMIZE, pytest.param("", marks=pytest.mark.exhaustive)],
    ids=["few packages", "all packages"],
)
@pytest.mark.parametrize(
    ("script", "flags", "figures"),
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
        pytest.param("start", [*SMALL, "--rounds=1", "--steps=2"], {"cold", "warm"}, marks=pytest.mark.exhaustive),
        pytest.param(
            "loop",
            [
                *("--rounds=1", "--steps=6", "--skip=2"),
                *("--num_layers=1", "--d_model=32", "--vocab_size=256", "--seq_len=32"),
            ],
            {"bare_ms", "trainer_ms", "overhead"},
            marks=pytest.mark.exhaustive,
        ),
        ("input", ["--tokens=2000000", "--seconds=0.1"], {"tokens_per_second", "first_batch_seconds", "fill"}),
    ],
)
def test_a_benchmark_prints_its_figures(script, flags, figures, sitecustomize, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(sitecustomize)
    env = os.environ | {"XLA_FLAGS": forked.xla_flags(), "PYTHONPATH": str(tmp_path)}
    process = forked.Process(run_script, script, flags, env=env)
    process.wait(timeout=250)
    assert process.returncode == 0, process.stderr
    assert figures <= json.loads(process.stdout.splitlines()[-1]).keys()
