"""How well classes, numbers and tags are told, by scikit-learn and scipy; shares are from 0 to 1.

Legend of the shapes: N examples, C classes. A class is its number in the list of names; -1 is a prediction that is none
of them.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lslm_jax.errors import ConfigError, DataError

INVALID = -1


def classification(gold_N: Any, predicted_N: Any, names: Sequence[str]) -> dict[str, float]:
    """Scores predicted classes.

    A class that is never predicted has the precision 0, one that never occurs the recall 0, and both the F1 0.

    Args:
      gold_N: true classes.
      predicted_N: predicted classes, some of them perhaps `INVALID`.
      names: of all classes.

    Returns:
      `accuracy`; `precision_macro`, `recall_macro` and `f1_macro`, which are means over all named classes; `matthews`,
      the correlation coefficient of Matthews (1975) for many classes (Gorodkin 2004), from -1 to 1; and of each class
      `precision/NAME`, `recall/NAME`, `f1/NAME` and `support/NAME`, the last being how often it truly occurs.

    Raises:
      ConfigError: scikit-learn is not installed.
      DataError: there is nothing to compare, not one prediction for each example, or a class without a name.
    """
    gold_N, predicted_N = _classes(gold_N, predicted_N, names)
    measures = _sklearn()
    scores_4C = measures.precision_recall_fscore_support(
        gold_N, predicted_N, labels=np.arange(len(names)), zero_division=0
    )
    kinds = ("precision", "recall", "f1", "support")
    result = {"accuracy": float(np.mean(gold_N == predicted_N))}
    result |= {f"{kind}_macro": float(np.mean(scores_C)) for kind, scores_C in zip(kinds[:3], scores_4C, strict=False)}
    result["matthews"] = _matthews(measures, gold_N, predicted_N)
    for number, name in enumerate(names):
        result |= {f"{kind}/{name}": scores_C[number].item() for kind, scores_C in zip(kinds, scores_4C, strict=True)}
    return result


def text_classification(gold_N: Any, texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Scores classes that a text-to-text model writes out; `invalid` is the share of texts that name no class."""
    predicted_N = classes_of_texts(texts, names)
    return classification(gold_N, predicted_N, names) | {"invalid": float(np.mean(predicted_N == INVALID))}


