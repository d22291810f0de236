"""Masking: the right share of the right tokens, drawn evenly, and whole words where they are asked for."""

import numpy as np
import pytest
from tiny_data import BOS, EOS, PACKINGS, VOCAB_SIZE, Case, config_of, write_all, write_manifest

from lslm_jax.data.dataloader import open_eval, open_train
from lslm_jax.data.objectives.masked_lm import choose_words, num_predictions
from lslm_jax.data.shards import ShardWriter
from lslm_jax.data.tokenizers.bytes import Bytes

MASKED = Case("masked", "encoder")
SIZE = VOCAB_SIZE + 1
MASK = VOCAB_SIZE


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("masked")
    write_all(path, MASKED)
    return path


def restored(batch):
    """What stood in the rows before tokens were hidden."""
    ids = batch.tokens_BT.copy()
    used = np.nonzero(batch.weights_BT)
    ids[used[0], batch.places_BP[used]] = batch.targets_BT[used]
    return ids


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_an_epoch_shows_each_token_once_between_bos_and_eos_and_hides_a_share(directory, packing, rate):
    rows = open_train(config_of(MASKED, packing, batch_size=1, task={"mask_rate": rate}), directory, SIZE)
    seen = []
    for step in range(rows.num_rows):
        batch = rows.batch(step)
        ids = restored(batch)[0]
        real = ids[batch.segments_BT[0] > 0]
        text = (real != BOS) & (real != EOS)
        seen.extend(real.tolist())
        places = batch.places_BP[0][batch.weights_BT[0] > 0]
        assert len(places) == max(round(rate * text.sum()), min(1, text.sum()))
        assert (np.diff(places) > 0).all() and text[places].all(), "neither bos nor eos nor padding is predicted"
        assert (batch.places_BP[batch.weights_BT == 0] == 0).all() and (
            batch.targets_BT[batch.weights_BT == 0] == 0
        ).all()
        begins = batch.positions_BT[0][: len(real)] == 0
        np.testing.assert_array_equal(np.cumsum(begins), batch.segments_BT[0][: len(real)])
        assert (begins[1:] >= (real[:-1] == EOS)).all()
    lengths = np.diff(rows._sources[0].shards.starts)
    assert sorted(seen) == sorted([BOS, EOS] * len(lengths) + list(range(3, 3 + lengths.sum())))


def test_eight_of_ten_are_hidden_one_is_replaced_and_one_is_left(tmp_path):
    writer = ShardWriter(tmp_path / "train", VOCAB_SIZE, 1 << 20)
    rng = np.random.default_rng(0)
    writer.add([rng.integers(3, VOCAB_SIZE, 200_000)], 1, 1)
    writer.finish()
    write_manifest(tmp_path)
    rows = open_train(config_of(MASKED, batch_size=64, seq_len=256), tmp_path, SIZE)
    hidden = same = 0
    replaced, counts = [], np.zeros(256)
    for step in range(12):
        batch = rows.batch(step)
        used = np.nonzero(batch.weights_BT)
        new = batch.tokens_BT[used[0], batch.places_BP[used]]
        hidden += np.count_nonzero(new == MASK)
        same += np.count_nonzero(new == batch.targets_BT[used])
        replaced.append(new[(new != MASK) & (new != batch.targets_BT[used])])
        counts += np.bincount(batch.places_BP[used], minlength=256)
    replaced = np.concatenate(replaced)
    total = hidden + same + len(replaced)
    # Within about four standard deviations of 29,000 draws.
    np.testing.assert_allclose([hidden / total, same / total, len(replaced) / total], [0.8, 0.1, 0.1], atol=0.01)
    share = np.histogram(replaced, 10, (0, VOCAB_SIZE))[0] / len(replaced)
    np.testing.assert_allclose(share, 0.1, atol=0.025)
    np.testing.assert_allclose(counts[1:-1] / (12 * 64), 0.15, atol=0.06)


