"""Checkpoints: whole on any mesh, kept as told, and refused by name where they are damaged or another run's."""

import functools
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lslm_jax.checkpoint import checkpoint, provenance
from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import CheckpointConfig, Config, DataConfig, MixtureSource, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.errors import CheckpointRefused, DataError, InputMissing, NumericAbort, SaveError
from lslm_jax.parallel import heartbeat
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.runtime import pytree
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.restore_or_init import begin
from lslm_jax.train.train_state import abstract_model, abstract_state, survey

BASE = Config(
    model=ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=120, max_length=16),
    data=DataConfig(source="synthetic", seq_len=16),
    train=TrainConfig(steps=50, batch_size=16, ema=0.9),
)
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1)]  # data, fsdp, tensor


def changed(**sections):
    """A valid config with keys of its sections changed: changed(train={"ema": 0.0}, seed=1)."""
    new = {
        name: replace(getattr(BASE, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return validate(replace(BASE, **new))


CONFIG = changed()


def mesh_of(sizes=(1, 1, 1)):
    data, fsdp, tensor = sizes
    config = changed(mesh={"data": data, "fsdp": fsdp, "tensor": tensor})
    return make_mesh(config, jax.devices()[: math.prod(sizes)])


def abstract(config=CONFIG, mesh=None):
    return _abstract(config, mesh or mesh_of())


@functools.cache
def _abstract(config, mesh):
    return abstract_state(config, make_optimizer(config.optimizer, config.train.steps), mesh)


def state_at(step, config=CONFIG, mesh=None):
    """A state of random numbers, in every one of its arrays."""
    rng = np.random.default_rng(step)
    fill = lambda leaf: jax.device_put((100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)
    state = jax.tree.map(fill, abstract(config, mesh))
    return state._replace(step=jax.device_put(np.int32(step), state.step.sharding))


def opened(workdir, config=CONFIG, tokenizer="t" * 64, data="d" * 64, **settings):
    made_by = provenance.make(config, tokenizer, data, mesh_of())
    return Checkpoints(workdir, CheckpointConfig(**settings), made_by)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with one checkpoint, of step 7."""
    workdir = tmp_path_factory.mktemp("saved")
    run = opened(workdir)
    run.save(state_at(7), {"eval/loss": 1.5})
    run.close()
    return workdir


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it, to be spoilt."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(workdir, config=CONFIG, **identities):
    """The one line with which going on from the run's only checkpoint is refused."""
    with pytest.raises(CheckpointRefused) as error:
        opened(workdir, config, **identities).restore(7, abstract(), print)
    assert error.value.exit_code == 76 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("origin", [(1, 1, 1), (2, 2, 2)])
def test_a_checkpoint_restores_bit_for_bit_on_any_mesh_and_lies_as_that_mesh_says(origin, tmp_path):
    run = opened(tmp_path)
    state = state_at(7, mesh=mesh_of(origin))
    run.save(state)
    run.close()
    for sizes in MESHES:
        wanted = abstract(mesh=mesh_of(sizes))
        restored = opened(tmp_path).restore(7, wanted, print)
        assert_same(restored, state)
        layout = lambda tree: [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]
        assert layout(restored) == layout(wanted)


def test_moments_in_the_hosts_memory_are_saved_and_come_back_to_it_or_to_the_devices(tmp_path):
    offloading = changed(optimizer={"offload": True})
    run = opened(tmp_path, offloading)
    state = state_at(7, offloading, mesh_of((2, 2, 2)))
    run.save(state)
    run.close()
    for config in (offloading, CONFIG):
        wanted = abstract(config, mesh_of((1, 8, 1)))
        restored = opened(tmp_path, config).restore(7, wanted, print)
        assert_same(restored, state)
        places = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.optimizer) if leaf.ndim}
        assert places == {"pinned_host" if config is offloading else "device"}


def test_the_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    run, state = opened(tmp_path), state_at(3)
    expected = jax.tree.map(lambda leaf: np.array(leaf), state)
    run.save(state)
    jax.tree.map(lambda leaf: leaf.delete(), (state.model, state.optimizer, state.ema))
    run.close()
    assert_same(opened(tmp_path).restore(3, abstract(), print), expected)


def test_the_latest_and_the_multiples_of_keep_every_are_kept(tmp_path):
    run = opened(tmp_path, keep=2, keep_every=3)
    for step in range(1, 8):
        run.save(state_at(step))
    run.close()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [3, 6, 7]
    assert checkpoint.latest_step(tmp_path / "checkpoints") == opened(tmp_path).latest_step() == 7
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_the_best_is_kept_whatever_was_saved_without_evaluation_and_after_a_restart(tmp_path):
    losses = {1: 5.0, 2: 1.5, 3: 2.0, 4: None, 5: math.nan, 6: 1.75, 7: None}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        run = opened(tmp_path, keep=1, best="eval/loss")
        for step in steps:
            run.save(state_at(step), None if losses[step] is None else {"eval/loss": losses[step], "eval/tokens": 9.0})
        run.close()
    directory = tmp_path / "checkpoints"
    assert checkpoint.list_steps(directory) == [2, 7]
    assert checkpoint.best_step(directory, "eval/loss") == 2
    with pytest.raises(CheckpointRefused, match=r"no checkpoint in .* was saved with eval/bleu"):
        checkpoint.best_step(directory, "eval/bleu")


def test_where_nothing_was_saved_there_is_nothing_to_list(tmp_path):
    assert checkpoint.list_steps(tmp_path / "checkpoints") == []
    assert opened(tmp_path).latest_step() is None
    with pytest.raises(CheckpointRefused, match=f"no checkpoint in {tmp_path}/checkpoints"):
        checkpoint.latest_step(tmp_path / "checkpoints")
    with pytest.raises(CheckpointRefused, match="no checkpoint in"):
        checkpoint.best_step(tmp_path / "checkpoints", "eval/loss")


def files_of(workdir):
    step = workdir / "checkpoints" / "7"
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def test_the_manifest_lists_every_file(saved):
    manifest = json.loads((saved / "checkpoints/7/manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == files_of(saved)
    assert {name.split("/")[0] for name in manifest["files"]} >= {"model", "optimizer", "ema", "counters"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES = {"flipped": flip, "truncated": lambda path: os.truncate(path, path.stat().st_size // 2), "missing": os.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_refused_by_that_files_name(damage, saved, tmp_path):
    for number, name in enumerate(files_of(saved)):
        size = (saved / "checkpoints/7" / name).stat().st_size
        if name == "manifest.json" or (damage == "truncated" and size == 0):
            continue
        workdir = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
        path, directory = workdir / "checkpoints/7" / name, workdir / "checkpoints"
        DAMAGES[damage](path)
        message = refused(workdir)
        assert (
            str(path) in message
            and {"flipped": "sha256", "truncated": "bytes", "missing": "missing"}[damage] in message
        )
        load = lambda at=directory: checkpoint.load_model(at, abstract().model, checkpoint.latest_step(at))
        if name.split("/")[0] in ("model", "optimizer", "counters"):  # which evaluation does not read
            load()
        else:
            with pytest.raises(CheckpointRefused, match=str(path)):
                load()


@pytest.mark.parametrize("content", ["", "{", '{"files": []}', '{"files": {"model/_METADATA": {"bytes": 1}}}'])
def test_a_damaged_manifest_is_refused(content, copy):
    path = copy / "checkpoints/7/manifest.json"
    path.write_text(content)
    assert refused(copy).startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"d_model": 64}}, "model.d_model=32, the config says 64"),
        ({"model": {"positions": "rotary"}}, "model.positions=learned, the config says rotary"),
        ({"seed": 3}, "seed=0, the config says 3"),
        ({"data": {"seq_len": 8}}, "data.seq_len=16, the config says 8"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name=adamw, the config says lion"),
    ],
)
def test_another_model_order_of_data_or_optimizer_is_refused_with_both_values(sections, message, saved):
    assert refused(saved, changed(**sections)) == f"{saved}/checkpoints/7 was made with {message}"


def test_another_tokenizer_and_other_data_are_refused(saved):
    assert "was made with another tokenizer (tttttttttttt, now xxxxxxxxxxxx)" in refused(saved, tokenizer="x" * 64)
    assert "was made with other data (dddddddddddd, now xxxxxxxxxxxx)" in refused(saved, data="x" * 64)


def test_another_mixture_is_refused_since_it_orders_the_data(saved):
    mixture = (MixtureSource(name="a", files=("x",), weight=2.0),)
    message = refused(saved, changed(data={"mixture": mixture}))
    assert message == f"{saved}/checkpoints/7 was made with the mixture {{}}, the config says {{'a': 2.0}}"


def test_settings_that_may_change_are_listed_in_one_line(saved):
    new = changed(
        train={"steps": 90},
        log={"every": 1},
        optimizer={"learning_rate": 0.5},
        model={"attention": "xla", "dtype": "bfloat16"},
    )
    lines = []
    opened(saved, new).restore(7, abstract(), lines.append)
    changes = (
        "model.dtype float32 -> bfloat16, model.attention auto -> xla, train.steps 50 -> 90, "
        "optimizer.learning_rate 0.0003 -> 0.5, log.every 10 -> 1"
    )
    assert lines == [f"settings changed since {saved}/checkpoints/7: {changes}"]


def test_an_unchanged_config_is_not_remarked_upon(saved):
    lines = []
    opened(saved).restore(7, abstract(), lines.append)
    assert lines == []


def test_a_checkpoint_says_what_made_it(saved):
    with ocp.training.Checkpointer(saved / "checkpoints") as orbax:
        made_by = orbax.checkpointables_metadata(7).custom_metadata
    assert made_by["config"]["model"]["d_model"] == 32 and made_by["versions"]["jax"] == jax.__version__
    assert (made_by["tokenizer_sha256"], made_by["data_sha256"]) == ("t" * 64, "d" * 64)
    assert made_by["mesh"] == dict(mesh_of().shape)


def test_the_average_is_loaded_where_there_is_one_and_no_other_part_is_opened(copy):
    for part in ("optimizer", "model", "counters"):
        shutil.rmtree(copy / "checkpoints/7" / part)
    model = checkpoint.load_model(copy / "checkpoints", abstract(mesh=mesh_of((2, 2, 2))).model, 7)
    assert_same(model, state_at(7).ema)


def test_weights_are_loaded_in_another_type_and_for_another_mesh_if_asked(saved):
    mesh = mesh_of((2, 2, 2))
    model = checkpoint.load_model(saved / "checkpoints", abstract_model(CONFIG, mesh, "bfloat16"), 7)
    assert_same(model, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), state_at(7).ema))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(model)} == {mesh}


