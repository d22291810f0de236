"""SQuAD's scores against a second computation from the papers' words; answers against a search through all spans."""

import gzip
import json
import math
import random
import re
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest

from lslm_jax.errors import DataError
from lslm_jax.evaluate.squad_metrics import Context, Windows, best_answers, normalise, squad


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case, punctuation, and the articles among them."""
    kept = "".join(c for c in text.lower() if not ("!" <= c <= "~") or c.isalnum())
    pieces = ["".join(run) for _, run in groupby(kept, str.isalnum)]
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def overlap(said: list[str], true: list[str]) -> float:
    """F1 of two bags of words."""
    rest, shared = list(true), 0
    for word in said:
        if word in rest:
            rest.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(true)
    return 2 * precision * recall / (precision + recall)


def mean(values: list[float]) -> float:
    return 100 * math.fsum(values) / len(values)


def scores_1(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    """The metrics of SQuAD 1.1: the best over a question's answers, the mean over questions."""
    pairs = [(words(p), [words(a) for a in given]) for p, given in zip(predictions, answers, strict=True)]
    return {
        "exact_match": mean([float(said in given) for said, given in pairs]),
        "f1": mean([max(overlap(said, a) for a in given) for said, given in pairs]),
    }


def scores_2(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    """Those of SQuAD 2.0: a question without an answer asks for nothing, and only nothing gets 1."""
    rows = []
    for p, given in zip(predictions, answers, strict=True):
        said, true = words(p), [words(a) for a in given if words(a)] or [[]]
        exact = float(said in true)
        rows.append((bool(given), exact, exact if not said or true == [[]] else max(overlap(said, a) for a in true)))
    groups = {"": rows, "/has_answer": [r for r in rows if r[0]], "/no_answer": [r for r in rows if not r[0]]}
    return {
        f"{name}{suffix}": mean([row[place] for row in members])
        for suffix, members in groups.items()
        if members
        for place, name in ((1, "exact_match"), (2, "f1"))
    }


def questions(path) -> Iterator[tuple[str, list[str]]]:
    """Context and answers of each question of a SQuAD file."""
    for article in json.loads(gzip.decompress(path.read_bytes()))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield paragraph["context"], [answer["text"] for answer in question["answers"]]


def guesses(path, seed: int) -> tuple[list[str], list[list[str]]]:
    """For each question an answer that is right, nearly right, nothing, or any part of the context; the true ones."""
    chance = random.Random(seed)
    said, true = [], []
    for context, answers in questions(path):
        begin = chance.randrange(len(context))
        other = context[begin : begin + chance.randrange(1, 60)]
        right = chance.choice(answers) if answers else ""
        said.append(chance.choice([right, right.upper() + ".", f"The {right}", f"{right} {other}", other, ""]))
        true.append(answers)
    return said, true


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("version", "expected"), [("1.1", scores_1), ("2.0", scores_2)])
def test_scores_are_those_of_the_definition_on_real_questions(shared, version, expected, seed):
    said, true = guesses(shared / "qa" / f"squad_v{version}" / "dev_part.json.gz", seed)
    assert squad(said, true) == pytest.approx(expected(said, true), rel=1e-12)


def test_the_answers_themselves_score_100(shared):
    for version in ("1.1", "2.0"):
        true = [answers for _, answers in questions(shared / "qa" / f"squad_v{version}" / "dev_part.json.gz")]
        assert set(squad([answers[-1] if answers else "" for answers in true], true).values()) == {100.0}


# Blanks of all kinds; articles beside marks of ASCII and of other alphabets; numbers, accents, scripts without spaces.
NASTY = "|a|the|The a, an!|...|THE  cat.|the\u00a0cat|un\ttwo\nthree| |a cat a cat|cat|cat cat|theatre|cat's|cats"
NASTY += "|a-b|A\u2013b|an\u2019t|b\u2013the\u2013c|«Ja»|x_y|the_cat|a.m.|am|$12|12|1,000|1000|3.5%|35|①"
NASTY += "|é|e\u0301|Straße|STRASSE|İstanbul|東京|東京 都"
NASTY = NASTY.split("|")


@pytest.mark.parametrize("text", NASTY)
def test_texts_are_normalised_as_the_definition_says(text):
    assert normalise(text) == " ".join(words(text))


def test_all_pairs_of_nasty_texts_score_as_defined():
    said, true = [p for p in NASTY for _ in NASTY], [[a] for _ in NASTY for a in NASTY]
    assert squad(said, true) == pytest.approx(scores_1(said, true), rel=1e-12)
    for prediction, answers in zip(said, true, strict=True):
        pair = [prediction, "x"], [answers, []]
        assert squad(*pair) == pytest.approx(scores_2(*pair), rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap"),
    [
        ("The Eiffel Tower", "eiffel tower.", 1, 1),
        ("the tower", "a  Tower!", 1, 1),
        ("Eiffel Tower in Paris", "Eiffel Tower", 0, 2 * (2 / 4 * 1) / (2 / 4 + 1)),
        ("Tower Eiffel", "Eiffel Tower", 0, 1),  # a bag of words has no order
        ("new new york", "new york", 0, 4 / 5),  # a word counts as often as in both
        ("well-known", "wellknown", 1, 1),  # punctuation goes without leaving a space
        ("well known", "well-known", 0, 0),
        ("10\u201312", "10-12", 0, 0),  # only ASCII's punctuation is any
        ("« Paris »", "Paris", 0, 2 / 4),
        ("theatre", "atre", 0, 0),  # no article in it
        ("Ärzte", "ärzte", 1, 1),
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("", "the", 1, 0),  # of SQuAD 1.1: equal, but no word in common
    ],
)
def test_one_answer_by_hand(prediction, answer, exact, overlap):
    expected = pytest.approx({"exact_match": 100 * exact, "f1": 100 * overlap})
    assert squad([prediction], [[answer]]) == expected == squad([answer], [[prediction]])


