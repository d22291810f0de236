"""The ledger tells what was read over all starts of a run, and the audit finds whatever was not due."""

import json

import numpy as np
import pytest
from etils import epath

from lslm_jax.data.batch import Batch
from lslm_jax.data.index_shuffle import positions
from lslm_jax.errors import DataError, InputMissing
from lslm_jax.resilience import data_ledger
from lslm_jax.resilience.data_ledger import Ledger, attempts, audit

BATCH, SIZES = 4, [10, 6]


class Data:
    """Two sources that take turns, each in its own order in every epoch."""

    def __init__(self, spoil=lambda position, row: row):
        self._spoil = spoil

    def rows(self, step, slots=None, steps=1):
        position = positions(step, steps, BATCH, np.arange(BATCH) if slots is None else slots)
        source, local = position % 2, position // 2
        epoch, place = np.divmod(local, np.array(SIZES)[source])
        order = [[np.random.default_rng([s, e]).permutation(size) for e in range(20)] for s, size in enumerate(SIZES)]
        row = np.array([order[s][e][p] for s, e, p in zip(source, epoch, place, strict=True)])
        return np.stack([source, epoch, self._spoil(position, row)], axis=1)

    def sizes(self):
        return SIZES


def go_on(workdir, start, stop, processes=1, data=None, every=3, skipped=(), write=True):
    """One start of a run, of so many processes, up to `stop`."""
    attempt, data = attempts(workdir), data or Data()
    for process in range(processes):
        slots = np.arange(BATCH).reshape(processes, -1)[process]
        book = Ledger(workdir, process, attempt, start, data, slots)
        for step in range(start + 1, stop + 1):
            book.add(step, step in skipped)
            if step % every == 0:
                book.write()
        if not write:
            book.write = lambda: None
        book.close()


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_run_on_one_two_four_and_one_processes_has_read_every_row_once_an_epoch(workdir):
    go_on(workdir, 0, 7)
    go_on(workdir, 7, 12, processes=2, skipped=(9,))
    go_on(workdir, 12, 17, processes=4, write=False)  # killed: what was read of steps 16 and 17 is not on the ledger
    go_on(workdir, 15, 20)
    found = audit(workdir, Data(), BATCH)
    epochs = [20 * BATCH / 2 / size for size in SIZES]
    assert found["epochs"] == pytest.approx(epochs, abs=1e-6)
    assert (found["steps"], found["starts"], found["skipped_steps"]) == (20, 4, [9])


def test_steps_behind_a_checkpoint_are_read_again_and_counted_once(workdir):
    go_on(workdir, 0, 10)
    go_on(workdir, 6, 8, skipped=(7,))
    go_on(workdir, 6, 12)
    found = audit(workdir, Data(), BATCH)
    assert (found["steps"], found["repeated_steps"], found["skipped_steps"]) == (12, 6, [])


def test_a_torn_line_is_no_line_and_a_start_that_did_nothing_is_none(workdir):
    go_on(workdir, 0, 6)
    with open(workdir / "ledger" / "0.jsonl", "a") as file:
        file.write('{"steps": [7, 9], "sha2')
    assert audit(workdir, Data(), BATCH)["steps"] == 6
    go_on(workdir, 6, 6)
    go_on(workdir, 6, 9)
    assert audit(workdir, Data(), BATCH)["steps"] == 9


def spoilt(place, spoil):
    """Every row as it should be but the one at a place of the run."""
    return Data(lambda position, rows: np.where(position == place, spoil(rows), rows))


@pytest.mark.parametrize("processes", [1, 2])
def test_other_rows_than_were_due_are_found(workdir, processes):
    go_on(workdir, 0, 5)
    go_on(workdir, 5, 10, processes, data=spoilt(7 * BATCH + 3, lambda row: (row + 1) % 6))
    with pytest.raises(DataError, match=rf"{processes - 1}.jsonl: steps 7 to 9 read other rows than were due"):
        audit(workdir, Data(), BATCH)


def test_an_order_that_repeats_or_loses_a_row_is_found_even_where_all_agree(workdir):
    first, second = Data().rows(0)[::2, 2]
    twice = spoilt(2, lambda _: first)
    assert first != second
    go_on(workdir, 0, 10, data=twice)
    with pytest.raises(DataError, match=f"row {first} of source 0 was read twice in epoch 0, at step 1"):
        audit(workdir, twice, BATCH)


def test_a_row_that_comes_again_beyond_the_rows_looked_up_at_once_is_found(workdir, monkeypatch):
    monkeypatch.setattr(data_ledger, "_PIECE", BATCH)
    first = Data().rows(0)[0, 2]
    twice = spoilt(BATCH, lambda _: first)
    go_on(workdir, 0, 10, data=twice)
    with pytest.raises(DataError, match=f"row {first} of source 0 was read twice in epoch 0, at step 2"):
        audit(workdir, twice, BATCH)


def test_a_ledger_with_a_line_or_a_process_missing_proves_nothing(workdir):
    go_on(workdir, 0, 9, processes=2)
    (workdir / "ledger" / "1.jsonl").rename(workdir / "ledger" / "aside")
    with pytest.raises(DataError, match="start 0 took 2 of the 4 rows of a batch"):
        audit(workdir, Data(), BATCH)
    (workdir / "ledger" / "aside").rename(workdir / "ledger" / "1.jsonl")
    audit(workdir, Data(), BATCH)
    path = workdir / "ledger" / "1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[2])["steps"] == [4, 6]
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(DataError, match="does not tell what was read in steps 4 to 6"):
        audit(workdir, Data(), BATCH)
    path.write_text("".join([*lines[:2], "{", *lines[3:]]))
    with pytest.raises(DataError, match=r"jsonl:3 is damaged"):
        audit(workdir, Data(), BATCH)