def test_the_weights_are_loaded_where_there_is_no_average(tmp_path):
    config = changed(train={"ema": 0.0})
    run, state = opened(tmp_path, config), state_at(4, config)
    run.save(state)
    run.close()
    shutil.rmtree(tmp_path / "checkpoints/4/optimizer")
    assert_same(checkpoint.load_model(tmp_path / "checkpoints", abstract().model, 4), state.model)


def test_weights_of_another_shape_or_name_are_refused(saved):
    directory = saved / "checkpoints"
    for sections, message in [
        (
            {"model": {"d_ff": 64}},
            r"7: ema has blocks\.mlp\.down\.w as float32\[2, 128, 32\], the config wants float32\[2, 64, 32\]",
        ),
        ({"model": {"bias": False}}, r"7: ema has other parameters: 0 missing \(\), \d+ unexpected \(blocks"),
    ]:
        with pytest.raises(CheckpointRefused, match=message):
            checkpoint.load_model(directory, abstract(changed(**sections)).model, 7)


def begun(workdir, config):
    run = opened(workdir, config)
    lines = []
    with jax.set_mesh(mesh_of()):
        state = begin(config, make_optimizer(config.optimizer, 50), mesh_of(), run, lines.append)
    run.close()
    return state, lines


def test_a_run_may_begin_with_the_weights_of_another_but_its_own_step_and_optimizer(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved.parent)
    other = changed(train={"init_from": saved.name}, seed=1, optimizer={"name": "lion"})
    state, lines = begun(tmp_path, other)
    assert_same((state.model, state.ema), (state_at(7).ema,) * 2)
    assert state.step == state.skipped == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    assert lines == [f"started from 20 of 20 parameters in {saved}/checkpoints/7"]
    jax.tree.map(lambda leaf: leaf.delete(), state.model)  # as a step that takes the state as its own does
    assert_same(state.ema, state_at(7).ema)


