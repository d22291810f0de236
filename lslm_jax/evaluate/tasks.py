"""Evaluators: each takes a model and returns a Report; the loop knows no more of them.

Each held-out example counts exactly once, whatever the batch and the mesh. The sources of a mixture are evaluated one
by one, under their names; losses also together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lslm_jax.data.pipeline import EvalInput
from lslm_jax.evaluate import heads, metrics, runner, texts
from lslm_jax.evaluate.evaluator import Evaluator, Report, Setting, batches, joined
from lslm_jax.train.step import make_eval_step


def make(setting: Setting, data: Mapping[str, EvalInput]) -> Evaluator:
    """The evaluator of the config's objective over held-out data, given by the names of their sources."""
    measure, more = losses(setting, data), _more(setting)

    def evaluate(model: Any) -> Report:
        found = joined({name: more(name, part, model) for name, part in data.items()})
        return found._replace(metrics=measure(model).metrics | found.metrics)

    return evaluate


def _more(setting: Setting) -> Callable[[str, EvalInput, Any], Report]:
    """What there is to say of a source besides its loss: of what a head tells, or of the texts that are written."""
    objective = setting.config.task.objective
    if objective in heads.EVALUATORS:
        score, judge = heads.scorer(setting), heads.EVALUATORS[objective]
        return lambda name, part, model: judge(setting, part, score(model, part))
    if objective == "seq2seq":
        return lambda name, part, model: texts.evaluate(setting, name, part, model)
    return lambda name, part, model: Report({}, {}, {})


def losses(setting: Setting, data: Mapping[str, EvalInput]) -> Evaluator:
    """Loss (nats a target) and what follows from it: of tokens, perplexity and accuracy of the likeliest.

    A causal model's perplexity also as bits per byte of the original text; a masked one's is called pseudo-perplexity,
    as its tokens see each other.
    """
    step = jax.jit(make_eval_step(setting.config, setting.backend))
    objective = setting.config.task.objective
    num_bytes = {name: part.num_bytes() for name, part in data.items()} if objective == "causal" else {}

    def evaluate(model: Any) -> Report:
        sums = {name: runner.total(step, model, batches(part), setting.mesh) for name, part in data.items()}
        found: dict[str, float] = {}
        for name in sums if len(sums) > 1 else ():
            each = _metrics(objective, sums[name], num_bytes[name] if num_bytes else 0)
            found |= {f"{name}/{what}": value for what, value in each.items()}
        together = jax.tree.map(lambda *values: sum(values), *sums.values())
        return Report(found | _metrics(objective, together, sum(num_bytes.values())), {}, {})

    return evaluate


def _metrics(objective: str, sums: Any, num_bytes: int) -> dict[str, float]:
    """Of sums that `runner.total` has made floats."""
    found = {"loss": sums.nll / sums.weight}
    if objective in heads.EVALUATORS:
        return found
    perplexity = "pseudo_perplexity" if objective == "masked" else "perplexity"
    found[perplexity] = metrics.perplexity(sums.nll, sums.weight)
    if objective == "causal":
        found["bits_per_byte"] = metrics.bits_per_byte(sums.nll, num_bytes)
    return found | {"accuracy": sums.correct / sums.weight, "tokens": sums.weight}
