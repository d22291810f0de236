"""Evaluators: each takes a model and returns a Report; the loop knows no more of them.

Each held-out example counts exactly once, whatever the batch and the mesh. The sources of a mixture are evaluated one
by one, under their names, and together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.batch import Batch
from lslm_jax.config import Config, Source
from lslm_jax.data import prefetch
from lslm_jax.data.pipeline import EvalInput
from lslm_jax.evaluate import classification, metrics, report, runner, squad, translation
from lslm_jax.generate import decode
from lslm_jax.models.attention import Backend
from lslm_jax.train.losses import Sums
from lslm_jax.train.step import make_eval_step, make_predict_step


class Report(NamedTuple):
    """What an evaluation found.

    Attributes:
      metrics: numbers by name.
      files: texts by file name, for people and for other programs: translations, answers, tables.
      facts: what else belongs on the record, as a metric's signature.
    """

    metrics: dict[str, float]
    files: dict[str, str] = {}  # noqa: RUF012  # never changed in place
    facts: dict[str, Any] = {}  # noqa: RUF012


class Context(NamedTuple):
    """What evaluators work with: the config, the tokenizer, label names of the data, and where the model runs."""

    config: Config
    words: Any
    labels: list[str]
    backend: Backend
    mesh: Mesh


Evaluator = Callable[[Any], Report]


def make(context: Context, data: Mapping[str, EvalInput]) -> Evaluator:
    """The evaluator of the config's objective over held-out data, by name of their source ("" for the only one)."""
    objective = context.config.task.objective
    evaluate = _HEADS[objective] if objective in _HEADS else None
    if evaluate is None:
        losses = _losses(context, data)
        return losses if objective != "seq2seq" else lambda model: _merged(losses(model), _texts(context, data, model))
    scores = _scores(context)
    return lambda model: _by_source(data, lambda name, part: evaluate(context, part, scores(model, part)))


# Losses over tokens.


def _losses(context: Context, data: Mapping[str, EvalInput]) -> Evaluator:
    """Loss (nats a token) and what follows from it, and accuracy of the likeliest token."""
    step = jax.jit(make_eval_step(context.config, context.backend))
    num_bytes = {name: part.num_bytes() for name, part in data.items()}

    def evaluate(model: Any) -> Report:
        sums = {name: runner.total(step, model, _batches(part), context.mesh) for name, part in data.items()}
        found: dict[str, float] = {}
        for name in sums if len(sums) > 1 else ():
            found |= _prefixed(name, _token_metrics(context.config, sums[name], num_bytes[name]))
        together = Sums(*(sum(values) for values in zip(*sums.values(), strict=True)))
        return Report(found | _token_metrics(context.config, together, sum(num_bytes.values())))

    return evaluate


def _token_metrics(config: Config, sums: Sums, num_bytes: int) -> dict[str, float]:
    objective = config.task.objective
    perplexity = metrics.perplexity(sums.nll, sums.weight)
    found = {"loss": sums.nll / sums.weight}
    found["pseudo_perplexity" if objective == "masked" else "perplexity"] = perplexity
    if objective == "causal":
        found["bits_per_byte"] = metrics.bits_per_byte(sums.nll, num_bytes)
    return found | {"accuracy": sums.correct / sums.weight, "tokens": sums.weight}


# Heads.


def _scores(context: Context) -> Callable[[Any, EvalInput], np.ndarray]:
    """What the head says of each row of a set, [rows, P, V], the rows that fill the last batch included."""
    everywhere = NamedSharding(context.mesh, PartitionSpec())
    step = jax.jit(make_predict_step(context.config, context.backend), out_shardings=everywhere)
    return lambda model, part: runner.gather(step, model, _batches(part), context.mesh)


def _classify(context: Context, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    examples, scores_NPV = _of_examples(part, scores_NPV)
    gold = part.shards.numbers[examples, 0].astype(np.int64)
    return _class_report(gold, scores_NPV[:, 0].argmax(-1), context.labels)


def _class_report(gold: np.ndarray, predicted: np.ndarray, labels: list[str]) -> Report:
    found, matrix = classification.evaluate(gold, predicted, labels)
    text = report.classes(found, matrix, labels)
    return Report(found, {"classes.txt": text}, {"confusion_matrix": matrix, "labels": labels})


def _regress(context: Context, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    examples, scores_NPV = _of_examples(part, scores_NPV)
    return Report(classification.regression(part.shards.numbers[examples, 0], scores_NPV[:, 0, 0]))


def _tag(context: Context, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    gold, predicted = [], []
    batches = (part.batch(step) for step in range(part.num_batches))
    examples = np.concatenate([part.examples(step) for step in range(part.num_batches)])
    rows = (row for batch in batches for row in zip(batch.targets_BT, batch.weights_BT > 0, strict=True))
    for example, (targets_T, counts_T), scores_TV in zip(examples, rows, scores_NPV, strict=True):
        if example >= 0:
            gold.append([context.labels[tag] for tag in targets_T[counts_T]])
            predicted.append([context.labels[tag] for tag in scores_TV[counts_T].argmax(-1)])
    return Report(classification.tagging(gold, predicted))


def _answer(context: Context, part: EvalInput, scores_NPV: np.ndarray) -> Report:
    raise NotImplementedError


def _of_examples(part: EvalInput, scores_NPV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The example of each row, and its scores, without the rows that fill the last batch."""
    examples = np.concatenate([part.examples(step) for step in range(part.num_batches)])
    return examples[examples >= 0], scores_NPV[examples >= 0]


_HEADS = {"classification": _classify, "regression": _regress, "tagging": _tag, "qa": _answer}
