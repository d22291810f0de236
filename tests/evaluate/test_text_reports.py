"""What is written down can be read: by people, and by SQuAD's scorer."""

import json

import pytest

from lslm_jax.evaluate import text_reports
from lslm_jax.evaluate.classification_metrics import classification


def test_a_translation_stands_between_its_source_and_its_reference():
    text = text_reports.translations(["Ein Hund.", "Zwei."], ["A cat.", ""], ["A dog.", "Two."])
    assert text.splitlines() == [
        "source:     Ein Hund.",
        "hypothesis: A cat.",
        "reference:  A dog.",
        "",
        "source:     Zwei.",
        "hypothesis: ",
        "reference:  Two.",
    ]


def test_predictions_are_an_object_from_id_to_text():
    text = text_reports.squad_predictions(["b7", "a1"], ["Orléans\n", ""])
    assert json.loads(text) == {"b7": "Orléans\n", "a1": ""}
    assert "Orléans" in text


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        text_reports.squad_predictions(["a"], [])
    with pytest.raises(ValueError, match="shorter"):
        text_reports.translations(["a", "b"], ["a", "b"], ["a"])


def report_of(gold, said, names) -> str:
    return text_reports.classification(gold, said, names, classification(gold, said, names))


def test_tables_of_classes_and_of_what_was_taken_for_what():
    assert report_of([0, 0, 0, 1], [0, 0, 1, -1], ["no", "yes"]).splitlines() == [
        "                 precision  recall      f1  support",
        "no                  1.0000  0.6667  0.8000        3",
        "yes                 0.0000  0.0000  0.0000        1",
        "mean of classes     0.5000  0.3333  0.4000        4",
        "accuracy                            0.5000        4",
        "",
        "true \\ predicted  no  yes  (none)",
        "no                 2    1       0",
        "yes                0    0       1",
    ]


def test_a_matrix_too_wide_to_read_is_left_out():
    names = [f"class {number}" for number in range(text_reports.MAX_CONFUSION + 1)]
    text = report_of([0, 1], [0, 0], names)
    assert "true" not in text and all(name in text for name in names)
    assert "true" in report_of([0, 1], [0, 0], names[:-1])
