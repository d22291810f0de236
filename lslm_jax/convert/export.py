"""A run's model as a Hugging Face directory that transformers loads with nothing else."""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lslm_jax import atomic, config_loading
from lslm_jax.config import Config, GenerateConfig
from lslm_jax.convert import pretrained, safetensors, weights
from lslm_jax.data import templates, tokenizer_json
from lslm_jax.data.templates import Template
from lslm_jax.data.tokenizer_base import Tokenizer
from lslm_jax.trees import flatten

_PACKAGES = ("lslm_jax", "jax", "flax")


def export(
    directory: epath.Path,
    model: Any,
    config: Config,
    words: Tokenizer,
    labels: list[str],
    dtype: str,
    metrics: Mapping[str, Any],
    template: Template | None = None,
) -> dict[str, Any]:
    """Writes weights, settings, vocabulary, a model card; config.json comes last, so that half of it is nothing.

    Args:
      directory: made if it is missing.
      model: with the weights.
      config: resolved.
      words: the vocabulary.
      labels: of classes or tags.
      dtype: of the weights in the files.
      metrics: of the model card.
      template: that the model was taught to chat by.

    Returns:
      `model_type`, names of the `files`, `parameters`.

    Raises:
      ConfigError: no family of Hugging Face has such a model, or its vocabulary cannot be exported.
      SaveError: the directory cannot be written.
    """
    objective = config.task.objective
    family = pretrained.family_of(config.model, objective)
    vocabulary = tokenizer_json.convert(words, config.model.family)
    tokens = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id}
    settings = pretrained.export_settings(family, config.model, objective, dtype, tokens, labels)
    sources = weights.sources(model, family, config.model, objective, dtype)
    if jax.process_index() != 0:
        for source in sources.values():
            source.make()  # every host takes part in fetching, one writes
        return {}
    with atomic.saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
    files = safetensors.write_directory(directory, sources)
    parameters = sum(leaf.size for leaf in flatten(model).values())
    texts: dict[str, Any] = {
        "tokenizer.json": json.dumps(vocabulary, ensure_ascii=False),
        "tokenizer_config.json": _json(tokenizer_json.roles(words)),
        "README.md": _card(config, family.model_type, parameters, metrics),
    }
    if template is not None:
        texts[templates.FILE] = template.text
    if objective in ("causal", "seq2seq"):
        texts["generation_config.json"] = _json(_generation(config.generate, tokens, config.model.family))
    for name, text in (texts | {"config.json": _json(settings)}).items():
        atomic.write(directory / name, text.encode())
    return {"model_type": family.model_type, "files": [*files, *texts, "config.json"], "parameters": parameters}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _generation(settings: GenerateConfig, tokens: Mapping[str, int], family: str) -> dict[str, Any]:
    theirs: dict[str, Any] = {f"{role}_token_id": id for role, id in tokens.items()}
    theirs["eos_token_id"] = [tokens["eos"], *settings.stop_ids] if settings.stop_ids else tokens["eos"]
    theirs |= {"max_new_tokens": settings.max_tokens, "num_beams": settings.beams}
    if family == "encoder_decoder":
        theirs["decoder_start_token_id"] = tokens["bos"]
    if settings.temperature > 0 and settings.beams == 1:
        drawing = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        theirs |= {"do_sample": True} | drawing
        theirs |= {"min_p": settings.min_p} if settings.min_p else {}
    return theirs | {"repetition_penalty": settings.repetition_penalty}


def _card(config: Config, model_type: str, parameters: int, metrics: Mapping[str, Any]) -> str:
    """What it is, what it was trained on, how well it does, and what made it."""
    sources = config.data.mixture or (config.data,)
    data = [f"- {name}" for source in sources for name in (source.tfds, *source.files) if name] or ["- synthetic"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    scores = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "---",
            "",
            f"A {model_type} of {parameters:,} parameters, trained with lslm_jax ({config.task.objective}) on",
            "",
            *data,
            "",
            *(["| metric | value |", "| --- | --- |", *scores, ""] if scores else []),
            f"Made with {', '.join(versions)}. All settings:",
            "",
            "```json",
            config_loading.to_json(config).strip(),
            "```",
            "",
        ]
    )
