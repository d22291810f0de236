"""The pipeline: a batch is a function of config, data and step, whatever was killed and whoever asks."""

import json

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import Config, DataConfig, EvalConfig, MixtureSource, TrainConfig
from lslm_jax.data.dataloader import open_eval, open_train
from lslm_jax.data.prefetch import batches
from lslm_jax.data.shards import ShardWriter
from lslm_jax.errors import ConfigError, DataError, InputMissing

BOS, EOS, VOCAB_SIZE = 1, 2, 20_000
PACKINGS = ("stream", "bins", "pad")


def config_of(packing="stream", batch_size=6, mixture=(), source="shards", eval_batches=0, **data):
    data = {"seq_len": 16} | data
    return Config(
        seed=3,
        data=DataConfig(source=source, packing=packing, mixture=mixture, **data),
        train=TrainConfig(batch_size=batch_size),
        eval=EvalConfig(batches=eval_batches),
    )


def write_split(directory, lengths, first_token=3):
    """A split in which no token occurs twice, so that each tells where it comes from."""
    writer = ShardWriter(epath.Path(directory), VOCAB_SIZE, 400)
    for i, length in enumerate(lengths):
        writer.add([np.arange(first_token, first_token + length)], 5 * length + 1, i + 1)
        first_token += length
    writer.finish()


def write_manifest(directory):
    (directory / "manifest.json").write_text(
        json.dumps({"tokenizer": {"bos_id": BOS, "eos_id": EOS, "vocab_size": VOCAB_SIZE}})
    )


