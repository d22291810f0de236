"""One JSON line per evaluated example, in input order: input, gold answer, prediction, scores and loss.

Losses are negative log-likelihoods in nats per target that counts (squared errors of a regression); their mean,
weighted by targets, is the loss of the evaluation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lslm_jax.data.dataloader import EvalInput

MAX_CHARS = 2000  # of a document's text that a line holds

Line = dict[str, Any]


class TargetLosses:
    """Losses of targets, summed by the example that they belong to.

    Attributes:
      nll: float64 [N], the sum over the targets of each example; 0 for one that was not evaluated.
      weight: float64 [N], their weight.
    """

    def __init__(self, part: EvalInput):
        self._part = part
        self.nll, self.weight = np.zeros((2, part.shards.num_examples))

    def add(self, step: int, nll_BP: np.ndarray, weights_BP: np.ndarray, places_BP: np.ndarray | None = None) -> None:
        """Adds the targets of a global batch.

        Args:
          step: number of the batch.
          nll_BP: of each target.
          weights_BP: how much each counts.
          places_BP: cells of the targets; None: target p is in cell p.
        """
        example_BP = self._part.example_of_cells(step)
        if places_BP is not None:
            example_BP = np.take_along_axis(example_BP, places_BP, axis=1)
        counts = (weights_BP > 0) & (example_BP >= 0)
        np.add.at(self.nll, example_BP[counts], (nll_BP * weights_BP)[counts].astype(np.float64))
        np.add.at(self.weight, example_BP[counts], weights_BP[counts])

    def line(self, example: int) -> Line:
        """`loss` per target and number of targets, as `tokens`."""
        return {"loss": self.nll[example] / max(self.weight[example], 1.0), "tokens": int(self.weight[example])}


def of_documents(part: EvalInput, tokenizer: Any, losses: TargetLosses) -> Iterator[Line]:
    """Lines of documents: the text, its first `MAX_CHARS` characters if it is longer, and its loss."""
    starts, fields = part.shards.starts, part.shards.fields
    for i in np.flatnonzero(losses.weight).tolist():
        text = tokenizer.decode(part.shards.take(np.arange(starts[fields * i], starts[fields * i + 1])))
        cut = {"characters": len(text)} if len(text) > MAX_CHARS else {}
        yield {"example": i, "text": text[:MAX_CHARS]} | cut | losses.line(i)


def of_texts(
    examples: Sequence[Mapping[str, Any]], written: Sequence[str], losses: TargetLosses | None
) -> Iterator[Line]:
    """Lines of text-to-text examples: the source, the right target, the written one, and the loss of the right one."""
    for i, (example, text) in enumerate(zip(examples, written, strict=True)):
        yield (
            {"example": i}
            | _input(example)
            | {"gold": gold(example), "predicted": text}
            | (losses.line(i) if losses else {})
        )


def of_classes(
    examples: Sequence[Mapping[str, Any]], scores_NV: np.ndarray, nll_N: np.ndarray, labels: Sequence[str]
) -> Iterator[Line]:
    """Lines of classified texts, with the probability of each class."""
    for i, (example, scores_V) in enumerate(zip(examples, scores_NV, strict=False)):
        probabilities = dict(zip(labels, softmax(scores_V).tolist(), strict=True))
        predicted = labels[int(scores_V.argmax())]
        yield (
            {"example": i}
            | _input(example)
            | {
                "gold": gold(example),
                "predicted": predicted,
                "probabilities": probabilities,
                "loss": float(nll_N[i]),
            }
        )


def of_numbers(examples: Sequence[Mapping[str, Any]], values_N: np.ndarray, nll_N: np.ndarray) -> Iterator[Line]:
    """Lines of texts that a number was predicted for."""
    for i, (example, value) in enumerate(zip(examples, values_N.tolist(), strict=False)):
        yield {"example": i} | _input(example) | {"gold": gold(example), "predicted": value, "loss": float(nll_N[i])}


def of_tags(
    examples: Sequence[Mapping[str, Any]], tags: Sequence[np.ndarray], nll_N: np.ndarray, labels: Sequence[str]
) -> Iterator[Line]:
    """Lines of tagged words; words beyond the row have no prediction."""
    for i, (example, tags_of_words) in enumerate(zip(examples, tags, strict=False)):
        predicted = [labels[tag] for tag in tags_of_words]
        predicted += [None] * (len(example["words"]) - len(predicted))
        yield {
            "example": i,
            "words": example["words"],
            "gold": example["tags"],
            "predicted": predicted,
            "loss": float(nll_N[i]),
        }


def of_answers(
    examples: Sequence[Mapping[str, Any]],
    answers: Sequence[Any],
    example_N: np.ndarray,
    nll_N: np.ndarray,
) -> Iterator[Line]:
    """Lines of answered questions; the loss is the mean over the windows of the context.

    Args:
      examples: questions.
      answers: the best answer to each.
      example_N: the question of each row.
      nll_N: the loss of each row.
    """
    count_E = np.bincount(example_N, minlength=len(examples))
    loss_E = np.bincount(example_N, nll_N, minlength=len(examples)) / np.maximum(count_E, 1)
    for i in np.flatnonzero(count_E).tolist():
        example, best = examples[i], answers[i]
        yield {
            "example": i,
            "id": example["id"],
            "question": example["question"],
            "context": example["context"],
            "gold": gold(example),
            "predicted": best.text,
            "score": best.score,
            "begin": best.begin,
            "end": best.end,
            "loss": float(loss_E[i]),
        }


def gold(example: Mapping[str, Any]) -> Any:
    """The right answer of an example: a label, a target, or the texts of all answers to a question."""
    if "answers" in example:
        return [answer["text"] for answer in example["answers"]]
    return example["label"] if "label" in example else example["target"]


def _input(example: Mapping[str, Any]) -> Line:
    """The fields of an example that a model reads."""
    answer = "label" if "label" in example else "target"
    return {key: value for key, value in example.items() if key not in (answer, "answers")}


def softmax(scores_V: np.ndarray) -> np.ndarray:
    """Probabilities of scores, float64."""
    share_V = np.exp(scores_V.astype(np.float64) - scores_V.max())
    return share_V / share_V.sum()


def token_nll(scores_NPV: np.ndarray, targets_NP: np.ndarray, softcap: float = 0.0) -> np.ndarray:
    """The negative log-likelihood of targets among scores, float64 [N, P]; softcap is `model.logit_softcap`."""
    scores_NPV = scores_NPV.astype(np.float64)
    scores_NPV = softcap * np.tanh(scores_NPV / softcap) if softcap else scores_NPV
    top_NP = scores_NPV.max(axis=-1)
    normalizer_NP = top_NP + np.log(np.exp(scores_NPV - top_NP[..., None]).sum(axis=-1))
    return normalizer_NP - np.take_along_axis(scores_NPV, targets_NP[..., None], axis=-1)[..., 0]
