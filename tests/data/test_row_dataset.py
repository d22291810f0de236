"""Rows of every objective: functions of (seed, step), of the contract's shapes, each once an epoch, in any process."""

import numpy as np
import pytest
from tiny_data import (
    CASES,
    PACKINGS,
    VOCAB_SIZE,
    config_of,
    examples_of,
    write_all,
    write_examples,
    write_manifest,
)

from lslm_jax.config import MixtureSource
from lslm_jax.data.dataloader import open_eval, open_train
from lslm_jax.data.objectives.masked_lm import num_predictions
from lslm_jax.data.prefetch import batches
from lslm_jax.errors import ConfigError, DataError

SIZE = VOCAB_SIZE + 200  # room for a mask and sentinels
PACKED = [(case, packing) for case in CASES for packing in PACKINGS if case.objective in ("masked", "seq2seq")]
EVERY = [(case, "bins") for case in CASES] + PACKED
DRAWN = ("masked", "span_corruption")


def ids(value):
    return value.id if hasattr(value, "id") else None


every = pytest.mark.parametrize(("case", "packing"), EVERY, ids=ids)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    found = {}
    for case in CASES:
        path = tmp_path_factory.mktemp(case.id)
        found[case] = path, write_all(path, case)
    return found


@pytest.fixture
def directory(directories, case):
    return directories[case][0]


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def joined(parts):
    return [None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True)]


def asked(rows, monkeypatch):
    """What numbers of rows a single source is asked for, as it is asked."""
    (source,) = rows._sources
    numbers, batch = [], source.batch
    monkeypatch.setattr(source, "batch", lambda rows, keys: (numbers.extend(rows.tolist()), batch(rows, keys))[1])
    return numbers


@every
def test_a_batch_has_the_shapes_and_types_of_the_contract(directory, case, packing):
    config = config_of(case, packing)
    batch = open_train(config, directory, SIZE).batch(0)
    B, T, S, P = 8, 24, 32, num_predictions(24, config.task.mask_rate)
    targets = {"masked": (B, P), "classification": (B, 1), "regression": (B, 1), "qa": (B, 2)}
    expected = {"tokens_BT": (B, T), "targets_BT": targets[case.objective] if case.objective in targets else (B, T)}
    expected["weights_BT"] = expected["targets_BT"]
    expected["segments_BT"] = (B, T)
    if case.objective in ("causal", "masked", "seq2seq"):
        expected["positions_BT"] = (B, T)
    if case.objective == "masked":
        expected["places_BP"] = (B, P)
    if case.family == "encoder_decoder":
        expected |= {"source_BS": (B, S), "source_segments_BS": (B, S)}
        if case.objective == "seq2seq":
            expected["source_positions_BS"] = (B, S)
    if case.objective in ("classification", "regression", "tagging", "qa"):
        expected["types_BT"] = (B, T)
    assert {name: part.shape for name, part in batch._asdict().items() if part is not None} == expected
    for name, part in batch._asdict().items():
        if part is not None:
            is_float = name == "weights_BT" or (name == "targets_BT" and case.objective == "regression")
            assert part.dtype == (np.float32 if is_float else np.int32)
    assert set(np.unique(batch.weights_BT)) <= {0.0, 1.0}
    assert ((batch.tokens_BT >= 0) & (batch.tokens_BT < SIZE)).all()
    for tokens, segments in ((batch.tokens_BT, batch.segments_BT), (batch.source_BS, batch.source_segments_BS)):
        if tokens is not None:
            assert (tokens[segments == 0] == 0).all(), "padding holds zeros"
            assert (np.diff((segments > 0).astype(int), axis=1) <= 0).all(), "padding stands at the end"


@every
def test_the_rows_of_several_processes_make_the_same_global_batch_at_any_step(directory, case, packing):
    config = config_of(case, packing)
    for step in (0, 1, 1_000_000):
        whole = open_train(config, directory, SIZE).batch(step)
        for processes in (2, 4):
            parts = [
                open_train(config, directory, SIZE, rows).batch(step) for rows in np.split(np.arange(8), processes)
            ]
            assert_equal(joined(parts), whole)