def lengths_of(name, count):
    """One document without tokens, and others of up to three rows."""
    return np.array([0, *np.random.default_rng(len(name)).integers(1, 50, count - 1)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared")
    write_split(path / "train", lengths_of("train", 60))
    write_split(path / "valid", lengths_of("valid", 11))
    for i, name in enumerate(("news", "code", "poems")):
        write_split(path / name / "train", lengths_of(name, 20 + 10 * i), 3 + 4000 * i)
    write_split(path / "news" / "valid", [3, 40])
    write_split(path / "poems" / "valid", [20], 8003)
    write_manifest(path)
    return path


MIXTURE = tuple(
    MixtureSource(source="shards", name=name, weight=weight)
    for name, weight in (("news", 5), ("code", 2), ("poems", 1))
)


def joined(parts):
    return [None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True)]


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def rows_of(batch_list):
    """Each row as a hashable thing, with all that a batch says of it."""
    parts = [part for part in joined(batch_list) if part is not None]
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_each_epoch_holds_every_row_exactly_once(directory, packing, batch_size):
    rows = open_train(config_of(packing, batch_size), directory, VOCAB_SIZE)
    epochs = 3
    steps = -(-epochs * rows.num_rows // batch_size)
    seen = rows_of([rows.batch(step) for step in range(steps)])
    split = [sorted(seen[i * rows.num_rows : (i + 1) * rows.num_rows]) for i in range(epochs)]
    assert len(set(split[0])) == rows.num_rows
    assert split[0] == split[1] == split[2]
    assert seen[: rows.num_rows] != seen[rows.num_rows : 2 * rows.num_rows], "the order differs between epochs"
    assert rows.epoch(steps) == pytest.approx(epochs, abs=batch_size / rows.num_rows)


def test_every_token_is_a_target_once_an_epoch(directory):
    rows = open_train(config_of(batch_size=1), directory, VOCAB_SIZE)
    targets = np.concatenate(
        [rows.batch(step).targets_BT[rows.batch(step).weights_BT > 0] for step in range(rows.num_rows)]
    )
    assert sorted(targets) == [EOS] * 60 + list(range(3, 3 + lengths_of("train", 60).sum()))


@pytest.mark.parametrize("mixture", [(), MIXTURE])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_rows_of_several_processes_make_the_same_global_batch_whatever_their_number(directory, packing, mixture):
    config = config_of(packing, 8, mixture)
    for step in (0, 1, 1_000_000):
        whole = open_train(config, directory, VOCAB_SIZE).batch(step)
        for processes in (2, 4):
            parts = [
                open_train(config, directory, VOCAB_SIZE, rows).batch(step)
                for rows in np.split(np.arange(8), processes)
            ]
            assert [len(part.tokens_BT) for part in parts] == [8 // processes] * processes
            assert_equal(joined(parts), whole)


def test_a_process_gathers_only_its_own_rows(directory, monkeypatch):
    rows = open_train(config_of(batch_size=8), directory, VOCAB_SIZE, np.array([2, 3]))
    asked = []
    (source,) = rows._sources
    monkeypatch.setattr(source, "batch", lambda numbers, keys: asked.append((len(numbers), len(keys))))
    rows.batch(5)
    assert asked == [(2, 2)]


@pytest.mark.parametrize("through", ["tf.data", "threads"])
@pytest.mark.parametrize("mixture", [(), MIXTURE])
def test_a_run_resumed_anywhere_sees_what_the_uninterrupted_one_sees(directory, through, mixture):
    def run(start, stop):
        rows = open_train(config_of("bins", 5, mixture), directory, VOCAB_SIZE)
        return list(batches(rows.batch, start, stop, through=through))

    whole = run(0, 30)
    pieces = [batch for start, stop in ((0, 1), (1, 13), (13, 30)) for batch in run(start, stop)]
    for got, want in zip(pieces, whole, strict=True):
        assert_equal(got, want)


def test_a_mixture_draws_by_weight_and_each_source_keeps_its_own_epochs(directory):
    config = config_of("pad", 64, MIXTURE)
    rows = open_train(config, directory, VOCAB_SIZE)
    drawn = [[], [], []]
    for step in range(64):  # the whole pattern
        batch = rows.batch(step)
        for target, row in zip(batch.targets_BT, rows_of([batch]), strict=True):
            # A document without tokens says eos alone, and every source may have one.
            if target.max() > EOS:
                drawn[(target.max() - 3) // 4000].append(row)
    empty = 4096 - sum(map(len, drawn))
    for count, weight in zip(map(len, drawn), (5, 2, 1), strict=True):
        assert abs(count - 4096 * weight / 8) <= empty
    for seen in drawn:
        epoch = len(set(seen))
        assert len(set(seen[:epoch])) == epoch
        assert set(seen[epoch : 2 * epoch]) == set(seen[:epoch])


def test_another_seed_is_another_order(directory):
    one, other = config_of(), Config(seed=4, data=config_of().data, train=config_of().train)
    first = [open_train(config, directory, VOCAB_SIZE).batch(0).tokens_BT for config in (one, other)]
    assert not np.array_equal(*first)


@pytest.mark.parametrize("mixture", [(), MIXTURE])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("batch_size", [4, 12, 200])
def test_an_evaluation_holds_every_row_once_whatever_the_batch_and_the_processes(
    directory, packing, mixture, batch_size
):
    config = config_of(packing, batch_size, mixture)
    whole = open_eval(config, directory, VOCAB_SIZE)
    halves = [open_eval(config, directory, VOCAB_SIZE, rows) for rows in np.split(np.arange(batch_size), 2)]
    lengths = {"news": [3, 40], "poems": [20]} if mixture else {"": lengths_of("valid", 11)}
    assert whole.keys() == halves[0].keys() == lengths.keys()
    for name, rows in whole.items():
        batch_list = [rows.batch(i) for i in range(rows.num_batches)]
        for i, batch in enumerate(batch_list):
            assert_equal(joined([half[name].batch(i) for half in halves]), batch)
            assert len(batch.tokens_BT) == batch_size
        count = np.array(lengths[name])
        real = np.concatenate([batch.targets_BT[batch.weights_BT > 0] for batch in batch_list])
        assert len(real) == len(np.unique(real[real != EOS])) + len(count) == count.sum() + len(count)
        assert rows.num_bytes() == (5 * count + 1).sum()
        filler = slice(rows.num_rows - (rows.num_batches - 1) * batch_size, None)
        assert all((part[filler] == 0).all() for part in batch_list[-1] if part is not None)
        examples = np.concatenate([rows.examples(i) for i in range(rows.num_batches)])
        assert (examples[: rows.num_rows] >= 0).all() and (examples[rows.num_rows :] == -1).all()


def test_an_evaluation_may_be_limited_to_some_batches(directory):
    whole = open_eval(config_of("pad", 2), directory, VOCAB_SIZE)[""]
    some = open_eval(config_of("pad", 2, eval_batches=3), directory, VOCAB_SIZE)[""]
    assert (some.num_batches, some.num_rows) == (3, 6)
    assert some.num_bytes() < whole.num_bytes()
    assert_equal(some.batch(2), whole.batch(2))


def test_an_evaluation_hands_out_its_documents(directory):
    found = open_eval(config_of(mixture=MIXTURE), directory, VOCAB_SIZE)
    ids = {name: [ids.tolist() for ids in rows.documents()] for name, rows in found.items()}
    assert ids == {"news": [list(range(3, 6)), list(range(6, 46))], "poems": [list(range(8003, 8023))]}
    assert found["poems"].shards.num_examples == 1


def test_without_held_out_documents_there_is_no_evaluation(tmp_path):
    write_split(tmp_path / "train", [100])
    write_split(tmp_path / "test", [7])
    write_manifest(tmp_path)
    assert open_eval(config_of(), tmp_path, VOCAB_SIZE) == {}
    assert open_eval(config_of(), tmp_path, VOCAB_SIZE, split="test")[""].num_rows == 1
    assert open_eval(config_of(source="synthetic"), tmp_path, VOCAB_SIZE) == {}


def test_a_token_outside_the_vocabulary_is_refused_with_its_document(tmp_path):
    write_split(tmp_path / "train", [40, 40, 40])
    write_manifest(tmp_path)
    path = tmp_path / "train" / "tokens-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[57] = 50_000
    ids.tofile(path)
    rows = open_train(config_of(), tmp_path, VOCAB_SIZE)
    with pytest.raises(DataError, match=f"^token 50000 in document 1 of {tmp_path}/train, vocabulary {VOCAB_SIZE}$"):
        for step in range(2):
            rows.batch(step)


SHORT = "DIR/train holds 1497 slots, fewer than one row of 4096 (data.seq_len)"


@pytest.mark.parametrize(
    ("damage", "error", "message", "arguments"),
    [
        (None, InputMissing, SHORT, {"seq_len": 4096}),
        (None, ConfigError, "model.vocab_size 256 is too small: DIR/train needs 20000", {"vocab_size": 256}),
        ("empty", InputMissing, "there are no tokens in DIR/train", {}),
        ("manifest", InputMissing, "DIR holds no prepared data (no manifest.json): run prepare", {}),
        (
            "tokenizer",
            DataError,
            "DIR/manifest.json does not name the tokenizer's bos_id and eos_id: run prepare again",
            {},
        ),
        ("shard", DataError, "DIR/train lacks tokens-00001.bin of its manifest.json: restore or prepare again", {}),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(tmp_path, damage, error, message, arguments):
    write_split(tmp_path / "train", [0, 0] if damage == "empty" else lengths_of("train", 60))
    if damage != "manifest":
        write_manifest(tmp_path)
    if damage == "tokenizer":
        (tmp_path / "manifest.json").write_text("{}")
    if damage == "shard":
        (tmp_path / "train" / "tokens-00001.bin").unlink()
    settings = {"vocab_size": VOCAB_SIZE, "seq_len": 16} | arguments
    with pytest.raises(error) as caught:
        open_train(config_of(seq_len=settings.pop("seq_len")), tmp_path, **settings)
    assert str(caught.value).replace(str(tmp_path), "DIR") == message


def test_an_evaluation_may_be_shorter_than_a_row(directory):
    rows = open_eval(config_of(seq_len=4096), directory, VOCAB_SIZE)[""]
    assert (rows.num_batches, rows.num_rows) == (1, 1)
