"""A checkpoint's metadata compared with the config, data, tokenizer and environment at hand."""

import json
from dataclasses import replace

import jax
import pytest

from lslm_jax.checkpoint import metadata, provenance
from lslm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data import index_shuffle
from lslm_jax.data.skipped_batches import Detour
from lslm_jax.data.synthetic_data import SyntheticInput
from lslm_jax.errors import CheckpointRefused, DataError
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.runtime import environment

CONFIG = validate(
    Config(
        model=ModelConfig(num_layers=1, d_model=32, num_heads=2, vocab_size=61, max_length=16),
        data=DataConfig(source="synthetic", seq_len=16),
        train=TrainConfig(steps=60, batch_size=8),
    )
)
FACTS = {
    "tokenizer": {"kind": "bytes", "sha256": "t" * 64, "vocab_size": 61, "bos_id": 1, "eos_id": 2, "file": "a.json"},
    "labels": ["negative", "positive"],
    "splits": {"train": {"manifest_sha256": "m" * 64}},
    "sha256": "d" * 64,
    "inputs": {"": ["/somewhere/text.txt"]},
}


def made_by(config=CONFIG, facts=FACTS, **more):
    mesh = make_mesh(config, jax.devices()[:1])
    found = provenance.make(config, facts["tokenizer"]["sha256"], facts["sha256"], mesh, facts=facts, **more)
    return json.loads(json.dumps(found))


@pytest.fixture
def directory(tmp_path):
    """A checkpoint, as far as its metadata go."""
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": made_by()}))
    return tmp_path / "20"


def changed(facts=FACTS, **values):
    return facts | {"tokenizer": facts["tokenizer"] | values.pop("tokenizer", {})} | values


def test_what_belongs_together_is_accepted_wherever_its_files_lie(directory):
    provenance.check_inputs(directory, CONFIG)
    moved = changed(inputs={"": ["/elsewhere/text.txt"]}, tokenizer={"file": "b.json"})
    provenance.check_inputs(directory, CONFIG, moved, "t" * 64)
    free = replace(CONFIG, model=replace(CONFIG.model, dtype="bfloat16", remat="full", max_length=32), seed=3)
    provenance.check_inputs(directory, free, changed(sha256="e" * 64))  # other shards, the same tokenizer and labels


@pytest.mark.parametrize(
    ("config", "facts", "error", "message"),
    [
        ({"activation": "relu"}, FACTS, CheckpointRefused, "model.activation=gelu, the config says relu"),
        ({"window": 4}, FACTS, CheckpointRefused, "model.window=0, the config says 4"),
        ({}, changed(tokenizer={"sha256": "u" * 64}), CheckpointRefused, "was made with another tokenizer"),
        ({}, changed(labels=["positive", "negative"]), DataError, "other labels in the data manifest"),
        ({}, changed(tokenizer={"eos_id": 3}), DataError, "other ids in the data manifest"),
        ({}, changed(labels=["positive", "negative"], sha256="e" * 64), DataError, "other labels"),
        ({}, changed(splits={"train": {"manifest_sha256": "n" * 64}}), DataError, "data/manifest.json was altered"),
    ],
)
def test_what_does_not_is_refused_by_name(directory, config, facts, error, message):
    with pytest.raises(error, match=message):
        provenance.check_inputs(directory, replace(CONFIG, model=replace(CONFIG.model, **config)), facts)
    if facts is not FACTS and error is DataError:
        with pytest.raises(error):  # so is a run that would go on
            provenance.check(directory, made_by(), made_by(facts=facts | {"sha256": "d" * 64}), print)


def test_a_loaded_tokenizer_is_compared_too(directory):
    with pytest.raises(CheckpointRefused, match="another tokenizer"):
        provenance.check_inputs(directory, CONFIG, None, "u" * 64)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"custom_metadata": {"config": 3}}'])