@every
def test_each_epoch_holds_every_row_once_and_draws_anew(directory, case, packing, monkeypatch):
    rows = open_train(config_of(case, packing, batch_size=1), directory, SIZE)
    numbers = asked(rows, monkeypatch)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows)
        parts = [rows.batch(step) for step in steps]
        epochs.append(dict(zip(numbers[-rows.num_rows :], parts, strict=True)))
        assert sorted(epochs[-1]) == list(range(rows.num_rows))
    differing = 0
    for number, batch in epochs[0].items():
        other = epochs[1][number]
        differing += not np.array_equal(batch.tokens_BT, other.tokens_BT)
        if case.objective not in DRAWN:
            assert_equal(batch, other)
    assert (differing > rows.num_rows // 2) == (case.objective in DRAWN)


@every
def test_rows_are_the_same_asked_for_alone_or_in_any_order(directory, case, packing):
    (source,) = open_train(config_of(case, packing), directory, SIZE)._sources
    rng = np.random.default_rng(0)
    numbers, keys = rng.permutation(source.num_rows), rng.integers(0, 1 << 63, source.num_rows, np.uint64)
    together = source.batch(numbers, keys)
    alone = [source.batch(numbers[i : i + 1], keys[i : i + 1]) for i in range(len(numbers))]
    assert_equal(joined(alone), together)
    assert source.max_segments() == together.segments_BT.max()
    if together.source_BS is not None:
        assert source.max_segments() == together.source_segments_BS.max()
    cells = [part for part in (together.segments_BT, together.source_segments_BS) if part is not None]
    assert source.num_slots == sum(np.count_nonzero(part) for part in cells)
    assert source.num_rows * source.cells == sum(part.size for part in cells)
    assert len(source.batch(numbers[:0], keys[:0]).tokens_BT) == 0


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("through", ["tf.data", "threads"])
def test_a_run_resumed_anywhere_sees_what_the_uninterrupted_one_sees(directory, case, through):
    def run(start, stop):
        return list(batches(open_train(config_of(case), directory, SIZE).batch, start, stop, through=through))

    whole = run(0, 12)
    pieces = [batch for start, stop in ((0, 1), (1, 5), (5, 12)) for batch in run(start, stop)]
    for got, want in zip(pieces, whole, strict=True):
        assert_equal(got, want)


@every
@pytest.mark.parametrize("batch_size", [4, 64])
def test_an_evaluation_shows_every_row_once_and_the_same_whatever_the_seed(directory, case, packing, batch_size):
    config = config_of(case, packing, batch_size)
    (rows,) = open_eval(config, directory, SIZE).values()
    (other,) = open_eval(config_of(case, packing, batch_size, seed=4), directory, SIZE).values()
    halves = [open_eval(config, directory, SIZE, rows)[""] for rows in np.split(np.arange(batch_size), 2)]
    examples = []
    for step in range(rows.num_batches):
        batch = rows.batch(step)
        assert_equal(other.batch(step), batch)
        assert_equal(joined([half.batch(step) for half in halves]), batch)
        assert len(batch.tokens_BT) == batch_size
        examples.append(rows.examples(step))
    filler = slice(rows.num_rows - (rows.num_batches - 1) * batch_size, None)
    for part in batch:
        assert part is None or (part[filler] == 0).all()
    examples = np.concatenate(examples)
    assert (examples[rows.num_rows :] == -1).all()
    assert set(examples[: rows.num_rows]) <= set(range(11))
    assert (np.concatenate([rows.windows(i) for i in range(rows.num_batches)])[rows.num_rows :] == -1).all()
    assert rows.shards.num_examples == 11


@pytest.mark.parametrize("case", [case for case in CASES if case.objective in ("causal", "masked", "seq2seq")], ids=ids)
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_evaluation_counts_the_bytes_that_it_predicts(directory, case, packing, directories):
    (rows,) = open_eval(config_of(case, packing), directory, SIZE).values()
    assert rows.num_bytes() == sum(5 * len(texts[-1]) + 1 for texts, _ in directories[case][1]["valid"])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_mixture_draws_from_all_its_sources_in_any_processes(tmp_path, case):
    for i, name in enumerate(("one", "two")):
        write_examples(tmp_path / name / "train", examples_of(case, 20 + i, 3 + 5000 * i))
    write_examples(tmp_path / "two" / "valid", examples_of(case, 5, 5003))
    write_manifest(tmp_path)
    mixture = tuple(MixtureSource(source="shards", name=name, weight=w) for name, w in (("one", 3), ("two", 1)))
    config = config_of(case, "bins", mixture=mixture)
    whole = open_train(config, tmp_path, SIZE).batch(5)
    assert_equal(
        joined([open_train(config, tmp_path, SIZE, rows).batch(5) for rows in np.split(np.arange(8), 4)]), whole
    )
    held_out = open_eval(config, tmp_path, SIZE)
    assert list(held_out) == ["two"] and held_out["two"].shards.num_examples == 5


def test_examples_of_another_kind_are_refused(directories):
    masked, pair = CASES[1], CASES[3]
    with pytest.raises(
        ConfigError, match=r"train was not prepared for task\.objective=masked: its examples have 2 text"
    ):
        open_train(config_of(masked), directories[pair][0], SIZE)


def test_a_mask_and_sentinels_make_the_vocabulary_larger(directories):
    for case, more in ((CASES[1], 1), (CASES[2], 100)):
        with pytest.raises(ConfigError, match=f"is too small: .*train needs {VOCAB_SIZE + more}$"):
            open_train(config_of(case), directories[case][0], VOCAB_SIZE + more - 1)
    with pytest.raises(ConfigError, match=r"task\.objective=masked needs a mask, which model\.family=decoder"):
        open_train(config_of(CASES[1]._replace(family="decoder")), directories[CASES[1]][0], SIZE)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_token_outside_the_vocabulary_is_refused_with_its_document(tmp_path, case):
    write_all(tmp_path, case)
    path = tmp_path / "train" / "tokens-00000.bin"
    written = np.fromfile(path, "<u2")
    written[2] = 50_000
    written.tofile(path)
    (source,) = open_train(config_of(case), tmp_path, SIZE)._sources
    with pytest.raises(DataError, match=f"^token 50000 in document 0 of {tmp_path}/train, vocabulary {VOCAB_SIZE}$"):
        source.batch(np.arange(source.num_rows), np.arange(source.num_rows, dtype=np.uint64))
