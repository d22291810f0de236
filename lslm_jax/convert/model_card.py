"""Model card of an exported directory: Markdown that shows names of files, labels and settings as plain text.

Names of files, labels and metrics come from data, so that they may hold Markdown, HTML or line breaks: they are shown
as code. Directories of this machine are left out; a file is shown by its name alone.
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from typing import Any

from lslm_jax.config import Config, loading
from lslm_jax.convert import hf_hub

_PACKAGES = ("lslm_jax", "jax", "flax")
_PIPELINES = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classification": "text-classification",
    "regression": "text-classification",
    "tagging": "token-classification",
    "qa": "question-answering",
}
# Settings that name files or directories, wherever they stand in a config.
_PATHS = ("files", "valid_files", "test_files", "data_dir", "dir", "path", "init_from", "chat_template")


def write(config: Config, model_type: str, class_name: str, parameters: int, metrics: Mapping[str, Any]) -> str:
    """Returns the model card: usage, training data, metrics, versions and settings.

    Args:
      config: of the run.
      model_type: of config.json, as `llama`.
      class_name: in transformers, as `LlamaForCausalLM`.
      parameters: number of entries of all tensors.
      metrics: of the run; those that are numbers are listed.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    scores = [f"| {_inline(name)} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    lines = [
        *_front_matter(config, model_type),
        f"A `{model_type}` model of {parameters:,} parameters{_history(config)}",
        "",
        *_data(config),
        *_usage(class_name),
        f"It reads at most {config.model.max_length:,} tokens.",
        "",
        *(["## Metrics", "", "| metric | value |", "| --- | --- |", *scores, ""] if scores else []),
        "## Settings",
        "",
        f"Made with {', '.join(versions)}.",
        "",
        "```json",
        json.dumps(_without_directories(loading.to_dict(config)), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(config: Config, model_type: str) -> list[str]:
    pipeline = _PIPELINES.get(config.task.objective)
    tags = ["tags:", "- lslm_jax", f"- {model_type}"]
    return ["---", "library_name: transformers", *([f"pipeline_tag: {pipeline}"] if pipeline else []), *tags, "---", ""]


def _history(config: Config) -> str:
    objective, begun = config.task.objective, _base_name(config.train.init_from)
    source = f" from the weights of {_inline(begun)}" if begun else ""
    if begun and not _names(config):
        return f", taken over by lslm_jax ({objective}){source}."
    return f", trained with lslm_jax ({objective}){source} on"


def _data(config: Config) -> list[str]:
    names = _names(config) or ([] if config.train.init_from else ["synthetic"])
    return [*(f"- {_inline(name)}" for name in names), ""] if names else []


def _names(config: Config) -> list[str]:
    """Names of the training data, without directories."""
    sources = config.data.mixture or (config.data,)
    return [name for source in sources for name in (source.tfds, *map(_base_name, source.files)) if name]


def _usage(class_name: str) -> list[str]:
    return [
        "## Usage",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {class_name}",
        "",
        'directory = "."  # of this file',
        "tokenizer = AutoTokenizer.from_pretrained(directory)",
        f"model = {class_name}.from_pretrained(directory)",
        "```",
        "",
    ]


def _without_directories(value: Any, key: str = "") -> Any:
    """Settings of a config as JSON values, paths reduced to names."""
    if isinstance(value, Mapping):
        return {name: _without_directories(part, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_directories(part, key) for part in value]
    return _base_name(value) if key in _PATHS and isinstance(value, str) else value


def _base_name(path: str) -> str:
    """Last part of a path, or the whole address of a model on the Hub."""
    return path if path.startswith(hf_hub.SCHEME) else path.rstrip("/").rpartition("/")[2]


def _inline(text: str) -> str:
    """Text as Markdown that shows it as it is, on one line: as code unless it is a plain name."""
    if re.fullmatch(r"\w[\w/.:@+-]*", text):
        return text
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return f"`{shown.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
