"""Span corruption: source and target together spell the text, and fill their rows."""

import numpy as np
import pytest
from tiny_data import BOS, EOS, VOCAB_SIZE, Case, config_of, write_all

from lslm_jax.data.dataloader import open_train
from lslm_jax.data.objectives import span_corruption
from lslm_jax.errors import ConfigError

SPANS = Case("span_corruption", "encoder_decoder")
SENTINELS = np.arange(VOCAB_SIZE, VOCAB_SIZE + 100)


def decode(source, target):
    """The inverse: each sentinel of the source is replaced by what follows it in the target."""
    assert source[-1] == target[-1] == EOS
    span_of, sentinel = {}, None
    for token in target[:-1]:
        if token in SENTINELS:
            sentinel = token
            span_of[sentinel] = []
        else:
            span_of[sentinel].append(token)
    text = []
    for token in source[:-1]:
        text += span_of.pop(token) if token in SENTINELS else [token]
    assert not span_of
    return text


def pieces(batch):
    """Source, what is read and what is said of each row, without padding."""
    for i in range(len(batch.tokens_BT)):
        real = batch.segments_BT[i] > 0
        np.testing.assert_array_equal(batch.weights_BT[i], real)
        yield batch.source_BS[i][batch.source_segments_BS[i] > 0], batch.tokens_BT[i][real], batch.targets_BT[i][real]


@pytest.mark.parametrize(("rate", "length"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.3, 8.0), (0.9, 2.0), (0.0, 0.5)])
def test_rows_decode_back_to_the_stream_of_documents_joined_by_eos(tmp_path, rate, length):
    splits = write_all(tmp_path, SPANS)
    task = {"mask_rate": rate, "span_length": length}
    rows = open_train(config_of(SPANS, batch_size=1, seq_len=400, task=task), tmp_path, VOCAB_SIZE + 100)
    (source,) = rows._sources
    numbers = np.arange(source.num_rows)
    text = []
    for i, (read, tokens, said) in enumerate(pieces(source.batch(numbers, numbers.astype(np.uint64)))):
        text += decode(read, said)
        np.testing.assert_array_equal(tokens, [BOS, *said[:-1]])
        used = said[np.isin(said, SENTINELS)]
        np.testing.assert_array_equal(used, SENTINELS[: len(used)])
        np.testing.assert_array_equal(read[np.isin(read, SENTINELS)], used)
        # Where spans are as many as what is kept, a source has an odd number of tokens.
        assert len(read) == (31 if rate == 0.9 else 32) or i == source.num_rows - 1, "all but the last are full"
    assert text == [token for (ids,), _ in splits["train"] for token in (*ids, EOS)]


@pytest.mark.parametrize("raw", [1, 2, 3, 4, 7])
def test_the_shortest_texts_decode_back_too(raw):
    sizes = span_corruption.lengths(np.full(50, raw), 0.15, 3.0)
    ids = np.tile(np.arange(10, 10 + raw, dtype=np.int32), (50, 1))
    keys = np.arange(50, dtype=np.uint64)
    for read, _, said in pieces(span_corruption.corrupt(ids, sizes, keys, SENTINELS, BOS, EOS, 16, 16)):
        assert decode(read, said) == list(range(10, 10 + raw))


def test_every_target_belongs_to_the_document_of_its_token_or_span():
    rng = np.random.default_rng(0)
    raw = np.array([60, 60, 23])
    document = np.where(np.arange(60) < raw[:, None], np.sort(rng.integers(0, 7, (3, 60)), axis=1), -1)
    ids = np.where(document >= 0, 100 + 1000 * document + np.arange(60), 0).astype(np.int32)
    sizes, keys = span_corruption.lengths(raw, 0.3, 3.0), np.arange(3, dtype=np.uint64)
    batch = span_corruption.corrupt(ids, sizes, keys, SENTINELS, BOS, EOS, 60, 40)
    found = span_corruption.documents_of_targets(document, sizes, keys, 40)
    assert ((found >= 0) == (batch.weights_BT > 0)).all()
    for row_found, row_ids, count in zip(found, batch.targets_BT, sizes.target, strict=True):
        for cell in range(count):
            # Ids from 100 on name their document; a sentinel has that of the next token, eos that of the last one.
            at = cell if 100 <= row_ids[cell] < VOCAB_SIZE else cell + 1 if cell < count - 1 else cell - 1
            assert row_found[cell] == (row_ids[at] - 100) // 1000


def test_the_usual_sizes_are_those_of_t5():
    assert span_corruption.raw_length(512, 114, 0.15, 3.0, 100) == 568
    full = span_corruption.lengths(568, 0.15, 3.0)
    assert (full.noise, full.spans, full.source, full.target) == (85, 28, 512, 114)


def test_a_source_row_is_always_filled_exactly():
    for source_len in range(3, 300):
        for rate, length in ((0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.05, 20.0)):
            raw = span_corruption.raw_length(source_len, 10_000, rate, length, 10_000)
            assert span_corruption.lengths(raw, rate, length).source == source_len
            assert span_corruption.lengths(raw + 1, rate, length).source == source_len + 1


def test_spans_are_of_the_mean_length_apart_and_anywhere():
    sizes = span_corruption.lengths(np.full(4000, 100), 0.15, 3.0)
    noise, first = span_corruption.draw_spans(sizes, np.arange(4000, dtype=np.uint64), 100)
    assert (noise.sum(axis=1) == 15).all() and (first.sum(axis=1) == 5).all()
    assert not (first & ~noise).any()
    np.testing.assert_array_equal(first[:, 1:], noise[:, 1:] & ~noise[:, :-1])
    assert not noise[:, 0].any() and noise[:, -1].all()
    # All divisions are equally likely: each kept part is 17 of 85 tokens on average, whichever it is.
    begins = np.nonzero(first)[1].reshape(4000, 5)
    np.testing.assert_allclose(begins.mean(axis=0), 17 + 20 * np.arange(5), rtol=0.04)
    assert len({tuple(row) for row in noise.tolist()}) == 4000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 113, "source_len": 512}, "data.seq_len=113 is too short .* it needs data.seq_len=114 "),
        ({"seq_len": 1000, "source_len": 2048}, "has 114 corrupted spans, the vocabulary 100 sentinels"),
        ({"seq_len": 24, "source_len": 2}, "data.source_len=2 is too short"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_what_would(tmp_path, settings, message):
    write_all(tmp_path, SPANS)
    with pytest.raises(ConfigError, match=message):
        open_train(config_of(SPANS, **settings), tmp_path, VOCAB_SIZE + 100)
