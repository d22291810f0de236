"""What an adapter's directory holds, in the format of the PEFT package."""

from typing import Any, NamedTuple

from etils import epath

from lslm_jax import atomic
from lslm_jax.convert import safetensors
from lslm_jax.convert.safetensors import Tensor
from lslm_jax.errors import ConfigError, InputMissing

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of tensors
TASKS = {
    "CAUSAL_LM": "causal",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "tagging",
    "QUESTION_ANS": "qa",
}
_DEMANDS = {"use_dora": False, "bias": "none", "lora_bias": False}


class Adapter(NamedTuple):
    """A low-rank adapter in a directory.

    Attributes:
      directory: that holds it.
      settings: adapter_config.json.
      base: the model that it was trained on, as it says.
    """

    directory: epath.Path
    settings: dict[str, Any]
    base: str


def is_adapter(directory: epath.Path) -> bool:
    """Whether a directory holds an adapter."""
    return atomic.exists(directory / SETTINGS)


def describe(directory: epath.Path) -> Adapter:
    """Reads adapter_config.json.

    Raises:
      ConfigError: it is not of a low-rank adapter as we have them.
    """
    path = directory / SETTINGS
    settings = atomic.read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: adapters of type {settings.get('peft_type')} are not supported, only LORA")
    for name, value in _DEMANDS.items():
        if settings.get(name) not in (value, None):
            raise ConfigError(f"{path}: adapters with {name}={settings[name]!r} are not supported, only {value!r}")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path} does not say base_model_name_or_path, the model it was trained on")
    return Adapter(directory, settings, base)


def base_of(adapter: Adapter) -> epath.Path | str:
    """Where the model is that an adapter was trained on: a directory, or a name on the Hub.

    Raises:
      InputMissing: it is neither.
    """
    path = adapter.directory / adapter.base
    if atomic.exists(path):
        return path
    if len(adapter.base.split("/")) != 2:
        raise InputMissing(f"{adapter.directory} was trained on {adapter.base}, which is not here")
    return f"hf://{adapter.base}"


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What it holds of modules that were trained whole, such as heads, by their names in the model."""
    return {name: tensor for name, tensor in tensors(adapter).items() if ".lora_" not in name}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All that it holds, by the names of modules in the model.

    Raises:
      InputMissing, DataError: it has no weights, or they cannot be read.
    """
    path = adapter.directory / WEIGHTS
    if not atomic.exists(path):
        raise InputMissing(f"{adapter.directory} holds no {WEIGHTS}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in safetensors.read_header(path).items()}
