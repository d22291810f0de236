"""What a model said, as texts for people and for other scorers. The caller writes them down."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lslm_jax.evaluate.classification_metrics import confusion

MAX_CONFUSION = 20  # classes; a wider table is not read


def translations(sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> str:
    """Each source, what the model made of it and what a person did, one below the other."""
    triples = zip(sources, hypotheses, references, strict=True)
    return "\n".join(f"source:     {s}\nhypothesis: {h}\nreference:  {r}\n" for s, h, r in triples)


def squad_predictions(ids: Sequence[str], answers: Sequence[str]) -> str:
    """JSON from the id of each question to its answer, "" for none: what SQuAD's own scorer reads."""
    return json.dumps(dict(zip(ids, answers, strict=True)), ensure_ascii=False, indent=1)


def classification(gold_N: Any, predicted_N: Any, names: Sequence[str], scores: Mapping[str, float]) -> str:
    """Tables of the scores of each class and of what was taken for what.

    Args:
      gold_N: true classes, as numbers.
      predicted_N: predicted ones.
      names: of all classes.
      scores: what `evaluate.classification.classification` says of them.
    """
    text = _scores_table(names, scores)
    if len(names) > MAX_CONFUSION:
        return text
    matrix = confusion(gold_N, predicted_N, names)
    columns = [*names, "(none)"][: matrix.shape[1]]
    rows = [["true \\ predicted", *columns]]
    rows += [[name, *map(str, counts)] for name, counts in zip(names, matrix.tolist(), strict=True)]
    return f"{text}\n{_table(rows)}"


def _scores_table(names: Sequence[str], scores: Mapping[str, float]) -> str:
    kinds = ("precision", "recall", "f1")
    rows = [["", *kinds, "support"]]
    rows += [
        [name, *(f"{scores[f'{kind}/{name}']:.4f}" for kind in kinds), f"{scores[f'support/{name}']:.0f}"]
        for name in names
    ]
    total = sum(scores[f"support/{name}"] for name in names)
    rows.append(["mean of classes", *(f"{scores[f'{kind}_macro']:.4f}" for kind in kinds), f"{total:.0f}"])
    rows.append(["accuracy", "", "", f"{scores['accuracy']:.4f}", f"{total:.0f}"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
