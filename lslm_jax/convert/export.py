"""A run's model as a Hugging Face directory that transformers loads with nothing else."""

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lslm_jax import atomic, config_loading, distributed
from lslm_jax.config import Config, GenerateConfig, ModelConfig
from lslm_jax.convert import adapter as adapters
from lslm_jax.convert import hub, peft, safetensors, weights
from lslm_jax.convert.family import Family
from lslm_jax.convert.pretrained import FAMILIES, is_pretrained
from lslm_jax.convert.safetensors import Source
from lslm_jax.data import templates, tokenizer_json
from lslm_jax.data.marian import Marian
from lslm_jax.data.templates import Template
from lslm_jax.data.tokenizer_base import Tokenizer
from lslm_jax.errors import ConfigError

_POOLED = ("classification", "regression")  # whose heads read the whole row
_PACKAGES = ("lslm_jax", "jax", "flax")


class Exporter:
    """Writes models of one config as Hugging Face directories.

    Attributes:
      model_type: of the family that has such models.
    """

    def __init__(
        self,
        config: Config,
        words: Tokenizer,
        labels: list[str],
        dtype: str = "float32",
        template: Template | None = None,
    ):
        """Settles all that does not depend on weights.

        Args:
          config: resolved.
          words: the vocabulary.
          labels: of classes or tags.
          dtype: of the weights in the files.
          template: that the model was taught to chat by.

        Raises:
          ConfigError: no family of Hugging Face has such a model, or its vocabulary cannot be exported.
        """
        objective = config.task.objective
        self._config, self._dtype = config, dtype
        self._family = family = family_of(config.model, objective)
        self.model_type = family.model_type
        tokens = {"bos": words.bos_id, "eos": words.eos_id, "pad": words.pad_id}
        settings = export_settings(family, config.model, objective, dtype, tokens, labels)
        self._settings = _json(settings)
        self._texts = _vocabulary(words, config.model.family)
        if template is not None:
            self._texts[templates.FILE] = template.text.encode()
        if objective in ("causal", "seq2seq"):
            self._texts["generation_config.json"] = _json(_generation(config.generate, tokens, config.model.family))

    def sources(self, model: Any) -> dict[str, Source]:
        """The weights as the family has them, each fetched from its devices when its turn comes."""
        return weights.sources(model, self._family, self._config.model, self._config.task.objective, self._dtype)

    def fetch(self, model: Any) -> dict[str, Source]:
        """The same, fetched now: the arrays of the model may be donated afterwards."""
        fetched = {name: (source, source.make()) for name, source in self.sources(model).items()}
        return {name: source._replace(make=lambda array=array: array) for name, (source, array) in fetched.items()}

    def write(self, directory: epath.Path, sources: Mapping[str, Source], metrics: Mapping[str, Any]) -> list[str]:
        """Writes it all, config.json last, so that half of it is nothing; returns the names of the files.

        Args:
          directory: made if it is missing.
          sources: the weights.
          metrics: of the model card.

        Raises:
          SaveError: the directory cannot be written.
        """
        with atomic.saving(directory):
            directory.mkdir(parents=True, exist_ok=True)
        files = safetensors.write_directory(directory, sources)
        card = _card(self._config, self.model_type, num_parameters(sources), metrics)
        texts = self._texts | {"README.md": card.encode(), "config.json": self._settings}
        for name, text in texts.items():
            atomic.write(directory / name, text)
        return [*files, *texts]


def export(directory: epath.Path, model: Any, exporter: Exporter, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights, settings, vocabulary and a model card.

    Args:
      directory: made if it is missing.
      model: with the weights.
      exporter: of its config.
      metrics: of the model card.

    Returns:
      `model_type`, names of the `files`, `parameters`.

    Raises:
      SaveError: the directory cannot be written.
    """
    sources = exporter.sources(model)
    if not distributed.is_primary():
        for source in sources.values():
            source.make()  # every host takes part in fetching, one writes
        return {}
    files = exporter.write(directory, sources, metrics)
    return {"model_type": exporter.model_type, "files": files, "parameters": num_parameters(sources)}


def num_parameters(sources: Mapping[str, Source]) -> int:
    """Entries of all tensors together."""
    return sum(math.prod(source.shape) for source in sources.values())


def export_adapter(directory: epath.Path, model: Any, config: Config) -> dict[str, Any]:
    """Writes what LoRA trained, in PEFT's format; the model it belongs to is the one that the run started from.

    Returns:
      `model_type` of that, names of the `files`.

    Raises:
      ConfigError: the run has no adapters, or did not begin with a Hugging Face model.
      SaveError: the directory cannot be written.
    """
    if not config.model.lora_rank:
        raise ConfigError("this run has no adapters (model.lora_rank=0): leave out --adapter")
    objective = config.task.objective
    family = family_of(config.model, objective)
    files = peft.export(directory, model, family, config.model, objective, _base(config.train.init_from))
    return {"model_type": family.model_type, "files": files}


def _base(begun: str) -> str:
    """The model that a run's adapters stand beside; where the run went on with others, that of those."""
    path = epath.Path(begun)
    if not begun or (atomic.exists(path) and not is_pretrained(path)):
        raise ConfigError(
            f"the run began with {begun or 'random weights'}, no Hugging Face model to put adapters beside: leave out "
            "--adapter"
        )
    base = adapters.base_of(adapters.describe(path)) if adapters.is_adapter(path) else path
    return os.fspath(base).removeprefix(hub.SCHEME)


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


def family_of(model: ModelConfig, objective: str) -> Family:
    """The first family that has such models.

    Raises:
      ConfigError: none has; it says what the nearest one lacks.
    """
    problems = []
    for family in FAMILIES:
        if objective not in family.classes:
            continue
        try:
            read = family.read(family.write(model))
        except ConfigError as error:
            problems.append(str(error))
            continue
        if objective not in _POOLED or read.pool == model.pool:
            return family
        problems.append(f"{family.model_type} has no model.pool={model.pool}")
    if not problems:
        raise ConfigError(f"no family of Hugging Face has models for task.objective={objective}")
    raise ConfigError(f"no family of Hugging Face has such models: {'; '.join(problems)}")


def export_settings(
    family: Family,
    model: ModelConfig,
    objective: str,
    dtype: str,
    tokens: Mapping[str, int | None],
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      family: that has such models.
      model: with all sizes filled in.
      objective: which head it has.
      dtype: of the weights.
      tokens: ids of `bos`, `eos` and `pad`.
      labels: of classes or tags.
    """
    ids = {f"{role}_token_id": id for role, id in tokens.items()}
    settings = ids | family.write(model) | {"architectures": [family.classes[objective]], "torch_dtype": dtype}
    if model.family == "encoder_decoder":
        settings |= {"is_encoder_decoder": True, "decoder_start_token_id": tokens["bos"]}
    if objective == "regression":
        settings |= {"num_labels": 1, "problem_type": "regression"}
    if labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    return settings