def test_weights_to_begin_with_that_are_not_finite_are_refused_at_the_start(saved, tmp_path, monkeypatch):
    model = state_at(7).model
    leaves = dict(pytree.flatten(model))
    name = next(iter(leaves))
    spoilt = np.array(leaves[name])
    spoilt.flat[-1] = np.nan  # of a token that no text has
    spoilt = pytree.unflatten(model, leaves | {name: jax.device_put(spoilt, leaves[name].sharding)})
    monkeypatch.setattr(Checkpoints, "load_fitting", lambda *_: spoilt)
    with pytest.raises(DataError, match=rf"checkpoints: {name} holds values that are not finite \(1 arrays do\)"):
        begun(tmp_path, changed(train={"init_from": str(saved)}))


def test_its_own_checkpoint_goes_before_those_of_others(saved, copy):
    state, lines = begun(copy, changed(train={"init_from": "/nowhere"}))
    assert_same(state, state_at(7))
    assert lines == [
        f"settings changed since {copy}/checkpoints/7: train.init_from  -> /nowhere",
        "resumed from step 7",
    ]


def test_a_beginning_from_nothing_or_from_other_shapes_is_refused(saved, tmp_path):
    with pytest.raises(InputMissing, match=r"train\.init_from=/nowhere does not exist"):
        begun(tmp_path, changed(train={"init_from": "/nowhere"}))
    with pytest.raises(CheckpointRefused, match="the config wants"):
        begun(tmp_path, changed(train={"init_from": str(saved)}, model={"d_ff": 64}))


