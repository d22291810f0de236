"""A run's model as a Hugging Face directory that transformers loads with nothing else."""

import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from etils import epath

from lslm_jax.config import Config, ModelConfig
from lslm_jax.convert import generation, hf_hub, model_card, peft, safetensors_io, state_dict
from lslm_jax.convert import peft_files as adapters
from lslm_jax.convert.hf_mapping import Family, differences
from lslm_jax.convert.pretrained import FAMILIES, is_pretrained
from lslm_jax.convert.safetensors_io import Source
from lslm_jax.data.chat import chat_template
from lslm_jax.data.chat.chat_template import Template
from lslm_jax.data.tokenizers import to_hf
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.data.tokenizers.marian import Marian
from lslm_jax.errors import ConfigError
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io

_POOLED = ("classification", "regression")  # whose heads read the whole row


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
        settings = export_settings(
            family, config.model, objective, dtype, tokens, labels, multi_label=config.task.multi_label
        )
        self._settings = _json(settings)
        self._texts = _vocabulary(words, config.model, family.model_type)
        if template is not None:
            self._texts[chat_template.FILE] = template.text.encode()
        if objective in ("causal", "seq2seq"):
            written = generation.write(config.generate, tokens, config.model.family)
            self._texts[generation.FILE] = _json(written)

    def sources(self, model: Any) -> dict[str, Source]:
        """The weights as the family has them, each fetched from its devices when its turn comes."""
        return state_dict.sources(model, self._family, self._config.model, self._config.task.objective, self._dtype)

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
        with atomic_io.saving(directory):
            directory.mkdir(parents=True, exist_ok=True)
        files = safetensors_io.write_directory(directory, sources)
        class_name = self._family.classes[self._config.task.objective]
        readme = model_card.write(self._config, self.model_type, class_name, num_parameters(sources), metrics)
        texts = self._texts | {"README.md": readme.encode(), "config.json": self._settings}
        for name, text in texts.items():
            atomic_io.write(directory / name, text)
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
    require_export_directory(directory)
    sources = exporter.sources(model)
    if not multihost.is_primary():
        for source in sources.values():
            source.make()  # every host takes part in fetching, one writes
        return {}
    with atomic_io.whole_directory(directory, _is_ours, "config.json") as part:
        files = exporter.write(part, sources, metrics)
    return {"model_type": exporter.model_type, "files": files, "parameters": num_parameters(sources)}


def require_export_directory(directory: epath.Path) -> None:
    """Refuses a run directory, and those within one, whose files an export would take for its own.

    Raises:
      ConfigError: it is one.
    """
    if atomic_io.exists(directory / "checkpoints"):
        raise ConfigError(f"--to={directory} is a run directory: choose another for the export")
    if atomic_io.exists(directory / "manifest.json"):
        raise ConfigError(f"--to={directory} holds prepared data or a checkpoint: choose another for the export")


def num_parameters(sources: Mapping[str, Source]) -> int:
    """Entries of all tensors together."""
    return sum(math.prod(source.shape) for source in sources.values())


def export_adapter(directory: epath.Path, model: Any, config: Config) -> dict[str, Any]:
    """Writes what LoRA trained, in PEFT's format; the model it belongs to is the one that the run started from.

    Returns:
      `model_type` of that, names of the `files`.

    Raises:
      ConfigError: the run has no adapters, or did not begin with a Hugging Face model; `directory` is of a run.
      SaveError: the directory cannot be written.
    """
    if not config.model.lora_rank:
        raise ConfigError("this run has no adapters (model.lora_rank=0): leave out --adapter")
    require_export_directory(directory)
    objective = config.task.objective
    family = family_of(config.model, objective)
    files = peft.export(directory, model, family, config.model, objective, _base(config.train.init_from))
    return {"model_type": family.model_type, "files": files}


