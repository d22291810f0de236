"""What one run has compiled the next one beside it finds, unless others could have put it there."""

import json
import os

import forked
import jax
import pytest

from lslm_jax import compile_cache

RUN = {
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 4, "max_length": 32},
    "tokenizer": {"vocab_size": 64},
    "data": {"source": "synthetic", "seq_len": 32},
    "train": {"steps": 3, "batch_size": 8},
    "log": {"every": 1, "timing": False, "tensorboard": False},
}


@pytest.mark.slow
def test_a_second_run_compiles_nothing_and_is_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    # The server of forked processes has imported jax with the setting of the tests, which an empty one takes back.
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = []
    for run in ("one", "two"):
        done = forked.run("--config=config.json", f"--workdir=runs/{run}", env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "ache" not in done.stderr
        (kind,) = (tmp_path / "runs" / compile_cache.NAME).iterdir()
        found.append({path.name for path in kind.iterdir()})
    assert any(name.startswith("jit_train_step") for name in found[0]), found
    assert found[0] == found[1]
    records = [(tmp_path / "runs" / run / "metrics.jsonl").read_bytes() for run in ("one", "two")]
    assert records[0] == records[1]


@pytest.fixture
def named():
    """JAX's own setting, which is put back."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda directory: jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("mode", "mine", "expected"),
    [(0o755, None, "runs/.xla_cache"), (0o755, "elsewhere", "elsewhere"), (0o777, None, None), (0o1777, None, None)],
)
def test_programs_are_taken_from_where_the_user_says_or_only_the_user_can_write(named, tmp_path, mode, mine, expected):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(mode)
    named(mine)
    compile_cache.keep(str(tmp_path / "runs" / "one"))
    found = jax.config.jax_compilation_cache_dir
    assert found == expected if mine or expected is None else found.startswith(f"{tmp_path}/{expected}/")


def test_a_place_to_be_made_and_one_in_a_bucket_will_do(named, tmp_path):
    for workdir, expected in (
        (str(tmp_path / "new" / "one"), tmp_path / "new"),
        ("gs://mine/runs/one", "gs://mine/runs"),
    ):
        named(None)
        compile_cache.keep(workdir)
        assert jax.config.jax_compilation_cache_dir.startswith(f"{expected}/.xla_cache/")
