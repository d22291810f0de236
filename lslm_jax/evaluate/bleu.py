"""How near translations are to those of people, by sacrebleu: figures that compare with published ones."""

from collections.abc import Sequence
from typing import Any

from lslm_jax.errors import ConfigError, DataError


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU (Papineni et al. 2002) and chrF2 (Popović 2015) of a whole test set, as sacrebleu counts by default.

    Both take raw text, as people read it: sacrebleu splits it into tokens itself (Post 2018).

    Args:
      hypotheses: what the model says.
      references: what it should say, one for each.

    Returns:
      `bleu` and `chrf`, both from 0 to 100, and `bleu_signature` and `chrf_signature`, which tell others how they were
      counted.

    Raises:
      ConfigError: sacrebleu is not installed.
      DataError: there is nothing to compare, or not one reference for each hypothesis.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise DataError(f"BLEU of {len(hypotheses)} translations and {len(references)} references cannot be computed")
    metrics = _sacrebleu()
    result: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        result[name] = metric.corpus_score(hypotheses, [references]).score
        result[f"{name}_signature"] = str(metric.get_signature())
    return result


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics as metrics
    except ImportError as error:
        raise ConfigError(f"scoring translations needs {error.name}: pip install sacrebleu") from error
    return metrics
