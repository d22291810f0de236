"""Evaluation of what heads say: a class, a number, tags, or the answer to a question.

Legend of the shapes: N rows of all batches, P predictions of a row, T positions, V labels.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.data.dataloader import EvalInput
from lslm_jax.evaluate import batched_eval, classification_metrics, predictions, squad_metrics, text_reports
from lslm_jax.evaluate.types import Report, Setting, batches
from lslm_jax.models.attention import Backend
from lslm_jax.train.train_step import make_predict_step


class Rows(NamedTuple):
    """Rows as they were read, and what a head says of them.

    Attributes:
      scores_NPV: float32.
      targets_NP: as in Batch, and so the others.
      weights_NP: how much each target counts.
      types_NT: of two texts, which one a token belongs to.
      segments_NT: 0 in padding.
      nll_N: loss of each row, the mean over its targets; float64.
    """

    scores_NPV: np.ndarray
    targets_NP: np.ndarray
    weights_NP: np.ndarray
    types_NT: np.ndarray
    segments_NT: np.ndarray | None = None
    nll_N: np.ndarray | None = None


@functools.cache
def predictor(config: Config, backend: Backend, mesh: Mesh) -> Any:
    """The jitted step (model, batch) -> sums of losses, Rows; both whole on every device."""
    predict = make_predict_step(config, backend)

    def step(model: Any, batch: Batch) -> tuple[Any, Rows]:
        sums, scores_BPV = predict(model, batch)
        parts: Any = (batch.targets_BT, batch.weights_BT, batch.types_BT, batch.segments_BT)
        return sums, Rows(scores_BPV, *parts)  # type: ignore[arg-type]

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def read(setting: Setting, part: EvalInput, model: Any) -> tuple[Any, Rows]:
    """Sums of the losses over a set, and all its rows but those that fill the last batch."""
    step = predictor(setting.config, setting.backend, setting.mesh)
    sums, rows = zip(
        *batched_eval.run(step, model, batches(part), setting.mesh, setting.config.train.batch_size), strict=True
    )
    rows = [one._replace(nll_N=_losses(setting.config, one)) for one in rows]
    real_N = _of_rows(part, part.examples) >= 0
    found = jax.tree.map(lambda array: array[real_N], batched_eval.joined(rows))
    if setting.labels:  # model.num_labels may leave room for more
        found = found._replace(scores_NPV=found.scores_NPV[..., : len(setting.labels)])
    return batched_eval.added(sums), found


def _losses(config: Config, rows: Rows) -> np.ndarray:
    """The loss of each row, float64 [N]: the mean over its targets."""
    match config.task.objective:
        case "regression":
            nll_NP = np.square(rows.scores_NPV[..., 0].astype(np.float64) - rows.targets_NP)
        case "qa":
            scores_N2T = np.swapaxes(rows.scores_NPV, 1, 2)
            if rows.segments_NT is not None:
                padding_NT = (rows.segments_NT == 0) & (rows.segments_NT > 0).any(axis=1, keepdims=True)
                scores_N2T = np.where(padding_NT[:, None], -np.inf, scores_N2T)
            nll_NP = predictions.token_nll(scores_N2T, rows.targets_NP)
        case _:
            nll_NP = predictions.token_nll(rows.scores_NPV, rows.targets_NP, config.model.logit_softcap)
    return np.where(rows.weights_NP > 0, nll_NP, 0.0).sum(axis=1) / np.maximum(rows.weights_NP.sum(axis=1), 1.0)


def _of_rows(part: EvalInput, tell: Any) -> np.ndarray:
    return np.concatenate([tell(step) for step in range(part.num_batches)])


def example_of_rows(part: EvalInput) -> np.ndarray:
    """The example behind each row that `read` gives."""
    example_N = _of_rows(part, part.examples)
    return example_N[example_N >= 0]


def evaluate(setting: Setting, part: EvalInput, model: Any) -> tuple[Any, Report]:
    """Sums of the losses over a set, and what is to say of the predictions."""
    sums, rows = read(setting, part, model)
    return sums, EVALUATORS[setting.config.task.objective](setting, part, rows)


def classify(setting: Setting, part: EvalInput, rows: Rows) -> Report:
    """Accuracy, precision, recall, F1 and correlation of classes."""
    gold_N, predicted_N = rows.targets_NP[:, 0], rows.scores_NPV[:, 0].argmax(-1)
    found = classification_metrics.classification(gold_N, predicted_N, setting.labels)
    lines = lambda: predictions.of_classes(
        list(part.shards.examples()), rows.scores_NPV[:, 0], _nll(rows), setting.labels
    )
    return class_report(gold_N, predicted_N, setting.labels, found)._replace(predictions=lines)


def _nll(rows: Rows) -> np.ndarray:
    assert rows.nll_N is not None  # `read` filled it
    return rows.nll_N


def class_report(gold_N: np.ndarray, predicted_N: np.ndarray, labels: list[str], found: dict[str, float]) -> Report:
    """A report on predicted classes whose measures are found."""
    table = text_reports.classification(gold_N, predicted_N, labels, found)
    matrix = classification_metrics.confusion(gold_N, predicted_N, labels).tolist()
    return Report(found, {"classes.txt": table}, {"labels": labels, "confusion": matrix})


def regress(setting: Setting, part: EvalInput, rows: Rows) -> Report:
    """Correlations and squared error of numbers."""
    values_N = rows.scores_NPV[:, 0, 0]
    lines = lambda: predictions.of_numbers(list(part.shards.examples()), values_N, _nll(rows))
    return Report(classification_metrics.regression(rows.targets_NP[:, 0], values_N), {}, {}, lines)


def tag(setting: Setting, part: EvalInput, rows: Rows) -> Report:
    """Accuracy and F1 of the tags of words, and of entities where the tags spell such.

    Words beyond the end of a row count as wrong, and the entities among them as missed.
    """
    tags = tags_of_words(rows)
    gold, predicted = _with_cut_words(part, tags)
    lines = lambda: predictions.of_tags(list(part.shards.examples()), tags, _nll(rows), setting.labels)
    return Report(classification_metrics.tagging(gold, predicted, setting.labels), {}, {}, lines)


def _with_cut_words(part: EvalInput, tags: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """All true tags of each text, and the predicted ones, with an invalid one for each word beyond the row."""
    gold = list(part.all_tags())
    missing = [len(true) - len(found) for true, found in zip(gold, tags, strict=True)]
    return gold, [
        np.pad(found, (0, count), constant_values=classification_metrics.INVALID)
        for found, count in zip(tags, missing, strict=True)
    ]


def tags_of_words(rows: Rows) -> list[np.ndarray]:
    """The likeliest tag of each word of each row, by number."""
    pairs = zip(rows.scores_NPV, rows.weights_NP, strict=True)
    return [scores_TV[weights_T > 0].argmax(-1) for scores_TV, weights_T in pairs]


def answer(setting: Setting, part: EvalInput, rows: Rows) -> Report:
    """Exact match and F1 of answers, as SQuAD defines them; the answers themselves by question."""
    examples = list(part.shards.examples())
    answers = find_answers(setting, part, rows, examples, all(one["answers"] for one in examples))
    seen = np.unique(example_of_rows(part))  # all, unless eval.batches is set
    given = [[one["text"] for one in examples[i]["answers"]] for i in seen]
    found = squad_metrics.squad([answers[i].text for i in seen], given)
    written = text_reports.squad_predictions([examples[i]["id"] for i in seen], [answers[i].text for i in seen])
    lines = lambda: predictions.of_answers(examples, answers, example_of_rows(part), _nll(rows))
    return Report(found, {"answers.json": written}, {}, lines)


def find_answers(
    setting: Setting, part: EvalInput, rows: Rows, examples: list[dict[str, Any]], answerable: bool
) -> list[squad_metrics.Answer]:
    """The best answer to each question over all windows of its context; "" may be one unless all are answerable."""
    windows = squad_metrics.Windows(
        example_of_rows(part),
        _of_rows(part, part.windows)[_of_rows(part, part.examples) >= 0],
        rows.types_NT.sum(-1) - 1,  # the window and an eos
        rows.types_NT.argmax(-1),
        rows.scores_NPV[..., 0],
        rows.scores_NPV[..., 1],
    )
    offsets = functools.cache(lambda text: setting.words.encode_with_offsets(text)[1:])
    contexts = [squad_metrics.Context(one["context"], *offsets(one["context"])) for one in examples]
    task = setting.config.task
    threshold = math.inf if answerable else task.null_threshold
    return squad_metrics.best_answers(windows, contexts, max_answer=task.max_answer, null_threshold=threshold)


EVALUATORS = {"classification": classify, "regression": regress, "tagging": tag, "qa": answer}