def test_a_start_from_a_step_that_is_not_on_the_ledger_is_found(workdir):
    go_on(workdir, 0, 9)
    go_on(workdir, 8, 12)
    with pytest.raises(DataError, match="does not tell what was read up to step 8, where start 1 began"):
        audit(workdir, Data(), BATCH)


def test_without_a_ledger_there_is_nothing_to_audit(workdir):
    with pytest.raises(InputMissing, match="has no ledger"):
        audit(workdir, Data(), BATCH)


class Fed(Data):
    """Data whose batches are made, too: each token is its row's number."""

    offset, batch_size = 0, BATCH
    slots = np.arange(BATCH)

    def rows(self, step, slots=None, steps=1):
        position = positions(step, steps, self.batch_size, self.slots if slots is None else slots, self.offset)
        rows = [Data.rows(self, at // BATCH, np.array([at % BATCH])) for at in position]
        return np.concatenate(rows)

    def batch(self, step):
        tokens = self.rows(step)[:, 2:].astype(np.int32)
        return Batch(tokens, tokens + 1, np.ones(tokens.shape, np.float32))


def train(workdir, start, stop, data=None, loader=lambda step: step, every=3, write=True):
    """One start of a run which is given the batch `loader(step)` for each step after start; the ledger is told."""
    data = data or Fed()
    book = Ledger(workdir, 0, attempts(workdir), start, data, data.slots)
    for step in range(start + 1, stop + 1):
        book.feed(step, data.batch(loader(step - 1)))
        book.add(step, False)
        if step % every == 0:
            book.write()
    if not write:
        book.write = lambda: None
    book.close()


@pytest.mark.parametrize(
    ("fault", "loader"),
    [
        ("each batch twice", lambda step: step // 2),
        ("batch 0 for ever", lambda step: 0),
        ("one ahead", lambda s: s + 1),
    ],
)
def test_other_arrays_than_those_of_the_rows_that_were_due_are_found(workdir, fault, loader):
    train(workdir, 0, 3)
    assert audit(workdir, Fed(), BATCH)["steps"] == 3
    train(workdir, 3, 9, loader=loader)
    with pytest.raises(DataError, match=r"0.jsonl: steps \d+ to \d+ trained on other arrays than their rows make"):
        audit(workdir, Fed(), BATCH)


def test_a_run_whose_batch_size_has_changed_has_read_every_row_once_an_epoch(workdir):
    train(workdir, 0, 6)
    larger = Fed()
    larger.batch_size, larger.slots, larger.offset = 6, np.arange(6), 6 * (BATCH - 6)
    train(workdir, 6, 12, data=larger)
    audited = audit(workdir, Fed(), 6)
    assert audited["steps"] == 12
    assert audited["epochs"] == pytest.approx([(6 * BATCH + 6 * 6) / 2 / size for size in SIZES], abs=1e-6)


def test_steps_that_are_missing_but_were_done_again_count_as_repeated(workdir):
    go_on(workdir, 0, 9)
    path = workdir / "ledger" / "0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))  # without steps 4 to 6
    with pytest.raises(DataError, match="does not tell what was read in steps 4 to 6"):
        audit(workdir, Data(), BATCH)
    go_on(workdir, 3, 12)
    audited = audit(workdir, Data(), BATCH)
    assert audited["steps"] == 12 and audited["starts"] == 2


def test_lines_of_an_orphan_behind_the_start_of_its_successor_are_its_own(workdir):
    go_on(workdir, 0, 9)
    path = workdir / "ledger" / "0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    go_on(workdir, 3, 6)
    path.write_text(path.read_text() + lines[3])  # steps 7 to 9, of start 0
    assert audit(workdir, Data(), BATCH)["steps"] == 6


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (0, "attempt", "x"),
        (0, "from", -1),
        (0, "slots", [[0, 10**12]]),
        (0, "slots", [[-5, 3]]),
        (0, "slots", []),
        (0, "slots", "ab"),
        (0, "batch_size", 0),
        (0, "batch_size", 10**12),
        (0, "offset", 10**30),
        (0, "detours", 3),
        (0, "detours", [[1]]),
        (1, "steps", [1, 0]),
        (1, "steps", [0, 3]),
        (1, "steps", [1, 10**12]),
        (1, "steps", "ab"),
        (1, "sha256", 4),
        (1, "fed", 4),
        (1, "skipped", [9]),
        (1, "skipped", "ab"),
        (1, "of", 9),
        (1, "of", [1]),
    ],
)
def test_a_line_with_a_value_that_cannot_be_is_damage(workdir, number, key, value):
    train(workdir, 0, 9)
    path = workdir / "ledger" / "0.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | {key: value})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"0\.jsonl"):
        audit(workdir, Fed(), BATCH)


@pytest.mark.parametrize("line", ["3", "[]", "[" * 100_000, '{"steps": [1, 3], "steps": [1, 3]}'])
def test_a_line_that_is_no_object_is_damage_for_a_run_that_goes_on_too(workdir, line):
    train(workdir, 0, 9)
    path = workdir / "ledger" / "0.jsonl"
    path.write_text(path.read_text() + line + "\n")
    for read in (lambda: audit(workdir, Fed(), BATCH), lambda: attempts(workdir)):
        with pytest.raises(DataError, match=r"0\.jsonl:5 is damaged"):
            read()


def test_a_digest_of_arrays_that_was_removed_is_found(workdir):
    train(workdir, 0, 9)
    path = workdir / "ledger" / "0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[2]["fed"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="does not tell what steps 4 to 6 trained on"):
        audit(workdir, Fed(), BATCH)
