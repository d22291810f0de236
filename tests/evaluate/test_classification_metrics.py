"""Scores of classes, numbers and tags against scikit-learn called otherwise, formulas, and cases done by hand."""

import json
import math
import sys

import numpy as np
import pytest
import sklearn.metrics

from lslm_jax.errors import ConfigError, DataError
from lslm_jax.evaluate import classification_metrics as scoring
from lslm_jax.evaluate.classification_metrics import classification, confusion, entities, regression, tagging

NAMES = ["negative", "neutral", "positive"]
GOLD = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
SAID = [0, 0, 0, 2, 1, 0, 2, 2, 0, 0]  # by hand: 6 of 10 right


@pytest.fixture(params=range(4))
def many(request):
    rng = np.random.default_rng(request.param)
    gold_N = rng.integers(0, 3, 200)
    return gold_N, np.where(rng.random(200) < 0.6, gold_N, rng.integers(0, 3, 200))


def test_a_case_done_by_hand():
    scores = classification(GOLD, SAID, NAMES)
    assert scores["accuracy"] == 0.6
    assert [scores[f"precision/{name}"] for name in NAMES] == pytest.approx([3 / 6, 1, 2 / 3])
    assert [scores[f"recall/{name}"] for name in NAMES] == pytest.approx([3 / 4, 1 / 2, 2 / 4])
    assert [scores[f"f1/{name}"] for name in NAMES] == pytest.approx([6 / 10, 2 / 3, 4 / 7])
    assert [scores[f"support/{name}"] for name in NAMES] == [4, 2, 4]
    assert scores["f1_macro"] == pytest.approx((6 / 10 + 2 / 3 + 4 / 7) / 3)
    assert confusion(GOLD, SAID, NAMES).tolist() == [[3, 0, 1], [1, 1, 0], [2, 0, 2]]


def test_scores_are_those_of_scikit_learn(many):
    gold_N, said_N = many
    scores = classification(gold_N, said_N, NAMES)
    report = sklearn.metrics.classification_report(gold_N, said_N, target_names=NAMES, output_dict=True)
    assert scores["accuracy"] == report["accuracy"]
    for kind, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert scores[f"{kind}_macro"] == pytest.approx(report["macro avg"][theirs], rel=1e-12)
        assert [scores[f"{kind}/{name}"] for name in NAMES] == [report[name][theirs] for name in NAMES]
    assert [scores[f"support/{name}"] for name in NAMES] == [report[name]["support"] for name in NAMES]
    assert scores["matthews"] == sklearn.metrics.matthews_corrcoef(gold_N, said_N)


def test_for_two_classes_matthews_is_the_correlation_of_the_numbers(many):
    gold_N, said_N = (np.minimum(classes, 1) for classes in many)
    scores = classification(gold_N, said_N, ["no", "yes"])
    assert scores["matthews"] == pytest.approx(np.corrcoef(gold_N, said_N)[0, 1])


def test_scores_are_numbers_that_json_can_hold():
    scores = classification(GOLD, SAID, NAMES)
    assert json.loads(json.dumps(scores)) == scores
    assert json.loads(json.dumps(confusion(GOLD, SAID, NAMES).tolist()))


@pytest.mark.parametrize(
    ("gold", "said", "f1", "matthews"),
    [
        ([0, 1, 2], [0, 0, 0], [1 / 2, 0, 0], 0),  # two are never predicted
        ([0, 0, 0], [0, 1, 2], [1 / 2, 0, 0], 0),  # two never occur
        ([0, 0, 0], [0, 0, 0], [1, 0, 0], 0),  # one only
        ([1], [1], [0, 1, 0], 0),
        ([1], [2], [0, 0, 0], 0),
        ([0, 1, 2], [0, 1, 2], [1, 1, 1], 1),
        ([0, 1], [-1, -1], [0, 0, 0], 0),  # none is a class at all
    ],
)
def test_classes_that_are_missing_on_either_side_score_0_without_a_warning(gold, said, f1, matthews):
    scores = classification(gold, said, NAMES)
    assert [scores[f"f1/{name}"] for name in NAMES] == pytest.approx(f1)
    assert scores["f1_macro"] == pytest.approx(np.mean(f1))
    assert scores["matthews"] == pytest.approx(matthews)


def test_a_text_is_a_class_only_if_it_is_its_name():
    texts = ["positive", " positive\n", "Positive", "positive.", "", "negative positive", "neutral"]
    assert scoring.classes_of_texts(texts, NAMES).tolist() == [2, 2, -1, -1, -1, -1, 1]


def test_a_text_that_is_no_class_counts_as_wrong():
    scores = scoring.text_classification([2, 2, 0, 0], ["positive", "very positive", "negative", "positive"], NAMES)
    assert scores["accuracy"] == 2 / 4
    assert scores["invalid"] == 1 / 4
    assert scores["precision/positive"] == 1 / 2 == scores["recall/positive"]  # what is no class was not predicted
    assert scoring.text_classification([0], ["negative"], NAMES)["invalid"] == 0


def test_what_is_no_class_has_a_column_of_its_own_where_there_is_any():
    assert confusion([0, 1, 2, 2], [0, -1, -1, 2], NAMES).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "score", [lambda g, p: classification(g, p, NAMES), regression, lambda g, p: confusion(g, p, NAMES)]
)
@pytest.mark.parametrize(("gold", "said"), [([], []), ([1], []), ([1, 1], [1])])
def test_what_cannot_be_compared_is_refused(score, gold, said):
    with pytest.raises(DataError, match=f"{len(said)} predictions for {len(gold)} examples"):
        score(gold, said)