def test_without_walls_between_documents_only_padding_is_kept_apart(directory):
    walls, none = (
        open_eval(config_of(MASKED, mask_documents=mask), directory, SIZE)[""].batch(0) for mask in (True, False)
    )
    assert none.positions_BT is None
    np.testing.assert_array_equal(none.segments_BT, walls.segments_BT > 0)
    np.testing.assert_array_equal(none.tokens_BT, walls.tokens_BT)


def words_of(seed, length=60):
    """Rows of words of random length, with other cells between them."""
    rng = np.random.default_rng(seed)
    text = rng.random((7, length)) < 0.9
    begins = text & ((rng.random(text.shape) < 0.4) | ~np.pad(text, ((0, 0), (1, 0)))[:, :-1])
    return text, begins, rng.integers(0, 1 << 63, 7, np.uint64)


def test_words_are_hidden_whole_and_the_room_for_them_is_used():
    for seed in range(30):
        text, begins, keys = words_of(seed)
        counts = np.maximum(1, np.rint(0.15 * text.sum(axis=1))).astype(np.int64)
        places = choose_words(keys, text, begins, counts, num_predictions(60, 0.15))
        for row in range(7):
            chosen = np.zeros(61, bool)
            chosen[places[row]] = True
            word = np.where(text[row], np.cumsum(begins[row]), 0)
            sizes = np.bincount(word)[1:]
            share = np.bincount(word, chosen[:60])[1:] / sizes
            assert set(share) <= {0.0, 1.0} and not (chosen[:60] & ~text[row]).any()
            room = counts[row] - chosen[:60].sum()
            assert room >= 0 and (sizes[share == 0] > room).all(), "no word that would fit is left out"


def test_one_word_is_hidden_where_all_have_more_tokens_than_the_share():
    text, begins = np.ones((1, 12), bool), np.arange(12)[None] % 4 == 0
    keys, counts = np.array([7], np.uint64), np.array([2])
    places = choose_words(keys, text, begins, counts, 4)[0]
    assert len(places) == 4 and places[0] % 4 == 0 and places[-1] == places[0] + 3
    assert choose_words(keys, text, begins, counts, 3).shape == (1, 0)


def test_every_word_is_as_likely_as_any_other():
    text, begins = np.ones((20_000, 9), bool), np.zeros((20_000, 9), bool)
    begins[:, ::3] = True
    places = choose_words(np.arange(20_000, dtype=np.uint64), text, begins, np.full(20_000, 3), 3)
    np.testing.assert_allclose(np.bincount(places[:, 0] // 3) / 20_000, 1 / 3, atol=0.015)


@pytest.mark.parametrize("packing", PACKINGS)
def test_whole_words_of_a_tokenizer_are_hidden_whole(tmp_path, packing):
    words = Bytes()
    writer = ShardWriter(tmp_path / "train", words.vocab_size, 1 << 20)
    for i in range(20):
        writer.add([words.encode(" ".join(["ab", "c", "def", "ghij"][(i * j) % 4] for j in range(i)))], 1, i + 1)
    writer.finish()
    write_manifest(tmp_path, vocab_size=words.vocab_size, file=words.save(tmp_path))
    config = config_of(MASKED, packing, seq_len=64, task={"mask_rate": 0.3, "whole_words": True})
    rows = open_train(config, tmp_path, words.vocab_size + 1)
    some = 0
    for step in range(rows.num_rows // 8 + 1):
        batch = rows.batch(step)
        for ids, places, weights in zip(restored(batch), batch.places_BP, batch.weights_BT, strict=True):
            chosen = np.zeros(64, bool)
            chosen[places[weights > 0]] = True
            starts = (ids == words.encode(" ")[0]) | (ids == EOS) | (ids == BOS) | (ids == 0)
            starts[1:] |= ids[:-1] == BOS
            inside = ~starts[1:]
            assert (chosen[1:][inside] == chosen[:-1][inside]).all()
            some += chosen.any()
    assert some