def classes_of_texts(texts: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """The class that each text names, but for white space around it; `INVALID` where it names none."""
    numbers = {name.strip(): number for number, name in enumerate(names)}
    return np.asarray([numbers.get(text.strip(), INVALID) for text in texts], np.int64)


def confusion(gold_N: Any, predicted_N: Any, names: Sequence[str]) -> np.ndarray:
    """How often each class (row) was taken for each (column).

    Where there are `INVALID` predictions, a last column counts them. `tolist()` makes it fit for JSON.
    """
    gold_N, predicted_N = _classes(gold_N, predicted_N, names)
    count = len(names)
    labels = np.arange(count + bool(np.any(predicted_N == INVALID)))
    columns_N = np.where(predicted_N == INVALID, count, predicted_N)
    return _sklearn().confusion_matrix(gold_N, columns_N, labels=labels)[:count]


def regression(gold_N: Any, predicted_N: Any) -> dict[str, float]:
    """Scores predicted numbers: `pearson` and `spearman` correlation, and `mse`, the mean squared error.

    A correlation is nan where it is not defined: with one example, a constant, or a prediction that is not finite.

    Raises:
      ConfigError: scipy is not installed.
      DataError: there is nothing to compare, or not one prediction for each example.
    """
    gold_N, predicted_N = _pair(gold_N, predicted_N, np.float64)
    pearson = spearman = math.nan
    if len(gold_N) > 1 and np.isfinite(predicted_N).all():
        stats = _scipy_stats()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a constant it warns, and says nan
            pearson = float(stats.pearsonr(gold_N, predicted_N).statistic)
            spearman = float(stats.spearmanr(gold_N, predicted_N).statistic)
    return {"pearson": pearson, "spearman": spearman, "mse": float(np.mean(np.square(gold_N - predicted_N)))}


def tagging(gold: Sequence[Any], predicted: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    """Scores the tags of each sentence's words.

    Args:
      gold: for each sentence its true tags.
      predicted: for each sentence as many predicted ones.
      names: of all tags. Where all are of the form `O`, `B-TYPE` or `I-TYPE`, entities are scored too.

    Returns:
      What `classification` says of all words; with entities, `entity_precision`, `entity_recall`, `entity_f1` and, for
      each type, `entity_f1/TYPE` (see `entities`). An entity counts if its type, its first and its last word are right.

    Raises:
      ConfigError: scikit-learn is not installed.
      DataError: there are no words, not one prediction for each, or a tag without a name.
    """
    if [len(tags) for tags in gold] != [len(tags) for tags in predicted]:
        raise DataError("sentences and predictions differ in number or length, so tags cannot be scored")
    gold_N, predicted_N = (np.concatenate([np.zeros(0, np.int64), *tags]) for tags in (gold, predicted))
    result = classification(gold_N, predicted_N, names)
    return result | (_entity_scores(gold, predicted, names) if _is_bio(names) else {})


def entities(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence as (type, first word, last word + 1), read as CoNLL-2000's scorer reads them.

    An entity begins at a `B-`, or at an `I-` that goes on with nothing of its type, and goes on with each `I-` of its
    type.
    """
    found, begin, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, other = tag.partition("-")
        if kind and (prefix != "I" or other != kind):
            found.add((kind, begin, place))
            kind = ""
        if other and not kind:
            begin, kind = place, other
    return found


def _entity_scores(gold: Sequence[Any], predicted: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    true, said = (
        {(*entity, number) for number, row in enumerate(rows) for entity in entities(_named(row, names))}
        for rows in (gold, predicted)
    )
    precision, recall, f1 = _f1(true, said)
    result = {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
    for kind in sorted({name.partition("-")[2] for name in names} - {""}):
        result[f"entity_f1/{kind}"] = _f1(*({e for e in found if e[0] == kind} for found in (true, said)))[2]
    return result


def _named(tags: Iterable[int], names: Sequence[str]) -> list[str]:
    return [names[tag] if tag != INVALID else "O" for tag in tags]


def _f1(true: set[Any], said: set[Any]) -> tuple[float, float, float]:
    right = len(true & said)
    if not right:
        return 0.0, 0.0, 0.0
    return right / len(said), right / len(true), 2 * right / (len(said) + len(true))


def _is_bio(names: Sequence[str]) -> bool:
    prefixes = {"O" if name == "O" else name[:2] for name in names}
    return "B-" in prefixes and prefixes <= {"O", "B-", "I-"}


def _matthews(measures: Any, gold_N: np.ndarray, predicted_N: np.ndarray) -> float:
    if len(np.union1d(gold_N, predicted_N)) == 1:  # scikit-learn says 0, too, but warns
        return 0.0
    return float(measures.matthews_corrcoef(gold_N, predicted_N))


def _classes(gold_N: Any, predicted_N: Any, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    gold_N, predicted_N = _pair(gold_N, predicted_N, np.int64)
    if gold_N.min() < 0 or predicted_N.min() < INVALID or max(gold_N.max(), predicted_N.max()) >= len(names):
        raise DataError(f"there are {len(names)} names, but classes without one")
    return gold_N, predicted_N


def _pair(gold_N: Any, predicted_N: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    gold_N, predicted_N = np.asarray(gold_N, dtype), np.asarray(predicted_N, dtype)
    if gold_N.shape != predicted_N.shape or gold_N.ndim != 1 or not len(gold_N):
        raise DataError(f"{len(predicted_N)} predictions for {len(gold_N)} examples cannot be scored")
    return gold_N, predicted_N


def _sklearn() -> Any:
    try:
        import sklearn.metrics as measures
    except ImportError as error:
        raise ConfigError(f"scoring classes needs {error.name}: pip install scikit-learn") from error
    return measures


def _scipy_stats() -> Any:
    try:
        import scipy.stats as stats
    except ImportError as error:
        raise ConfigError(f"scoring numbers needs {error.name}: pip install scipy") from error
    return stats
