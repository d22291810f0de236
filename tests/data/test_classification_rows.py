"""One example a row: what it reads, what it should say, and windows that show every token of a context."""

import numpy as np
import pytest
from tiny_data import BOS, EOS, NUM_LABELS, VOCAB_SIZE, Case, config_of, write_all, write_examples, write_manifest

from lslm_jax.data.dataloader import open_eval, open_train
from lslm_jax.data.example_packing import cut
from lslm_jax.errors import ConfigError

SIZE = VOCAB_SIZE + 1
SEQ_LEN = 24
QA = Case("qa", "encoder", 2, 2)


def everything(directory, config):
    (source,) = open_train(config, directory, SIZE)._sources
    numbers = np.arange(source.num_rows)
    return source, source.batch(numbers, numbers.astype(np.uint64))


def read(batch, row):
    return batch.tokens_BT[row][batch.segments_BT[row] > 0].tolist()


def texts_of(tokens):
    """The texts between bos and the ends."""
    assert tokens[0] == BOS and tokens[-1] == EOS
    ends = [i for i, token in enumerate(tokens) if token == EOS]
    return [tokens[begin + 1 : end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("fields", [1, 2])
@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_a_label_belongs_to_one_text_or_two_which_are_cut_at_the_end(tmp_path, objective, fields):
    case = Case(objective, "encoder", fields, 1)
    examples = write_all(tmp_path, case)["train"]
    source, batch = everything(tmp_path, config_of(case))
    assert source.num_rows == len(examples)
    for row, (texts, (label,)) in enumerate(examples):
        lengths = [min(len(texts[0]), SEQ_LEN - 2)]
        if fields == 2:
            lengths = [int(n[0]) for n in cut(*(np.array([len(text)]) for text in texts), SEQ_LEN - 3)]
        expected = [text[:length].tolist() for text, length in zip(texts, lengths, strict=True)]
        tokens = read(batch, row)
        assert texts_of(tokens) == expected
        second = len(expected[0]) + 2
        types = np.zeros(SEQ_LEN, np.int32)
        types[second : len(tokens)] = 1
        np.testing.assert_array_equal(batch.types_BT[row], types)
        assert (batch.targets_BT[row, 0], batch.weights_BT[row, 0]) == (label, 1)
    assert batch.targets_BT.dtype == (np.int32 if objective == "classification" else np.float32)


@pytest.mark.parametrize(("objective", "unknown"), [("classification", -1.0), ("regression", np.nan)])
def test_an_unknown_label_does_not_count(tmp_path, objective, unknown):
    write_examples(tmp_path / "train", [([[3, 4]], [1.0]), ([[5]], [unknown])])
    write_manifest(tmp_path)
    _, batch = everything(tmp_path, config_of(Case(objective, "encoder", 1, 1)))
    np.testing.assert_array_equal(batch.weights_BT, [[1], [0]])
    np.testing.assert_array_equal(batch.targets_BT, [[1], [0]])


def test_the_first_token_of_each_word_has_its_tag(tmp_path):
    case = Case("tagging", "encoder", 2)
    examples = write_all(tmp_path, case)["train"]
    _, batch = everything(tmp_path, config_of(case))
    for row, ((tokens, tags), _) in enumerate(examples):
        kept = min(len(tokens), SEQ_LEN - 2)
        assert read(batch, row) == [BOS, *tokens[:kept].tolist(), EOS]
        expected = np.pad(tags[:kept], (1, SEQ_LEN - 1 - kept))
        np.testing.assert_array_equal(batch.weights_BT[row], expected > 0)
        np.testing.assert_array_equal(batch.targets_BT[row], np.maximum(expected - 1, 0))
    assert batch.targets_BT.max() == NUM_LABELS - 1


@pytest.mark.parametrize("stride", [1, 5, 1000])
@pytest.mark.parametrize("seq_len", [5, 24, 200])
def test_windows_show_every_token_of_each_context_and_where_its_answer_is(tmp_path, stride, seq_len):
    examples = write_all(tmp_path, QA)["train"]
    source, batch = everything(tmp_path, config_of(QA, seq_len=seq_len, task={"stride": stride}))
    numbers = np.arange(source.num_rows)
    of_row, windows = source.examples(numbers), source.windows(numbers)
    assert (np.diff(of_row) >= 0).all() and set(of_row) == set(range(len(examples)))
    for example, ((question, context), (first, last)) in enumerate(examples):
        shown, found = [], 0
        for row in np.flatnonzero(of_row == example):
            tokens = read(batch, row)
            asked, part = texts_of(tokens)
            assert asked == question[: min(64, (seq_len - 3) // 2)].tolist()
            begin = windows[row]
            assert part == context[begin : begin + len(part)].tolist()
            assert len(tokens) == seq_len or begin + len(part) == len(context), "a window holds as much as fits"
            assert begin == 0 or begin <= shown[-1] + 1, "no token between two windows"
            shown += range(begin, begin + len(part))
            inside = first >= begin and last < begin + len(part) and first >= 0
            target = batch.targets_BT[row]
            assert (batch.weights_BT[row] == 1).all()
            if inside:
                found += 1
                # Back from places in the row to places in the context.
                np.testing.assert_array_equal(target - (len(asked) + 2) + begin, [first, last])
                assert tokens[target[0] : target[1] + 1] == context[int(first) : int(last) + 1].tolist()
            else:
                assert (target == 0).all()
        assert set(shown) == set(range(len(context)))
        assert found or first < 0 or seq_len < 24 or stride > 20, "the overlap holds short answers"


def test_an_evaluation_tells_example_and_window_of_each_row_of_the_global_batch(tmp_path):
    write_all(tmp_path, QA)
    for share in np.split(np.arange(8), 2):
        rows = open_eval(config_of(QA), tmp_path, SIZE, share)[""]
        examples = np.concatenate([rows.examples(step) for step in range(rows.num_batches)])
        windows = np.concatenate([rows.windows(step) for step in range(rows.num_batches)])
        assert set(examples[: rows.num_rows]) == set(range(11))
        begins = np.flatnonzero(np.diff(examples[: rows.num_rows], prepend=-1))
        assert (windows[begins] == 0).all() and (np.delete(windows[: rows.num_rows], begins) > 0).all()
        assert len(rows.batch(0).tokens_BT) == 4


def test_rows_too_short_for_two_texts_are_refused(tmp_path):
    write_all(tmp_path, QA)
    with pytest.raises(ConfigError, match=r"^data\.seq_len=4 is too short for task\.objective=qa: use 5 or more$"):
        open_train(config_of(QA, seq_len=4), tmp_path, SIZE)
