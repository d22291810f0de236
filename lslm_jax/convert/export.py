"""A run's model as a Hugging Face directory that transformers loads with nothing else."""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lslm_jax import atomic, config_loading
from lslm_jax.config import Config, GenerateConfig
from lslm_jax.convert import peft, pretrained, safetensors, weights
from lslm_jax.data import tokenizer_json
from lslm_jax.data.marian import Marian
from lslm_jax.data.tokenizer_base import Tokenizer
from lslm_jax.errors import ConfigError
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
) -> dict[str, Any]:
    """Writes weights, settings, vocabulary and a model card; config.json comes last, so that half of it is nothing.

    Args:
      directory: made if it is missing.
      model: with the weights.
      config: resolved.
      words: the vocabulary.
      labels: of classes or tags.
      dtype: of the weights in the files.
      metrics: of the model card.

    Returns:
      `model_type`, names of the `files`, `parameters`.

    Raises:
      ConfigError: no family of Hugging Face has such a model, or its vocabulary cannot be exported.
      SaveError: the directory cannot be written.
    """
    objective = config.task.objective
    family = pretrained.family_of(config.model, objective)
    vocabulary = _vocabulary(words, config.model.family)
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
    parameters = sum(leaf.size for name, leaf in flatten(model).items() if ".lora." not in name)
    texts: dict[str, bytes] = vocabulary | {
        "README.md": _card(config, family.model_type, parameters, metrics).encode(),
    }
    if objective in ("causal", "seq2seq"):
        texts["generation_config.json"] = _json(_generation(config.generate, tokens, config.model.family))
    for name, text in (texts | {"config.json": _json(settings)}).items():
        atomic.write(directory / name, text)
    return {"model_type": family.model_type, "files": [*files, *texts, "config.json"], "parameters": parameters}


def export_adapter(directory: epath.Path, model: Any, config: Config) -> dict[str, Any]:
    """Writes what LoRA trained, in PEFT's format; the model it belongs to is the one that the run started from.

    Returns:
      `model_type` of that, names of the `files`.

    Raises:
      ConfigError: the run has no adapters, or no family of Hugging Face has such a model.
      SaveError: the directory cannot be written.
    """
    if not config.model.lora_rank:
        raise ConfigError("this run has no adapters (model.lora_rank=0): leave out --adapter")
    objective = config.task.objective
    family = pretrained.family_of(config.model, objective)
    files = peft.export(directory, model, family, config.model, objective, config.train.init_from)
    return {"model_type": family.model_type, "files": files}


def _vocabulary(words: Tokenizer, family: str) -> dict[str, bytes]:
    """The files of a vocabulary, by name."""
    if isinstance(words, Marian):
        return words.files()
    content = json.dumps(tokenizer_json.convert(words, family), ensure_ascii=False)
    return {"tokenizer.json": content.encode(), "tokenizer_config.json": _json(tokenizer_json.roles(words))}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(settings: GenerateConfig, tokens: Mapping[str, int], family: str) -> dict[str, Any]:
    theirs: dict[str, Any] = {f"{role}_token_id": id for role, id in tokens.items()}
    theirs["eos_token_id"] = [tokens["eos"], *settings.stop_ids] if settings.stop_ids else tokens["eos"]
    theirs |= {"max_new_tokens": settings.max_tokens, "num_beams": settings.beams}
    if family == "encoder_decoder":
        theirs["decoder_start_token_id"] = tokens["bos"]
    if settings.never_ids:
        theirs["bad_words_ids"] = [[id] for id in settings.never_ids]
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