def test_of_several_answers_the_best_counts_for_each_measure():
    assert squad(["in the year 1912"], [["1912", "year 1912 AD", "x"]]) == pytest.approx(
        {"exact_match": 0, "f1": 200 / 3}
    )
    assert squad(["1912"], [["1912 AD", "1912"]]) == {"exact_match": 100, "f1": 100}


def test_an_unanswerable_question_asks_for_the_empty_answer_only():
    answers = [["Paris"], ["Rome"], [], [], [], []]
    scores = squad(["Paris", "", "", "Paris", "the", " ."], answers)
    assert scores == pytest.approx(
        {
            "exact_match": 100 * 4 / 6,
            "f1": 100 * 4 / 6,
            "exact_match/has_answer": 50,
            "f1/has_answer": 50,
            "exact_match/no_answer": 75,
            "f1/no_answer": 75,
        }
    )


def test_answers_without_words_do_not_count_beside_unanswerable_questions():
    assert squad(["", "", "x"], [["the"], ["the", "cat"], []])["exact_match/has_answer"] == 50
    assert squad([""], [["the", "cat"]]) == {"exact_match": 100, "f1": 0}  # where all have answers they do


def test_only_unanswerable_questions_have_no_scores_over_the_others():
    assert squad(["", "x"], [[], []]) == {
        "exact_match": 50.0,
        "f1": 50.0,
        "exact_match/no_answer": 50.0,
        "f1/no_answer": 50.0,
    }


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["a"], []), (["a"], [["a"], ["b"]])])
def test_what_cannot_be_compared_is_refused(predictions, answers):
    with pytest.raises(DataError, match=f"{len(predictions)} predictions for {len(answers)} questions"):
        squad(predictions, answers)


def context_of(text: str) -> Context:
    """Each word, or mark, with the white space before it, is a token, as in SentencePiece."""
    spans = [match.span() for match in re.finditer(r"\s*(?:\w+|[^\w\s])", text)]
    return Context(text, *(np.asarray(ends, np.int64) for ends in zip(*spans, strict=True)))


def cut(lengths: list[int], size: int, stride: int, seed: int, positions: int = 40) -> Windows:
    """Windows over contexts of these lengths, with random logits: also before, behind and far from the context."""
    rng = np.random.default_rng(seed)
    rows = []
    for example, length in enumerate(lengths):
        place = int(rng.integers(2, positions - size))  # as long as its question
        firsts = [0, *range(stride, max(length - size + stride, 1), stride)]
        rows += [(example, first, min(size, length - first), place) for first in firsts]
    shuffled = rng.permutation(np.asarray(rows))
    logits = rng.normal(size=(2, len(rows), positions)).astype(np.float32)
    logits[:, :, 1::7] += 4  # some of them outside of the window
    logits[:, :, 0] += 7  # no answer is a match for the best
    return Windows(*shuffled.T, *logits)


def by_search(windows: Windows, contexts: list[Context], max_answer: int, threshold: float) -> list[tuple]:
    """Each span of each window, one after the other: text, begin, end, score."""
    results = []
    for example, context in enumerate(contexts):
        spans, nulls = [(-math.inf, None)], [math.inf]
        for e, first, length, place, starts, ends in zip(*windows, strict=True):
            if e != example:
                continue
            nulls.append(starts[0] + ends[0])
            spans += [
                (starts[place + i] + ends[place + j], (first + i, first + j))
                for i in range(length)
                for j in range(i, min(length, i + max_answer))
            ]
        score, span = max(spans, key=lambda pair: pair[0])
        if span is None or min(nulls) - score > threshold:
            results.append(("", -1, -1, score, min(nulls)))
        else:
            begin, end = context.begins[span[0]], context.ends[span[1]]
            begin += len(context.text[begin:end]) - len(context.text[begin:end].lstrip())
            results.append((context.text[begin:end], begin, end, score, min(nulls)))
    return results


