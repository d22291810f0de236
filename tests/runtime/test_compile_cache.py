"""What one run has compiled the next one beside it finds, unless others could have put it there."""

import json
import os
import stat

import forked
import jax
import pytest

from lslm_jax.runtime import compile_cache

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


@pytest.fixture
def private(tmp_path, monkeypatch):
    """The user's own place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return f"{tmp_path}/home/lslm_jax/xla/"


def keep(workdir):
    compile_cache.keep(str(workdir))
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_beside_the_runs_or_where_the_user_says(named, tmp_path, private):
    named(None)
    found = keep(tmp_path / "runs" / "one")
    assert found.startswith(f"{tmp_path}/runs/.xla_cache/") and stat.S_IMODE(os.stat(found).st_mode) == 0o700
    named("elsewhere")
    assert keep(tmp_path / "runs" / "one") == "elsewhere"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
@pytest.mark.parametrize("shared", ["runs", "runs/.xla_cache", "base"])
def test_where_others_can_write_nothing_is_kept_and_a_line_says_so(named, tmp_path, private, mode, shared, capsys):
    runs = tmp_path / "base" / "runs"
    (runs / ".xla_cache").mkdir(parents=True)
    chosen = tmp_path / "base" / shared if shared != "base" else tmp_path / "base"
    chosen.chmod(mode)
    named(None)
    found = keep(runs / "one")
    if shared == "base" and mode == 0o1777:  # as /tmp: nobody else can replace what lies in it
        assert found.startswith(f"{runs}/.xla_cache/")
        return
    assert found.startswith(private)
    assert capsys.readouterr().err.startswith(f"others can write to {chosen}: compiled programs are kept in {private}")


def test_a_place_that_a_link_leads_to_is_looked_at(named, tmp_path, private):
    shared, runs = tmp_path / "shared", tmp_path / "runs"
    for path in (shared, runs):
        path.mkdir()
    shared.chmod(0o777)
    (runs / ".xla_cache").symlink_to(shared)
    named(None)
    assert keep(runs / "one").startswith(private)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_what_belongs_to_another_user_is_not_used(named, tmp_path, private, capsys):
    cache = tmp_path / "runs" / ".xla_cache"
    cache.mkdir(parents=True)
    os.chown(cache, 12345, 12345)
    named(None)
    assert keep(tmp_path / "runs" / "one").startswith(private)
    assert capsys.readouterr().err.startswith(f"{cache} belongs to another user")


def test_a_place_to_be_made_and_one_in_a_bucket_will_do(named, tmp_path):
    for workdir, expected in (
        (str(tmp_path / "new" / "one"), tmp_path / "new"),
        ("gs://mine/runs/one", "gs://mine/runs"),
    ):
        named(None)
        compile_cache.keep(workdir)
        assert jax.config.jax_compilation_cache_dir.startswith(f"{expected}/.xla_cache/")