def _base(begun: str) -> str:
    """The model that a run's adapters stand beside; where the run went on with others, that of those."""
    path = epath.Path(begun)
    if not begun or (atomic_io.exists(path) and not is_pretrained(path)):
        raise ConfigError(
            f"the run began with {begun or 'random weights'}, no Hugging Face model to put adapters beside: leave out "
            "--adapter"
        )
    if not adapters.is_adapter(path):
        return os.fspath(path).removeprefix(hf_hub.SCHEME)
    begun_with = adapters.describe(path)
    changed = [name for name in adapters.tensors(begun_with) if "embed" in name or name == "lm_head.weight"]
    if changed:
        raise ConfigError(f"the run began with {path}, which changes {changed[0]}: leave out --adapter")
    base = adapters.base_of(begun_with)
    return os.fspath(base).removeprefix(hf_hub.SCHEME)


def _vocabulary(words: Tokenizer, model: ModelConfig, model_type: str) -> dict[str, bytes]:
    """The files of a tokenizer, by name."""
    if isinstance(words, Marian):
        return words.files()
    return to_hf.files(words, model.family, model_type, model.max_length)


_WRITTEN = ("*.safetensors", "model.safetensors.index.json", "config.json", "README.md", "tokenizer*.json", "*.spm")
_WRITTEN += (generation.FILE, "vocab.*", "merges.txt", "spiece.model", "tokenizer.model", "special_tokens_map.json")
_WRITTEN += ("added_tokens.json", chat_template.FILE, "adapter_config.json", "*.tmp")


def _is_ours(name: str) -> bool:
    """True if a file is of an export; others stay where a directory is written anew."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WRITTEN)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def family_of(model: ModelConfig, objective: str) -> Family:
    """The first family that has such models.

    Raises:
      ConfigError: none has; it says what the nearest one lacks.
    """
    model = replace(model, vocab_size=model.vocab_size or 1)  # before the tokenizer is known
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


def obstacle(model: ModelConfig, objective: str) -> str | None:
    """A line on the settings by which a model cannot be exported, with those of the nearest family; None if it can."""
    try:
        family_of(model, objective)
    except ConfigError as error:
        model = replace(model, vocab_size=model.vocab_size or 1)
        best: list[str] | None = None
        name = ""
        for family in FAMILIES:
            if objective not in family.classes:
                continue
            try:
                near = family.read(family.spell(model))
            except ConfigError:
                continue
            changes = differences(model, near)
            changes += [f"model.pool={near.pool}"] if objective in _POOLED and near.pool != model.pool else []
            if best is None or len(changes) < len(best):
                best, name = changes, family.model_type
        return (
            f"export: no {name} is like this model; it would be with {', '.join(best)}" if best else f"export: {error}"
        )
    return None


def export_settings(
    family: Family,
    model: ModelConfig,
    objective: str,
    dtype: str,
    tokens: Mapping[str, int | None],
    labels: Sequence[str] = (),
    *,
    multi_label: bool = False,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      family: that has such models.
      model: with all sizes filled in.
      objective: which head it has.
      dtype: of the weights.
      tokens: ids of `bos`, `eos` and `pad`.
      labels: of classes or tags.
      multi_label: whether each class is judged by itself.

    Raises:
      ConfigError: the family has no such models, or would count the positions of another padding token.
    """
    if model.position_offset and tokens["pad"] != model.position_offset - 1:
        raise ConfigError(
            f"a {family.model_type} counts positions from the id of its padding token on, which is {tokens['pad']}: "
            f"model.position_offset={model.position_offset} must be {(tokens['pad'] or 0) + 1}"
        )
    ids = {f"{role}_token_id": id for role, id in tokens.items()}
    settings = ids | family.write(model) | {"architectures": [family.classes[objective]], "torch_dtype": dtype}
    if model.family == "encoder_decoder":
        settings |= {"is_encoder_decoder": True, "decoder_start_token_id": tokens["bos"]}
    if objective == "regression":
        settings |= {"num_labels": 1, "problem_type": "regression"}
    if labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    if objective == "classification" and len(labels) > 1:
        kind = "multi" if multi_label else "single"
        settings["problem_type"] = f"{kind}_label_classification"
    return settings
