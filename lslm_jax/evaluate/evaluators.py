"""Evaluators: each takes a model and returns a Report; the loop knows no more of them.

Each held-out example counts exactly once, whatever the batch and the mesh. The sources of a mixture are evaluated one
by one, under their names; losses also together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lslm_jax.data.batch import Batch
from lslm_jax.data.dataloader import EvalInput
from lslm_jax.evaluate import batched_eval, generation_eval, metrics, prediction_eval, predictions
from lslm_jax.evaluate.types import Evaluator, Report, Setting, batches, joined
from lslm_jax.train.train_step import make_eval_step, make_target_loss_step

_GZIP_LIMIT = 1 << 26  # bytes of held-out text above which the comparison with gzip is left out: it takes seconds


def make(setting: Setting, data: Mapping[str, EvalInput], *, by_example: bool = False) -> Evaluator:
    """The evaluator of the config's objective over held-out data, given by the names of their sources.

    Reports hold the number of `examples`; `by_example` adds the loss of each one to `predictions` where targets are
    tokens.

    Its metrics begin with the loss, in nats a target, and what follows from it: of tokens, perplexity and the accuracy
    of the likeliest. A causal model's perplexity also as bits per byte of the original text; a masked one's is called
    pseudo-perplexity, as its tokens see each other.
    """
    objective = setting.config.task.objective
    measure = _measure(setting, by_example)
    num_bytes = {name: part.num_bytes() for name, part in data.items()} if objective == "causal" else {}

    def evaluate(model: Any) -> Report:
        sums, reports = {}, {}
        for name, part in data.items():
            sums[name], reports[name] = measure(name, part, model)
        found: dict[str, float] = {}
        for name in sums if len(sums) > 1 else ():
            each = _losses(objective, sums[name], num_bytes[name] if num_bytes else 0)
            found |= {f"{name}/{what}": value for what, value in each.items()}
        found |= _losses(objective, batched_eval.added(list(sums.values())), sum(num_bytes.values()))
        report = joined(reports)
        counts = {name: part.num_examples() for name, part in data.items()}
        facts = {"examples": sum(counts.values())}
        facts |= {f"{name}/examples": count for name, count in counts.items()} if len(counts) > 1 else {}
        return report._replace(metrics=found | report.metrics, facts=facts | report.facts)

    return evaluate


def _measure(setting: Setting, by_example: bool) -> Callable[[str, EvalInput, Any], tuple[Any, Report]]:
    """The sums of a source's losses, and what else there is to say: of what a head tells, or of texts written."""
    objective = setting.config.task.objective
    if objective in prediction_eval.EVALUATORS:
        return lambda name, part, model: prediction_eval.evaluate(setting, part, model)
    whole = NamedSharding(setting.mesh, PartitionSpec())
    if by_example:
        return _measure_by_example(setting, whole)
    step = jax.jit(make_eval_step(setting.config, setting.backend), out_shardings=whole)

    def measure(name: str, part: EvalInput, model: Any) -> tuple[Any, Report]:
        sums = batched_eval.added(
            batched_eval.run(step, model, batches(part), setting.mesh, setting.config.train.batch_size)
        )
        written = generation_eval.evaluate(setting, name, part, model) if objective == "seq2seq" else Report({}, {}, {})
        return sums, written

    return measure


def _measure_by_example(setting: Setting, whole: NamedSharding) -> Callable[[str, EvalInput, Any], tuple[Any, Report]]:
    """`_measure` for targets that are tokens, with the loss of each example in the predictions."""
    losses_of_targets = make_target_loss_step(setting.config, setting.backend)

    def with_weights(model: Any, batch: Batch) -> tuple[Any, ...]:
        return *losses_of_targets(model, batch), batch.weights_BT, batch.places_BP

    step = jax.jit(with_weights, out_shardings=whole)

    def measure(name: str, part: EvalInput, model: Any) -> tuple[Any, Report]:
        losses, sums = predictions.TargetLosses(part), []
        found = batched_eval.stream(step, model, batches(part), setting.mesh, setting.config.train.batch_size)
        for number, (more, *of_targets) in enumerate(found):
            sums.append(more)
            losses.add(number, *of_targets)
        if setting.config.task.objective == "seq2seq":
            return batched_eval.added(sums), generation_eval.evaluate(setting, name, part, model, losses)
        lines = lambda: predictions.of_documents(part, setting.words, losses)
        return batched_eval.added(sums), Report({}, {}, {}, lines if setting.words is not None else None)

    return measure


def _losses(objective: str, sums: Any, num_bytes: int) -> dict[str, float]:
    """Of sums that are floats."""
    found = {"loss": sums.nll / sums.weight}
    if objective in prediction_eval.EVALUATORS:
        return found
    perplexity = "pseudo_perplexity" if objective == "masked" else "perplexity"
    found[perplexity] = metrics.perplexity(sums.nll, sums.weight)
    if objective == "causal":
        found["bits_per_byte"] = metrics.bits_per_byte(sums.nll, num_bytes)
    return found | {"accuracy": sums.correct / sums.weight, "tokens": sums.weight}


def gzip_baseline(setting: Setting, held_out: Mapping[str, EvalInput]) -> dict[str, float]:
    """What gzip makes of the same held-out text, where bits a byte are counted and it is small enough to ask."""
    if setting.config.task.objective != "causal" or setting.config.data.is_chat or not held_out:
        return {}
    if sum(part.num_bytes() for part in held_out.values()) > _GZIP_LIMIT:
        return {}
    texts = (setting.words.decode(ids) for part in held_out.values() for ids in part.documents())
    return {"gzip_bits_per_byte": metrics.gzip_bits_per_byte(texts)}