def test_damaged_metadata_are_refused_in_one_line(directory, content):
    (directory / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(CheckpointRefused, match="_CHECKPOINT_METADATA is damaged"):
        metadata.read(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", {}),
        ("config", {"train": {"batch_size": "8"}}),
        ("config", {"train": {"batch_size": 8}, "model": None}),
        ("tokenizer_sha256", None),
        ("data_sha256", 3),
        ("manifest_sha256", 5),
        ("data_facts", {}),
        ("mixture", None),
        ("detours", 3),
        ("detours", [[1]]),
        ("versions", None),
        ("environment", "x"),
        ("mesh", []),
        ("memory", "x"),
        ("row_offset", "x"),
    ],
)
def test_an_entry_of_the_metadata_of_a_wrong_type_is_named(directory, key, value):
    path = directory / "_CHECKPOINT_METADATA"
    entries = json.loads(path.read_text())["custom_metadata"]
    path.write_text(json.dumps({"custom_metadata": entries | {key: value}}))
    with pytest.raises(CheckpointRefused, match=f"_CHECKPOINT_METADATA is damaged: {key} is "):
        metadata.read(directory)


def with_environment(**values):
    found = made_by()
    return found | {"environment": found["environment"] | values}


def test_an_environment_that_changes_numbers_is_named_with_what_it_means():
    assert provenance.environment_warning(made_by(), made_by()) == ""
    old = {key: value for key, value in made_by().items() if key != "environment"}
    assert provenance.environment_warning(old, made_by()) == ""  # of a version that recorded none
    prng = provenance.environment_warning(with_environment(JAX_DEFAULT_PRNG_IMPL="rbg"), made_by())
    assert "JAX_DEFAULT_PRNG_IMPL rbg -> threefry2x32; random draws (dropout, masks) differ" in prng
    level = provenance.environment_warning(with_environment(XLA_FLAGS="--xla_x=1"), with_environment(XLA_FLAGS=""))
    assert "XLA_FLAGS --xla_x=1 -> unset; the run goes on, but its bits may differ" in level
    machine = provenance.environment_warning(with_environment(processor="x86_64-0", cpu_threads=1), made_by())
    assert "processor x86_64-0 -> " in machine and "cpu_threads 1 -> " in machine and "its bits may differ" in machine
    before = {name: value for name, value in made_by()["environment"].items() if name not in environment.LOCAL}
    assert provenance.environment_warning(made_by() | {"environment": before}, made_by()) == ""
    version = made_by() | {"versions": made_by()["versions"] | {"jax": "0.1"}}
    assert "jax 0.1 -> " in provenance.environment_warning(version, made_by())
    same = replace(CONFIG, train=replace(CONFIG.train, reproducible=True))
    devices = provenance.environment_warning(with_environment(device_count=4), made_by(same))
    assert devices.endswith("with train.reproducible the bits stay the same")


def rows_of(data, steps):
    return [int(row) for step in steps for row in data.rows(step)[:, 2]]


def test_another_batch_size_goes_on_at_the_row_where_the_last_batch_ended():
    small, large = CONFIG, replace(CONFIG, train=replace(CONFIG.train, batch_size=12))
    first, second, third = (SyntheticInput(config, 61) for config in (small, large, small))
    second.offset = provenance.continued_rows(made_by(small), 5, 12, [])
    third.offset = provenance.continued_rows(made_by(large, row_offset=second.offset), 9, 8, [])
    found = rows_of(first, range(5)) + rows_of(second, range(5, 9)) + rows_of(third, range(9, 12))
    assert found == list(range(5 * 8 + 4 * 12 + 3 * 8))
    text = provenance.batch_size_change(made_by(small), large, second, 5, [])
    assert text.startswith("train.batch_size 8 -> 12: step 6 continues at row 40 of the data order; no row is skipped")
    assert provenance.batch_size_change(made_by(small), small, first, 5, []) == ""


def test_rows_after_batches_that_were_left_out_are_continued_too():
    detours = [Detour(2, 3)]  # five steps have read batches 0, 1, 5, 6, 7
    offset = provenance.continued_rows(made_by(), 5, 12, detours)
    assert index_shuffle.positions(5 + 3, 1, 12, [0], offset)[0] == 8 * 8
