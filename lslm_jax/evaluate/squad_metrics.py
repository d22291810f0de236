"""Extractive question answering: answers from a model's logits, and their scores as SQuAD defines them.

Legend of the shapes: N windows, T positions of a row.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lslm_jax.errors import DataError

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores the answers to all questions, in percent.

    Where every question has an answer this is the definition of SQuAD 1.1 (Rajpurkar et al. 2016), else that of SQuAD
    2.0 (Rajpurkar et al. 2018): the right answer to a question without answers is the empty one. They differ otherwise
    only on texts of which `normalise` leaves nothing.

    Args:
      predictions: one for each question, "" for no answer.
      answers: those that people gave to each question, the best of which counts; none if it cannot be answered.

    Returns:
      `exact_match` and `f1`; with unanswerable questions also both over those with and those without an answer, as
      `f1/has_answer` and `f1/no_answer`.

    Raises:
      DataError: there are no questions, or not one prediction for each.
    """
    if not predictions or len(predictions) != len(answers):
        raise DataError(f"{len(predictions)} predictions for {len(answers)} questions cannot be scored")
    has_answer_N = np.asarray([len(given) > 0 for given in answers])
    score = _score_1 if has_answer_N.all() else _score_2
    scores = [
        score(normalise(prediction), [normalise(answer) for answer in given])
        for prediction, given in zip(predictions, answers, strict=True)
    ]
    scores_N2 = 100 * np.asarray(scores, np.float64)
    result = _means(scores_N2, "")
    if not has_answer_N.all():
        result |= _means(scores_N2[has_answer_N], "/has_answer") | _means(scores_N2[~has_answer_N], "/no_answer")
    return result


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words parted by single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def _score_1(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of a normalised prediction with that normalised answer that suits each of them best."""
    return float(said in answers), max(_f1(said.split(), answer.split()) for answer in answers)


def _score_2(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """As SQuAD 1.1, but answers without words do not count, and no words are just what no answer asks for."""
    answers = [answer for answer in answers if answer]
    if said and answers:
        return _score_1(said, answers)
    both_empty = float(not said and not answers)
    return both_empty, both_empty


def _f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, a word as often as it is in both; 0 where they share none."""
    shared = (Counter(said) & Counter(true)).total()
    return 2 * shared / (len(said) + len(true)) if shared else 0.0


def _means(scores_N2: np.ndarray, suffix: str) -> dict[str, float]:
    if not len(scores_N2):
        return {}
    exact, overlap = scores_N2.mean(axis=0).tolist()
    return {f"exact_match{suffix}": exact, f"f1{suffix}": overlap}


class Context(NamedTuple):
    """A text that holds answers, and where in it each of its tokens begins and ends, in characters."""

    text: str
    begins: Sequence[int] | np.ndarray
    ends: Sequence[int] | np.ndarray


class Windows(NamedTuple):
    """What a model says of parts of contexts, one a row; rows of padding are left out.

    Attributes:
      example_N: which example it belongs to.
      first_N: which token of the context it begins with.
      length_N: how many tokens of the context it holds.
      place_N: at which position of the row it begins.
      starts_NT: logits of an answer that starts at a position of the row; position 0 stands for no answer.
      ends_NT: of one whose last token is there.
    """

    example_N: np.ndarray
    first_N: np.ndarray
    length_N: np.ndarray
    place_N: np.ndarray
    starts_NT: np.ndarray
    ends_NT: np.ndarray


class Answer(NamedTuple):
    """An answer to one example.

    Attributes:
      text: a part of the context, without white space around it; "" for no answer.
      begin: of its first character in the context, and `end` that after its last; both -1 for no answer.
      score: sum of both logits of the best span; -inf where there is none.
      null_score: sum of both logits of no answer.
    """

    text: str
    begin: int
    end: int
    score: float
    null_score: float


def best_answers(
    windows: Windows, contexts: Sequence[Context], *, max_answer: int, null_threshold: float
) -> list[Answer]:
    """Finds each example's best answer over all its windows, as BERT does for SQuAD 2.0 (Devlin et al. 2019).

    Windows may overlap; a span scores what it scores in the window that likes it most. No answer scores what it scores
    in the window that likes it least, as one that holds the answer should. Of equal spans the earliest window's
    shortest counts.

    Args:
      windows: of all examples, in any order.
      contexts: one for each example.
      max_answer: tokens of the longest answer.
      null_threshold: "" is the answer if it scores more than the best span by over so much. math.inf for data in which
        every question has an answer.
    """
    score_N, start_N, stop_N = _best_spans(windows, max_answer)
    null_N = np.asarray(windows.starts_NT[:, 0] + windows.ends_NT[:, 0], np.float32)
    best: dict[int, int] = {}
    null_score = [np.inf] * len(contexts)
    for window, example in enumerate(windows.example_N.tolist()):
        null_score[example] = min(null_score[example], null_N[window].item())
        if score_N[window] > (score_N[best[example]] if example in best else -np.inf):
            best[example] = window
    answers = []
    for example, context in enumerate(contexts):
        window = best.get(example, -1)
        score = score_N[window].item() if window >= 0 else -np.inf
        if window < 0 or null_score[example] - score > null_threshold:
            answers.append(Answer("", -1, -1, score, null_score[example]))
        else:
            text, begin, end = _cut(context, start_N[window], stop_N[window])
            answers.append(Answer(text, begin, end, score, null_score[example]))
    return answers


def _best_spans(windows: Windows, max_answer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best span of each window: its score, and its first and last token, counted in the context."""
    place_T = np.arange(windows.starts_NT.shape[1])
    begin_N1 = windows.place_N[:, None]
    inside_NT = (place_T >= begin_N1) & (place_T < begin_N1 + windows.length_N[:, None])
    starts_NT, ends_NT = (
        np.where(inside_NT, np.asarray(logits_NT, np.float32), -np.inf)
        for logits_NT in (windows.starts_NT, windows.ends_NT)
    )
    rows_N = np.arange(len(starts_NT))
    score_N = np.full(len(starts_NT), -np.inf, np.float32)
    start_N, stop_N = np.zeros((2, len(starts_NT)), np.int64)
    for more in range(min(max_answer, len(place_T))):  # tokens after the first
        sums_NT = starts_NT[:, : len(place_T) - more] + ends_NT[:, more:]
        at_N = sums_NT.argmax(axis=1)
        better_N = sums_NT[rows_N, at_N] > score_N
        score_N = np.where(better_N, sums_NT[rows_N, at_N], score_N)
        start_N = np.where(better_N, at_N, start_N)
        stop_N = np.where(better_N, at_N + more, stop_N)
    shift_N = windows.first_N - windows.place_N
    return score_N, start_N + shift_N, stop_N + shift_N


def _cut(context: Context, start: int, stop: int) -> tuple[str, int, int]:
    """The text from one token to another, and its place, without white space at its ends."""
    begin, end = int(context.begins[start]), int(context.ends[stop])
    text = context.text[begin:end]
    begin += len(text) - len(text.lstrip())
    return text.strip(), begin, begin + len(text.strip())
