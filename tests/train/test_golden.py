"""Checkpoints that each released version wrote load in this one, every array as it was, and training goes on from them.

tests/train/golden/VERSION is a run of four steps; its `arrays.json` holds the sha256 of the bytes of each array. A new
version adds one, with `python tests/train/test_golden.py CONFIG_OF_THE_NEWEST VERSION`, and never touches the others.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import forked
import jax
import numpy as np
import pytest
from etils import epath

from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import loading, validation
from lslm_jax.parallel.sharding import make_mesh, use
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state

GOLDEN = pathlib.Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir())


def arrays(workdir):
    """The sha256 of each array of the only checkpoint of a run."""
    config = validation.validate(loading.load(str(workdir / "config.json")))
    mesh = make_mesh(config, jax.devices()[:1])
    (saved,) = (workdir / "checkpoints").iterdir()
    made_by = json.loads((saved / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    with use(mesh, config.mesh):
        state = abstract_state(config, make_optimizer(config.optimizer, config.train.steps), mesh)
        run = Checkpoints(epath.Path(workdir), config.checkpoint, made_by)
        found = flatten(run.restore(int(saved.name), state, print))
        run.close()
    return {name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest() for name, array in found.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_array_is_as_it_was(version, tmp_path):
    workdir = pathlib.Path(shutil.copytree(GOLDEN / version, tmp_path / "run"))
    assert arrays(workdir) == json.loads((workdir / "arrays.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_training_goes_on(version, tmp_path):
    workdir = shutil.copytree(GOLDEN / version, tmp_path / "run")
    done = forked.run(f"--config={workdir}/config.json", f"--workdir={workdir}", "--config.train.steps=6")
    assert done.returncode == 0 and "resumed from step 4" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


if __name__ == "__main__":
    source, version = sys.argv[1:]
    subprocess.run(
        [sys.executable, "-m", "lslm_jax.main", f"--config={source}", f"--workdir={GOLDEN / version}"], check=True
    )
    (GOLDEN / version / "arrays.json").write_text(json.dumps(arrays(GOLDEN / version), indent=1))
