"""A run whose newest checkpoint is damaged goes on from the one before, and ends as if nothing had been."""

import json
import os

import forked
import pytest

pytestmark = pytest.mark.slow

CONFIG = """
from lslm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, d_model=32, num_heads=4, max_length=32),
        data=DataConfig(source="synthetic", seq_len=32),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=97),
        train=TrainConfig(steps=9, batch_size=8),
        checkpoint=CheckpointConfig(every=3, keep=9),
        log=LogConfig(every=1, tensorboard=False, timing=False),
    )
"""


def run(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    env = os.environ | {"XLA_FLAGS": forked.xla_flags()}
    return forked.run(f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", env=env)


def damage(step_directory):
    """Flips a bit in the middle of the largest file."""
    path = max((path for path in step_directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path):
    checkpoints, record = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    assert run(tmp_path).returncode == 0
    whole = record.read_text()
    for step in (6, 9):
        damage(checkpoints / str(step))
    (tmp_path / "run" / "result.json").unlink()
    again = run(tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["step"] == 9, again.stderr
    assert "going back to step 3" in again.stderr and "resumed from step 3" in again.stderr
    assert record.read_text() == whole
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "run" / "damaged").iterdir()) == ["6", "9"]

    for path in checkpoints.iterdir():
        damage(path)
    (tmp_path / "run" / "result.json").unlink()
    lost = run(tmp_path)
    assert lost.returncode == 76 and lost.stderr.count("is damaged") == 3
    assert record.read_text() == whole