KILLED = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import test_checkpoint as our
run = our.opened(pathlib.Path({workdir!r}))
run.save(our.state_at(1))
run.save(our.state_at(2))
os._exit(9)
"""


def test_what_a_killed_save_leaves_is_not_taken_for_a_checkpoint(tmp_path):
    code = KILLED.format(tests=str(pathlib.Path(__file__).parent), workdir=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    directory = tmp_path / "checkpoints"
    left = [path.name for path in directory.iterdir() if path.name != "1"]
    assert len(left) == 1 and left[0].startswith("2.")
    assert checkpoint.list_steps(directory) == [1]
    run = opened(tmp_path)
    assert run.latest_step() == 1
    run.save(state_at(2))
    run.close()
    assert {path.name for path in directory.iterdir()} == {"1", "2"}
    assert_same(opened(tmp_path).restore(2, abstract(), print), state_at(2))


@pytest.mark.parametrize(("piece", "compiled"), [(checkpoint._PIECE, 1), (0, 50)])
def test_devices_with_the_same_array_cut_it_to_be_saved_only_where_it_is_large(piece, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PIECE", piece)
    mesh, heard = mesh_of((8, 1, 1)), []
    run, state = opened(tmp_path), state_at(7, mesh=mesh)
    listen = lambda event, seconds, **_: heard.append(event)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run.save(state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    run.close()
    programs = heard.count("/jax/core/compile/backend_compile_duration")
    assert programs == compiled if compiled == 1 else programs > compiled  # 1: whether all is finite
    assert_same(opened(tmp_path).restore(7, abstract(mesh=mesh), print), state)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_with_a_value_that_is_not_finite_is_not_saved(sizes, value, tmp_path):
    run, state = opened(tmp_path), state_at(7, mesh=mesh_of(sizes))
    run.save(state)
    model = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[(0,) * leaf.ndim].set(value) if "up" in jax.tree_util.keystr(path) else leaf,
        state.model,
    )
    with pytest.raises(NumericAbort, match="is not finite at step 8"):
        run.save(state._replace(model=model, step=state.step + 1))
    run.close()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [7]


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(saved):
    made_by = provenance.make(CONFIG, "t" * 64, "d" * 64, mesh_of())
    older = json.loads(json.dumps(made_by))
    del older["config"]["model"]["logit_softcap"]
    lines = []
    provenance.check(saved, older, made_by, lines.append)
    assert not lines


def test_a_directory_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(SaveError, match=f"^cannot write {tmp_path}/checkpoints: File exists$") as error:
        opened(tmp_path)
    assert error.value.exit_code == 74


def test_a_save_that_fails_is_told_in_one_line_and_leaves_the_one_before(tmp_path):
    before = opened(tmp_path)
    before.save(state_at(1))
    before.close()
    run = opened(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))  # files of 32 kB are a full disk, for this process
    try:
        with pytest.raises(SaveError, match=f"^cannot save {tmp_path}/checkpoints.*: [^\n]*$"):
            run.save(state_at(2))
            run.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [1]
    assert_same(opened(tmp_path).restore(1, abstract(), print), state_at(1))


def test_a_save_that_a_lost_process_fails_is_no_failing_disk(tmp_path, monkeypatch):
    class Lost(Exception):
        """In place of this process's end."""

    def explain(error):
        raise Lost(str(error))

    monkeypatch.setattr(heartbeat, "explain", explain)
    with pytest.raises(Lost, match="Gloo"), checkpoint._as_save_error(tmp_path):
        raise ValueError("Gloo AllReduce failed: Connection closed by peer")


