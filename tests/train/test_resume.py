"""A run that is stopped and started again, by real signals, ends as the run that was left alone: bit for bit."""

import json
import os
import pathlib
import random
import signal
import time

import forked
import pytest
from error_table import assert_told

CORPUS = pathlib.Path(json.__file__).parent  # some real text that is always there


OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}


def command(workdir: pathlib.Path, family: str, steps: int, **settings: object) -> list[str]:
    model = {"family": family, "num_layers": 2, "d_model": 32, "num_heads": 4, "max_length": 32, "dropout": 0.1}
    config = {
        "model": model,
        "task": {"objective": OBJECTIVES[family]},
        "data": {
            "files": [f"{CORPUS}/*.py"],
            "valid_fraction": 0.3,
            "seq_len": 32,
            "dir": str(workdir.parent / "data"),
        },
        "tokenizer": {"kind": "bytes"},
        "train": {"steps": steps, "batch_size": 8, "ema": 0.9},
        "optimizer": {"warmup_steps": 10},
        "checkpoint": {"every": 20},
        "eval": {"every": 50, "batches": 2},
        "log": {"every": 1, "timing": False, "tensorboard": False},
    }
    path = workdir.parent / "config.json"
    path.write_text(json.dumps(config))
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return [f"--config={path}", f"--workdir={workdir}", *flags]


def environment(devices: int, cache: pathlib.Path, optimized: bool) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}" if optimized else forked.xla_flags(devices)
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | {"XLA_FLAGS": flags} | cached


def run_until(arguments: list[str], env: dict[str, str], metrics: pathlib.Path, step: int, number: int) -> None:
    """Starts the run, and ends it by a signal once it has recorded `step`."""
    process = forked.lslm(*arguments, env=env)
    deadline = time.monotonic() + 120
    while process.poll() is None and last_step(metrics) < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert_told("A signal to stop", process.returncode, stderr)
    else:
        assert process.returncode == -signal.SIGKILL, stderr


def last_step(metrics: pathlib.Path) -> int:
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "devices", "steps", "stops", "optimized"),
    [
        ("decoder", 4, 70, 1, False),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("decoder", 1, 200, 3, True),
                ("decoder", 8, 200, 3, False),
                ("encoder", 1, 70, 1, True),
                ("encoder_decoder", 1, 70, 1, False),
                ("encoder", 8, 70, 1, False),
                ("encoder_decoder", 1, 70, 1, True),
            )
        ),
    ],
)
def test_a_run_stopped_by_sigterm_and_by_sigkill_equals_the_uninterrupted_one_byte_for_byte(
    family, devices, steps, stops, optimized, tmp_path
):
    env, cache = environment(devices, tmp_path / "cache", optimized), tmp_path / "cache"
    mesh = {"mesh__data": devices // 4, "mesh__fsdp": 2, "mesh__tensor": 2} if devices > 1 else {}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = forked.run(*command(whole, family, steps, **mesh), env=env)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    expected = (whole / "metrics.jsonl").read_bytes()
    assert expected.count(b"\n") == steps + steps // 50 + bool(steps % 50)
    assert cache.exists()

    signals = [signal.SIGTERM, signal.SIGKILL] * stops
    places = sorted(random.Random(devices).sample(range(10, steps - 20), len(signals)))
    for step, number in zip(places, signals, strict=True):
        run_until(command(stopped, family, steps, **mesh), env, stopped / "metrics.jsonl", step, number)
    again = command(stopped, family, steps, **mesh)
    finished = forked.run(*again, env=env)
    assert finished.returncode == 0, finished.stderr
    assert "resumed from step" in finished.stderr
    assert (stopped / "metrics.jsonl").read_bytes() == expected
    audited = forked.run(*again, "audit", env=env)
    assert audited.returncode == 0, audited.stderr
    told = json.loads(audited.stdout)
    assert (told["steps"], told["skipped_steps"]) == (steps, [])
    assert 2 <= told["starts"] <= 2 * stops + 1  # one that a signal ended at once has read nothing
    assert json.loads(finished.stdout)["eval/loss"] == json.loads((whole / "result.json").read_text())["eval/loss"]