@pytest.mark.parametrize(("gold", "said"), [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-2])])
def test_a_class_without_a_name_is_refused(gold, said):
    with pytest.raises(DataError, match="3 names"):
        classification(gold, said, NAMES)


def ranks(values) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    values = np.asarray(values)
    return np.asarray([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_correlations_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    gold_N = rng.integers(0, 6, 80) / 5  # with ties
    said_N = np.round(gold_N + rng.normal(size=80), 1)
    scores = regression(gold_N, said_N)
    assert scores["pearson"] == pytest.approx(np.corrcoef(gold_N, said_N)[0, 1])
    assert scores["spearman"] == pytest.approx(np.corrcoef(ranks(gold_N), ranks(said_N))[0, 1])
    assert scores["mse"] == pytest.approx(sum((g - s) ** 2 for g, s in zip(gold_N, said_N, strict=True)) / 80)


def test_order_alone_makes_spearman_1():
    scores = regression([1, 2, 3, 4], [1, 10, 100, 1000])
    assert scores["spearman"] == pytest.approx(1) and scores["pearson"] < 0.9


@pytest.mark.parametrize(
    ("gold", "said"),
    [([1.0], [2.0]), ([1, 2], [3, 3]), ([2, 2], [1, 3]), ([1, 2, 3], [1, 2, math.nan]), ([1, 2, 3], [1, 2, math.inf])],
)
def test_a_correlation_that_is_not_defined_is_nan_without_a_warning(gold, said):
    scores = regression(gold, said)
    assert math.isnan(scores["pearson"]) and math.isnan(scores["spearman"])
    assert math.isfinite(scores["mse"]) == math.isfinite(said[-1])


def test_predictions_almost_constant_do_not_warn():
    assert math.isfinite(regression([1, 2, 3], [1, 1 + 1e-15, 1 + 2e-15])["mse"])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-PER", [("PER", 0, 1)]),
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER I-PER", [("PER", 0, 2)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # two side by side
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type goes on with nothing
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # a forgotten beginning
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("B-PER I-PER B-LOC I-LOC", [("PER", 0, 2), ("LOC", 2, 4)]),
        ("B-work-of-art I-work-of-art", [("work-of-art", 0, 2)]),
    ],
)
def test_entities_begin_and_end_where_the_tags_say(tags, expected):
    assert entities(tags.split()) == set(expected)


BIO = ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]


def numbers(*sentences: str) -> list[list[int]]:
    return [[BIO.index(tag) for tag in sentence.split()] for sentence in sentences]


def test_tags_done_by_hand():
    gold = numbers("B-PER I-PER O B-LOC", "O", "B-LOC I-LOC O B-PER")
    said = numbers("B-PER I-PER O B-PER", "O", "B-LOC O O B-PER")  # 7 words of 9; entities 2 of 4, of 4 predicted
    scores = tagging(gold, said, BIO)
    assert scores["accuracy"] == pytest.approx(7 / 9)
    assert scores["f1/B-PER"] == pytest.approx(2 * (2 / 3 * 1) / (2 / 3 + 1))
    assert scores["f1/I-LOC"] == 0
    assert (scores["entity_precision"], scores["entity_recall"], scores["entity_f1"]) == (2 / 4, 2 / 4, 2 / 4)
    assert scores["entity_f1/PER"] == pytest.approx(4 / 5)  # 2 right, 3 predicted, 2 true
    assert scores["entity_f1/LOC"] == 0  # 0 right, 1 predicted, 2 true
    assert json.loads(json.dumps(scores)) == scores


def test_precision_counts_what_was_predicted_and_recall_what_is_true():
    scores = tagging(numbers("B-PER O O O"), numbers("B-PER B-PER O B-LOC"), BIO)
    assert (scores["entity_precision"], scores["entity_recall"]) == (1 / 3, 1)


def test_an_entity_does_not_reach_into_the_next_sentence():
    apart, together = numbers("O B-PER", "I-PER O"), numbers("O B-PER I-PER O")
    assert tagging(apart, apart, BIO)["entity_f1"] == 1 == tagging(together, together, BIO)["entity_f1"]
    moved = tagging(numbers("O B-PER", "O O"), numbers("O O", "O B-PER"), BIO)
    assert moved["entity_f1"] == 0  # the same place in another sentence


@pytest.mark.parametrize("names", [["NOUN", "VERB", "O"], ["O", "I-PER", "S-PER"], ["O"]])
def test_tags_that_are_no_bio_have_no_entities(names):
    scores = tagging([[0, 0]], [np.asarray([0, 0])], names)
    assert scores["accuracy"] == 1 and not [name for name in scores if "entity" in name]


def test_no_entities_at_all_score_0_without_a_warning():
    assert tagging(numbers("O O"), numbers("O O"), BIO)["entity_f1"] == 0


@pytest.mark.parametrize(("gold", "said"), [([[0]], []), ([[0, 1]], [[0]]), ([[0], [1, 1]], [[0, 0], [1]])])
def test_sentences_that_differ_in_length_are_refused(gold, said):
    with pytest.raises(DataError, match="number or length"):
        tagging(gold, said, BIO)


@pytest.mark.parametrize("nothing", [[], [[]]])
def test_no_words_are_refused(nothing):
    with pytest.raises(DataError, match="0 predictions for 0 examples"):
        tagging(nothing, nothing, BIO)


@pytest.mark.parametrize(
    ("module", "package", "score"),
    [
        ("sklearn.metrics", "scikit-learn", lambda: classification(GOLD, SAID, NAMES)),
        ("scipy.stats", "scipy", lambda: regression([1, 2], [1, 2])),
    ],
)
def test_without_its_package_it_says_how_to_get_it(monkeypatch, module, package, score):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        score()
