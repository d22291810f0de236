"""`verify` tells a run's damaged files, on a machine that need not be able to train it."""

import json
import os
import random
import shutil
import socket

import forked
import pytest

pytestmark = pytest.mark.slow

CONFIG = """
from lslm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, d_model=32, num_heads=4, max_length=32),
        data=DataConfig(files=("text.txt",), seq_len=32),
        tokenizer=TokenizerConfig(kind="bytes"),
        train=TrainConfig(steps=4, batch_size=8),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(tensorboard=False),
    )
"""


def lslm(directory, *arguments):
    return forked.run(*arguments, cwd=directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify")
    (directory / "config.py").write_text(CONFIG)
    (directory / "text.txt").write_text("to be or not to be\n" * 200)
    trained = lslm(directory, "--config=config.py", "--workdir=run")
    assert trained.returncode == 0, trained.stderr
    return directory / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def test_a_copy_of_a_run_is_whole(copy):
    told = lslm(copy.parent, "verify", "--workdir=copy")
    assert told.returncode == 0, told.stderr
    size = sum(path.stat().st_size for path in copy.glob("data/*/*") if path.name != "manifest.json")
    assert json.loads(told.stdout) == {"checkpoints": [2, 4], "data_bytes": size}
    assert told.stderr.count(" is whole") == 3 and "warning" not in told.stderr
    record = copy / "metrics.jsonl"
    record.write_text(record.read_text().replace('"loss": ', '"loss": 1', 1))
    told = lslm(copy.parent, "verify", "--workdir=copy")
    assert (
        told.returncode == 0 and "metrics.jsonl is not the record that copy/checkpoints/4 was saved with" in told.stderr
    )


def test_a_flipped_bit_anywhere_is_found_and_named(copy):
    """In a sample of places in every file: arrays, metadata, manifests, shards."""
    from etils import epath

    from lslm_jax.cli.verify import verify
    from lslm_jax.errors import LslmError

    rng = random.Random(0)
    files = [path for path in [*copy.glob("checkpoints/**/*"), *copy.glob("data/*/*")] if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    assert len(files) > 20
    for path in files:
        place = rng.randrange(path.stat().st_size)
        flip(path, place)
        with pytest.raises(LslmError) as error:
            verify(epath.Path(copy))
            pytest.fail(f"{path}: bit {place} went unnoticed")
        named = path.parent if path.name == "manifest.json" else path
        assert error.value.exit_code in (65, 76) and str(named) in str(error.value)
        flip(path, place)
    verify(epath.Path(copy))


def test_a_checkpoint_that_a_running_training_saves_is_no_damage(copy):
    (copy / "checkpoints" / "4" / "manifest.json").unlink()
    told = lslm(copy.parent, "verify", "--workdir=copy")  # the lock file is that of a process which has ended
    assert told.returncode == 76 and "4 has no manifest.json: it was never finished" in told.stderr
    own = {"host": socket.gethostname(), "pid": os.getpid(), "pids": os.readlink("/proc/self/ns/pid")}
    (copy / "lock").write_text(json.dumps(own | {"started": "now"}))
    (copy / "checkpoints" / "4").touch()
    told = lslm(copy.parent, "verify", "--workdir=copy")
    assert told.returncode == 0 and json.loads(told.stdout)["checkpoints"] == [2], told.stderr
    assert "checkpoints/4 is being saved or deleted by a running training: it is not verified" in told.stderr
    for path in (copy / "checkpoints" / "4", *(copy / "checkpoints" / "4").rglob("*")):
        os.utime(path, (1, 1))
    assert lslm(copy.parent, "verify", "--workdir=copy").returncode == 76  # nobody writes to it


@pytest.mark.parametrize(("pattern", "code"), [("checkpoints/4/model/**/d/*", 76), ("data/train/tokens*", 65)])
def test_damage_has_its_exit_code(copy, pattern, code):
    path = max((path for path in copy.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)
    flip(path, path.stat().st_size // 2)
    told = lslm(copy.parent, "verify", "--workdir=copy")
    assert (
        told.returncode == code and f"{path.name} " in told.stderr and told.stderr.splitlines()[-1].startswith("lslm")
    )


def test_a_run_does_not_begin_on_damaged_shards(run, copy):
    for name in ("config.py", "text.txt"):
        shutil.copy(run.parent / name, copy.parent)
    (copy / "result.json").unlink()
    flip(copy / "data" / "train" / "tokens-00000.bin", 1000)
    refused = lslm(copy.parent, "--config=config.py", "--workdir=copy", "--config.train.steps=6")
    assert refused.returncode == 65 and "tokens-00000.bin was altered" in refused.stderr
    unread = ["--config.train.steps=6", "--config.data.verify=false"]
    assert lslm(copy.parent, "--config=config.py", "--workdir=copy", *unread).returncode == 0


def test_where_there_is_nothing_it_says_so(tmp_path):
    told = lslm(tmp_path, "verify", "--workdir=.")
    assert told.returncode == 66 and told.stderr == "lslm: . holds neither checkpoints nor data\n"
    assert lslm(tmp_path, "verify").returncode == 2
