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
from lslm_jax.convert.safetensors import Source
from lslm_jax.data import tokenizer_json
from lslm_jax.data.tokenizer_base import Tokenizer
from lslm_jax.trees import flatten

_PACKAGES = ("lslm_jax", "jax", "flax")


class Exporter:
    """Writes models of one config as Hugging Face directories.

    Attributes:
      model_type: of the family that has such models.
    """

    def __init__(self, config: Config, words: Tokenizer, labels: list[str], dtype: str = "float32"):
        """Settles all that does not depend on weights.

        Args:
          config: resolved.
          words: the vocabulary.
          labels: of classes or tags.
          dtype: of the weights in the files.

        Raises:
          ConfigError: no family of Hugging Face has such a model, or its vocabulary cannot be exported.
        """
        objective = config.task.objective
        self._config, self._dtype = config, dtype
        self._family = family = pretrained.family_of(config.model, objective)
        self.model_type = family.model_type
        self._tokens = tokens = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id}
        settings = pretrained.export_settings(family, config.model, objective, dtype, tokens, labels)
        self._settings = _json(settings)
        self._texts = {
            "tokenizer.json": json.dumps(tokenizer_json.convert(words, config.model.family), ensure_ascii=False),
            "tokenizer_config.json": _json(tokenizer_json.roles(words)),
        }
        if objective in ("causal", "seq2seq"):
            self._texts["generation_config.json"] = _json(_generation(config.generate, tokens, config.model.family))

    def sources(self, model: Any) -> dict[str, Source]:
        """The weights as the family has them, each fetched from its devices when its turn comes."""
        return weights.sources(model, self._family, self._config.model, self._config.task.objective, self._dtype)

    def fetch(self, model: Any) -> dict[str, Source]:
        """The same, fetched now: the arrays of the model may be donated afterwards."""
        fetched = {name: (source, source.make()) for name, source in self.sources(model).items()}
        return {name: source._replace(make=lambda array=array: array) for name, (source, array) in fetched.items()}

    def write(
        self, directory: epath.Path, sources: Mapping[str, Source], parameters: int, metrics: Mapping[str, Any]
    ) -> list[str]:
        """Writes it all, config.json last, so that half of it is nothing; returns the names of the files.

        Args:
          directory: made if it is missing.
          sources: the weights.
          parameters: how many there are.
          metrics: of the model card.

        Raises:
          SaveError: the directory cannot be written.
        """
        with atomic.saving(directory):
            directory.mkdir(parents=True, exist_ok=True)
        files = safetensors.write_directory(directory, sources)
        card = {"README.md": _card(self._config, self.model_type, parameters, metrics)}
        texts = self._texts | card | {"config.json": self._settings}
        for name, text in texts.items():
            atomic.write(directory / name, text.encode())
        return [*files, *texts]


def export(
    directory: epath.Path,
    model: Any,
    config: Config,
    words: Tokenizer,
    labels: list[str],
    dtype: str,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes weights, settings, vocabulary and a model card.

    Args:
      directory: made if it is missing.
      model: with the weights.
      config, words, labels, dtype: as of an `Exporter`.
      metrics: of the model card.

    Returns:
      `model_type`, names of the `files`, `parameters`.

    Raises:
      ConfigError: no family of Hugging Face has such a model, or its vocabulary cannot be exported.
      SaveError: the directory cannot be written.
    """
    exporter = Exporter(config, words, labels, dtype)
    sources = exporter.sources(model)
    if jax.process_index() != 0:
        for source in sources.values():
            source.make()  # every host takes part in fetching, one writes
        return {}
    parameters = sum(leaf.size for leaf in flatten(model).values())
    files = exporter.write(directory, sources, parameters, metrics)
    return {"model_type": exporter.model_type, "files": files, "parameters": parameters}


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
    data = [f"- {name}" for source in sources for name in (source.tfds, *source.files) if name]
    begun = f"the weights of {epath.Path(config.train.init_from).name}" if config.train.init_from else ""
    if not data and begun:
        history = f", taken over by lslm_jax ({config.task.objective}) from {begun}."
    else:
        history = f", trained with lslm_jax ({config.task.objective})" + f" from {begun}" * bool(begun) + " on"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    scores = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "---",
            "",
            f"A {model_type} of {parameters:,} parameters{history}",
            "",
            *(data or ["- synthetic"] * history.endswith("on")),
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
