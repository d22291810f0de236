"""Evaluation of what heads say: a class, a number, tags, or the answer to a question.

Legend of the shapes: N rows of all batches, P predictions of a row, T positions, V labels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lslm_jax.data.pipeline import EvalInput
from lslm_jax.evaluate import classification, report, runner, squad
from lslm_jax.evaluate.evaluator import Report, Setting, batches
from lslm_jax.train.step import make_predict_step


def scorer(setting: Setting) -> Callable[[Any, EvalInput], np.ndarray]:
    """Scores of each row of a set, [N, P, V] float32, those included that fill the last batch."""
    everywhere = NamedSharding(setting.mesh, PartitionSpec())
    step = jax.jit(make_predict_step(setting.config, setting.backend), out_shardings=everywhere)
    return lambda model, part: runner.gather(step, model, batches(part), setting.mesh)


def example_of_rows(part: EvalInput) -> np.ndarray:
    """The example behind each row, [N]; -1 for rows that fill the last batch."""
    return np.concatenate([part.examples(step) for step in range(part.num_batches)])


def classify(setting: Setting, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    """Accuracy, precision, recall, F1 and correlation of classes."""
    example_N = example_of_rows(part)
    gold_N = part.shards.numbers[example_N[example_N >= 0], 0].astype(np.int64)
    return class_report(gold_N, scores_NPV[example_N >= 0, 0].argmax(-1), setting.labels)


def class_report(gold_N: np.ndarray, predicted_N: np.ndarray, labels: list[str]) -> Report:
    """What there is to say of predicted classes."""
    found = classification.classification(gold_N, predicted_N, labels)
    table = report.classification(gold_N, predicted_N, labels, found)
    matrix = classification.confusion(gold_N, predicted_N, labels).tolist()
    return Report(found, {"classes.txt": table}, {"labels": labels, "confusion": matrix})


def regress(setting: Setting, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    """Correlations and squared error of numbers."""
    example_N = example_of_rows(part)
    gold_N = part.shards.numbers[example_N[example_N >= 0], 0]
    return Report(classification.regression(gold_N, scores_NPV[example_N >= 0, 0, 0]), {}, {})


def tag(setting: Setting, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    """Accuracy and F1 of the tags of words, and of entities where the tags spell such."""
    rows = [row for batch in batches(part) for row in zip(batch.targets_BT, batch.weights_BT > 0, strict=True)]
    real = np.flatnonzero(example_of_rows(part) >= 0)
    gold = [targets_T[counts_T] for targets_T, counts_T in (rows[i] for i in real)]
    predicted = [scores_NPV[i][rows[i][1]].argmax(-1) for i in real]
    return Report(classification.tagging(gold, predicted, setting.labels), {}, {})


def answer(setting: Setting, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    """Exact match and F1 of answers, as SQuAD defines them; the answers themselves by question."""
    examples = list(part.shards.examples())
    answerable = all(one["answers"] for one in examples)
    answers = find_answers(setting, part, scores_NPV, examples, answerable)
    seen = np.unique(example_of_rows(part))
    seen = seen[seen >= 0]  # all, unless eval.batches is set
    given = [[one["text"] for one in examples[i]["answers"]] for i in seen]
    found = squad.squad([answers[i].text for i in seen], given)
    predictions = report.squad_predictions([examples[i]["id"] for i in seen], [answers[i].text for i in seen])
    return Report(found, {"answers.json": predictions}, {})


def find_answers(
    setting: Setting, part: EvalInput, scores_NTV: np.ndarray, examples: list[dict[str, Any]], answerable: bool
) -> list[squad.Answer]:
    """The best answer to each question over all windows of its context; "" may be one unless all are answerable."""
    example_N = example_of_rows(part)
    first_N = np.concatenate([part.windows(step) for step in range(part.num_batches)])
    types_NT = np.concatenate([np.asarray(batch.types_BT) for batch in batches(part)])
    rows = example_N >= 0
    windows = squad.Windows(
        example_N[rows],
        first_N[rows],
        types_NT[rows].sum(-1) - 1,  # the window and an eos
        types_NT[rows].argmax(-1),
        scores_NTV[rows, :, 0],
        scores_NTV[rows, :, 1],
    )
    offsets = functools.cache(lambda text: setting.words.encode_with_offsets(text)[1:])
    contexts = [squad.Context(one["context"], *offsets(one["context"])) for one in examples]
    task = setting.config.task
    threshold = math.inf if answerable else task.null_threshold
    return squad.best_answers(windows, contexts, max_answer=task.max_answer, null_threshold=threshold)


EVALUATORS = {"classification": classify, "regression": regress, "tagging": tag, "qa": answer}
