"""What a row cuts off is counted and warned of, for every task; and how much one epoch is."""

import types

import numpy as np
import pytest
from etils import epath
from tiny_data import CASES, Case, config_of, write_all, write_examples, write_manifest

from lslm_jax.data import dataloader
from lslm_jax.evaluate import prediction_eval

VOCABULARY = 20_200


def remark(tmp_path, case_id: str, examples, **data) -> str:
    case = next(case for case in CASES if case.id == case_id)
    write_examples(tmp_path / "train", examples)
    write_manifest(tmp_path)
    [*found] = dataloader.open_train(config_of(case, **data), epath.Path(tmp_path), VOCABULARY).remarks()
    assert len(found) <= 1
    return found[0].partition("examples, ")[2].partition(" are longer than")[0] if found else ""


LONG, SHORT = list(range(3, 60)), [5, 6]


@pytest.mark.parametrize(
    ("case_id", "examples", "expected"),
    [
        ("classification-encoder-1", [([LONG], [0]), ([SHORT], [1])], "1 texts"),
        ("classification-encoder-2", [([SHORT, LONG], [0]), ([LONG, LONG], [1]), ([SHORT, SHORT], [1])], "2 texts"),
        ("regression-encoder-2", [([SHORT, SHORT], [0.5])], ""),
        ("tagging-encoder-2", [([LONG, [1, 0, 0] * 19], []), ([SHORT, [1, 2]], [])], "1 texts and 11 tags in them"),
        ("seq2seq-encoder_decoder-2", [([LONG, SHORT], []), ([LONG, LONG], [])], "2 sources and 1 targets"),
        ("seq2seq-decoder-2", [([LONG, SHORT], []), ([SHORT, LONG], [])], "1 sources and 1 targets"),
        ("qa-encoder-2", [([LONG, SHORT], [0, 1]), ([SHORT, LONG], [50, 52])], "1 questions"),
        ("qa-encoder-2", [([SHORT, LONG], [10, 45])], "1 answers"),
        ("causal-decoder-1", [([LONG], [])], ""),
    ],
)
def test_what_is_longer_than_a_row_is_counted(tmp_path, case_id, examples, expected):
    assert remark(tmp_path, case_id, examples) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_held_out_examples_are_counted_too(tmp_path, case, capsys):
    write_all(tmp_path, case)
    dataloader.open_eval(config_of(case), epath.Path(tmp_path), VOCABULARY)
    assert ("are longer than" in capsys.readouterr().err) == (case.fields + case.numbers > 1)


def test_the_line_names_the_directory_the_setting_and_the_loss(tmp_path):
    write_examples(tmp_path / "train", [([LONG], [0]), ([SHORT], [1])])
    write_manifest(tmp_path)
    case = next(case for case in CASES if case.id == "classification-encoder-1")
    assert dataloader.open_train(config_of(case), epath.Path(tmp_path), VOCABULARY).remarks() == [
        f"warning: {tmp_path}/train: of 2 examples, 1 texts are longer than data.seq_len=24 allows and are cut: what "
        "is beyond is neither read nor scored"
    ]


NAMES = ["O", "B-PER", "I-PER"]


def test_what_is_cut_away_is_missed(tmp_path):
    entity = [2, 3, 1]  # B-PER I-PER O, by number + 1 as on disk
    examples = [([list(range(3, 33)), entity * 10], []), ([list(range(33, 39)), entity * 2], [])]
    for split in ("train", "valid"):
        write_examples(tmp_path / split, examples)
    write_manifest(tmp_path)
    config = config_of(Case("tagging", "encoder", 2), seq_len=23)  # 21 words of the first text
    [part] = dataloader.open_eval(config, epath.Path(tmp_path), 20_200).values()
    batch = part.batch(0)
    rows = prediction_eval.Rows(np.eye(3)[batch.targets_BT], batch.targets_BT, batch.weights_BT, batch.types_BT)
    rows = prediction_eval.Rows(*(array[:2] for array in rows[:4]), nll_N=np.zeros(2))
    found = prediction_eval.tag(types.SimpleNamespace(labels=NAMES), part, rows).metrics
    assert found["accuracy"] == pytest.approx(27 / 36)
    assert found["entity_precision"] == 1 and found["entity_recall"] == pytest.approx(9 / 12)
    assert found["support/B-PER"] == 12