def test_a_disk_that_will_be_full_is_told_beforehand(tmp_path, monkeypatch):
    run, size = opened(tmp_path), sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(1)))
    for free, told in ((2 * size, ""), (2 * size - 1, f"{tmp_path}/checkpoints has room for ")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        said = run.lack_of_room(state_at(1))
        assert said.startswith(told) and bool(said) == bool(told)


def test_a_checkpoint_that_vanishes_while_it_is_read_gives_way_to_the_next(tmp_path):
    directory = tmp_path / "checkpoints"

    def make(step):
        (directory / str(step)).mkdir(parents=True)
        (directory / str(step) / "manifest.json").write_text("{}")

    def load(step):
        if step < 3:
            shutil.rmtree(directory / str(step))  # by the run that goes on
            make(step + 1)
            raise [CheckpointRefused("a file is missing"), OSError("a file is missing")][step - 1]
        return f"weights of step {step}"

    make(1)
    assert checkpoint.load_latest(directory, load) == ("weights of step 3", 3)
    with pytest.raises(CheckpointRefused, match="a file is missing"):  # this one stays, and is damaged
        checkpoint.load_latest(directory, _refuse)


def _refuse(step):
    raise CheckpointRefused("a file is missing")


def test_moments_out_of_range_are_reported_when_they_are_saved(tmp_path, capsys):
    state = state_at(3)
    leaves = dict(pytree.flatten(state.optimizer))
    name = next(name for name in leaves if ".nu." in name)
    spoilt = {other: np.abs(np.asarray(leaf)) for other, leaf in leaves.items() if np.ndim(leaf)}
    spoilt[name].flat[5] = 1e38
    placed = {other: jax.device_put(array, leaves[other].sharding) for other, array in spoilt.items()}
    run = opened(tmp_path)
    run.save(state._replace(optimizer=pytree.unflatten(state.optimizer, leaves | placed)))
    run.close()
    assert capsys.readouterr().err.startswith(f"warning: step 3: 1 values of optimizer.{name} are out of the range")


def test_an_average_that_the_checkpoint_lacks_begins_with_its_weights(tmp_path):
    plain, lines = changed(train={"ema": 0.0}), []
    run = opened(tmp_path, plain)
    run.save(state_at(3, plain))
    run.close()
    restored = opened(tmp_path).restore(3, abstract(), lines.append)
    assert_same((restored.model, restored.ema), (state_at(3, plain).model,) * 2)
    assert any(
        "3 has no averaged weights: the average (train.ema) begins with the weights of step 3" in line for line in lines
    )


def test_a_parameter_named_v_is_no_second_moment():
    arrays = {name: jax.numpy.full(3, -1.0) for name in ("optimizer.1.0.mu.blocks.attention.v.b", "optimizer.0.nu.w")}
    assert [odd for _, odd in survey(arrays).values()] == [0, 3]


def test_a_renamed_checkpoint_of_an_older_version_is_refused_by_its_own_step(copy):
    directory = copy / "checkpoints"
    content = json.loads((directory / "7/manifest.json").read_text())
    (directory / "7/manifest.json").write_text(json.dumps({"files": content["files"]}))
    (directory / "7").rename(directory / "9")
    with pytest.raises(CheckpointRefused, match="holds the state of step 7: it was renamed"):
        opened(copy).restore(9, abstract(), print)