@pytest.mark.parametrize("max_answer", [1, 4, 100])
@pytest.mark.parametrize("threshold", [-math.inf, 0.0, math.inf])
def test_answers_are_those_of_a_search_through_all_spans(shared, max_answer, threshold):
    texts = sorted({context for context, _ in questions(shared / "qa" / "squad_v2.0" / "dev_part.json.gz")})[:40]
    contexts = [context_of(text) for text in texts]
    windows = cut([len(context.begins) for context in contexts], size=24, stride=10, seed=max_answer)
    answers = best_answers(windows, contexts, max_answer=max_answer, null_threshold=threshold)
    assert [tuple(answer) for answer in answers] == by_search(windows, contexts, max_answer, threshold)
    assert all(
        answer.text == contexts[i].text[answer.begin : answer.end] for i, answer in enumerate(answers) if answer.text
    )
    empty = sum(not answer.text for answer in answers)
    assert {-math.inf: empty == 40, 0.0: 0 < empty < 40, math.inf: empty == 0}[threshold]


TEXT = "In 1912 the old bridge fell down ."
WORDS = TEXT.split()


def one_window(
    start: str, end: str, *, first: int = 0, place: int = 3, null: float = -1.0, height: float = 5.0
) -> Windows:
    """A window from word `first` on that likes one span and nothing else."""
    logits = np.full((2, 1, 16), -2.0, np.float32)
    logits[:, 0, 0] = null / 2
    logits[0, 0, place + WORDS.index(start) - first] = height
    logits[1, 0, place + WORDS.index(end) - first] = height
    return Windows(*np.asarray([[0], [first], [len(WORDS) - first], [place]]), *logits)


def joined(*windows: Windows) -> Windows:
    return Windows(*(np.concatenate(parts) for parts in zip(*windows, strict=True)))


def answer(windows: Windows, max_answer: int = 30, null_threshold: float = 0.0):
    return best_answers(windows, [context_of(TEXT)], max_answer=max_answer, null_threshold=null_threshold)[0]


@pytest.mark.parametrize(("first", "place"), [(0, 3), (2, 3), (2, 8), (3, 1)])
def test_a_span_is_found_wherever_its_window_lies(first, place):
    found = answer(one_window("old", "fell", first=first, place=place))
    assert found == ("old bridge fell", 12, 27, 10.0, -1.0)


def test_an_answer_ends_after_its_start_and_is_not_too_long():
    assert answer(one_window("fell", "old")).text in ("fell", "old", "fell down .")
    assert answer(one_window("old", "fell"), max_answer=3).text == "old bridge fell"
    assert len(answer(one_window("old", "fell"), max_answer=2).text.split()) <= 2


def test_the_window_that_likes_a_span_most_decides():
    weak, strong = one_window("old", "fell", height=3.0), one_window("1912", "1912", height=4.0)
    for windows in (joined(weak, strong), joined(strong, weak)):
        assert (answer(windows).text, answer(windows).score) == ("1912", 8.0)


def test_no_answer_scores_what_it_scores_in_the_window_that_likes_it_least():
    low, high = one_window("old", "fell", null=-4.0), one_window("old", "fell", null=50.0, height=1.0)
    assert answer(joined(low, high)).null_score == -4 == answer(joined(high, low)).null_score
    assert answer(joined(low, high)).text == "old bridge fell"
    assert answer(high).text == ""


@pytest.mark.parametrize(("threshold", "text"), [(1.9, ""), (2.0, "old bridge fell"), (math.inf, "old bridge fell")])
def test_the_empty_answer_has_to_win_by_over_the_threshold(threshold, text):
    found = answer(one_window("old", "fell", null=12.0), null_threshold=threshold)
    assert (found.text, found.score, found.null_score) == (text, 10.0, 12.0)
    assert text or (found.begin, found.end) == (-1, -1)


def test_an_example_without_a_window_or_a_context_without_tokens_has_no_answer():
    contexts = [context_of(TEXT), Context("", [], []), context_of(TEXT)]
    empty = Windows(*np.asarray([[1], [0], [0], [5]]), *np.ones((2, 1, 16), np.float32))
    windows = joined(one_window("old", "fell"), empty)
    for threshold in (-100.0, 0.0, math.inf):
        found = best_answers(windows, contexts, max_answer=30, null_threshold=threshold)
        assert [a.text for a in found[1:]] == ["", ""]
        assert [a.score for a in found[1:]] == [-math.inf] * 2


def test_no_windows_at_all_give_no_answers():
    none = Windows(*np.zeros((4, 0), np.int64), *np.zeros((2, 0, 16), np.float32))
    assert [a.text for a in best_answers(none, [context_of(TEXT)] * 2, max_answer=3, null_threshold=0.0)] == ["", ""]


def test_a_model_that_has_diverged_answers_nothing():
    windows = one_window("old", "fell")
    assert answer(windows._replace(starts_NT=windows.starts_NT * math.nan)).text == ""


def test_white_space_at_its_ends_is_not_part_of_an_answer():
    context = Context("a \n b  c", [0, 1, 5], [1, 5, 8])
    windows = Windows(*np.asarray([[0], [0], [3], [1]]), *np.asarray([[[0, 0, 9, 0]], [[0, 0, 9, 0]]], np.float32))
    found = best_answers(windows, [context], max_answer=3, null_threshold=0.0)[0]
    assert found[:3] == ("b", 4, 5)
    blank = context._replace(text="a     c ", begins=[0, 1, 6], ends=[1, 6, 8])
    assert best_answers(windows, [blank], max_answer=3, null_threshold=0.0)[0].text == ""
