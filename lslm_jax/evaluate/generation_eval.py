"""Evaluation of what a text-to-text model writes: translations, names of classes, answers to questions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lslm_jax.data.dataloader import EvalInput
from lslm_jax.evaluate import bleu, classification_metrics, prediction_eval, predictions, squad_metrics, text_reports
from lslm_jax.evaluate.types import Report, Setting
from lslm_jax.generate import decode
from lslm_jax.runtime import progress


def evaluate(
    setting: Setting, name: str, part: EvalInput, model: Any, losses: predictions.TargetLosses | None = None
) -> Report:
    """Writes the target of each held-out example of a source and scores it as the kind of example asks.

    `losses` of the right targets go into the lines of predictions.
    """
    examples = list(part.shards.examples())
    if setting.config.eval.batches:
        examples = examples[: setting.config.eval.batches * setting.config.train.batch_size]
    starts = part.shards.starts
    sources = [part.shards.take(np.arange(starts[2 * i], starts[2 * i + 1])) for i in range(len(examples))]
    _warn_of_cuts(setting, sources)
    written = write(setting, model, sources)
    match setting.source(name).example:
        case "label":
            found = _classes(setting, examples, written)
        case "qa":
            found = _answers(examples, written)
        case _:
            found = _translations(examples, written)
    return found._replace(predictions=lambda: predictions.of_texts(examples, written, losses))


def _warn_of_cuts(setting: Setting, sources: Sequence[np.ndarray]) -> None:
    """Prints how many sources the model reads the beginning of, alone."""
    limit = _source_limit(setting)
    if cut := sum(len(source) > limit for source in sources):
        progress.say(
            f"warning: {cut:,} of {len(sources):,} sources have more than the {limit:,} tokens that "
            f"model.max_length={setting.config.model.max_length} leaves, and are cut there"
        )


def _source_limit(setting: Setting) -> int:
    """Tokens of a source that are read: of a decoder, what is left beside two special tokens and the target."""
    model = setting.config.model
    if model.family != "decoder":
        return model.max_length - 1
    return max(1, model.max_length - 2 - setting.config.generate.max_tokens)


def write(setting: Setting, model: Any, sources: Sequence[np.ndarray]) -> list[str]:
    """The likeliest target of each source: greedy, or by beam search where `generate.beams` says so.

    Sources of like length go together, so that little is computed for padding.
    """
    config = setting.config
    settings, size = replace(config.generate, temperature=0.0), config.train.batch_size
    suffix: tuple[int, ...] = ()
    if config.model.family == "decoder":  # which reads source and target in one row
        suffix = (setting.words.bos_id,)
        sources = [source[: _source_limit(setting)] for source in sources]
    order = np.argsort([len(source) for source in sources], kind="stable")[::-1]
    written = [""] * len(sources)
    begins = range(0, len(order), size)
    for first in progress.told(begins, "writing", len(begins)):
        part = order[first : first + size]
        # The last batch is filled up: another size would compile another program.
        full = np.concatenate([part, np.repeat(part[-1:], size - len(part))])
        prompts = [sources[i] for i in full]
        results = decode.generate(model, setting.words, prompts, settings, config.seed, suffix_ids=suffix)
        for i, result in zip(part, results, strict=False):
            written[i] = result.text
    return written


def _translations(examples: list[dict[str, Any]], written: list[str]) -> Report:
    references = [one["target"] for one in examples]
    found = bleu.bleu(written, references)
    facts = {name: found.pop(name) for name in list(found) if isinstance(found[name], str)}
    text = text_reports.translations([one["source"] for one in examples], written, references)
    return Report(found, {"translations.txt": text}, facts)


def _classes(setting: Setting, examples: list[dict[str, Any]], written: list[str]) -> Report:
    numbers = {label: number for number, label in enumerate(setting.labels)}
    gold_N = np.array([numbers[one["label"]] for one in examples])
    found = classification_metrics.text_classification(gold_N, written, setting.labels)
    predicted_N = classification_metrics.classes_of_texts(written, setting.labels)
    return prediction_eval.class_report(gold_N, predicted_N, setting.labels, found)


def _answers(examples: list[dict[str, Any]], written: list[str]) -> Report:
    found = squad_metrics.squad(written, [[one["text"] for one in example["answers"]] for example in examples])
    return Report(found, {"answers.json": text_reports.squad_predictions([one["id"] for one in examples], written)}, {})
