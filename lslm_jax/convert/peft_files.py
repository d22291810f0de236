"""Content of an adapter's directory in the format of the PEFT package."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lslm_jax.convert import hf_keys, safetensors_io
from lslm_jax.convert.hf_mapping import Family
from lslm_jax.convert.safetensors_io import Stored, Tensor, View, same_bytes
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime import atomic_io

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
READ = frozenset(
    """
    peft_type base_model_name_or_path task_type r lora_alpha rank_pattern alpha_pattern use_rslora target_modules
    exclude_modules layers_to_transform layers_pattern modules_to_save init_lora_weights revision
    """.split()
)
# Training, provenance, and the orientation of weights, which PEFT sets right by itself.
IRRELEVANT = frozenset(
    """
    auto_mapping inference_mode lora_dropout fan_in_fan_out megatron_config megatron_core peft_version runtime_config
    qalora_group_size lora_ga_config eva_config loftq_config corda_config
    """.split()
)
# Ways to begin that leave the model's own weights as they are; PEFT repeats others when it loads an adapter.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_KINDS = {"lora_alpha": ("int", "float"), "init_lora_weights": ("bool", "str", "null")}  # wider than declared
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_BASE = ".base_layer.weight"


class Adapter(NamedTuple):
    """A low-rank adapter in a directory.

    Attributes:
      directory: that holds it.
      settings: adapter_config.json, with PEFT's defaults for missing keys.
      base: the model that it was trained on: a directory, or a name on the Hub.
    """

    directory: epath.Path
    settings: dict[str, Any]
    base: str


def is_adapter(directory: epath.Path) -> bool:
    """Whether a directory holds an adapter."""
    return atomic_io.exists(directory / SETTINGS)


def status(key: str) -> str:
    """`read`, `irrelevant` or `rejected` (when not the default)."""
    return "read" if key in READ else "irrelevant" if key in IRRELEVANT else "rejected"


def describe(directory: epath.Path) -> Adapter:
    """Reads adapter_config.json.

    Raises:
      ConfigError: it is not of a low-rank adapter as we have them.
    """
    path = directory / SETTINGS
    given = atomic_io.read_json(path)
    if given.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type: adapters of type {given.get('peft_type')} are not supported, only LORA")
    table = hf_keys.table()["adapter"]
    for key, value in given.items():
        kinds = _KINDS.get(key) or table["types"].get(key)
        if status(key) != "irrelevant" and kinds and not hf_keys.is_of(value, kinds):
            raise ConfigError(f"{path}: {key}={hf_keys.short(value)} is not {' or '.join(kinds)}")
        expected = table["defaults"].get(key)
        if status(key) == "rejected" and value != expected and not (expected is None and not value):
            raise ConfigError(
                f"{path}: adapters with {key}={hf_keys.short(value)} are not supported, only {hf_keys.short(expected)}"
            )
    settings = table["defaults"] | given
    start = settings["init_lora_weights"]
    if start not in _STARTS:
        raise ConfigError(f"{path}: adapters with init_lora_weights={start!r} change the model's own weights")
    for key in ("r", "lora_alpha"):
        if settings[key] <= 0:
            raise ConfigError(f"{path}: {key}={settings[key]} must be positive")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path} does not say base_model_name_or_path, the model it was trained on")
    return Adapter(directory, settings, base)


def base_of(adapter: Adapter) -> epath.Path | str:
    """The place of the model that an adapter was trained on: a directory, or a name on the Hub.

    Raises:
      ConfigError: it is the adapter itself.
      InputMissing: it is neither.
    """
    path = adapter.directory / adapter.base
    if atomic_io.exists(path):
        if path.resolve() == adapter.directory.resolve():
            raise ConfigError(f"{adapter.directory / SETTINGS}: base_model_name_or_path names the adapter itself")
        return path
    if len(adapter.base.split("/")) != 2:
        raise InputMissing(f"{adapter.directory} was trained on {adapter.base}, which is not here")
    revision = adapter.settings.get("revision")
    return f"hf://{adapter.base}" + (f"@{revision}" if revision else "")


def unties(adapter: Adapter, family: Family) -> bool:
    """True if an adapter changes one of two tied tensors, embedding or output layer: PEFT leaves the other alone."""
    if "masked" in family.classes and adapter.settings.get("task_type") in TASKS:
        return False  # heads of encoders that do not read the embedding
    touched = {_module(name) for name in tensors(adapter)}
    tied = {str(family.modules.get(name)).removesuffix(".weight") for name in ("embed", "head")}
    return bool(touched & tied)


def _module(name: str) -> str:
    for suffix in (*_LORA, _BASE, ".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def applied(adapter: Adapter, base: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors of a model, with those that an adapter replaces, and its change of embeddings; not those of blocks.

    Raises:
      DataError: a tensor of the adapter would have no effect in PEFT, or is not understood.
    """
    if not any(name.startswith(family.prefix) for name in base):  # saved without a head
        base = {family.prefix + name: tensor for name, tensor in base.items()}
    own, found = tensors(adapter), dict(base)
    embed, head = (family.modules.get(name) for name in ("embed", "head"))
    if isinstance(head, str) and isinstance(embed, str) and unties(adapter, family) and embed in base:
        found.setdefault(head, base[embed])
    for name, tensor in own.items():
        module = _module(name)
        if name.endswith(_BASE):
            if module + ".weight" not in base or not same_bytes(tensor, base[module + ".weight"]):
                raise DataError(f"{adapter.directory}: {name} differs from the model that it was trained on")
        elif name.endswith(_LORA):
            _require_targeted(adapter, module)
        elif _is_saved(adapter, module):
            found[name] = tensor
        else:
            raise DataError(f"{adapter.directory}: {name} is in {WEIGHTS}, but its module is not in modules_to_save")
    for name in [name for name in own if name.endswith(".lora_embedding_A")]:
        module = _module(name)
        weight = f"{module}.weight"
        if weight not in base or f"{module}.lora_embedding_B" not in own:
            raise DataError(f"{adapter.directory} adapts {module}, which the model lacks")
        a, b = own[name], own[f"{module}.lora_embedding_B"]
        found[weight] = _Adapted(base[weight], a, b, scale(adapter.settings, module, a.shape[0]))
    return found


class _Adapted(View):
    """An embedding with the change that an adapter makes to it."""

    def __init__(self, base: Stored, a_RV: Tensor, b_DR: Tensor, scale: float):
        super().__init__(base)
        self._a_RV, self._b_DR, self._scale = a_RV, b_DR, scale

    def read(self) -> np.ndarray:
        """The whole array, in float32."""
        a_RV, b_DR = (part.read().astype(np.float32) for part in (self._a_RV, self._b_DR))
        if (b_DR.shape[0], a_RV.shape[1]) != self.shape[::-1] or a_RV.shape[0] != b_DR.shape[1]:
            raise DataError(f"{self._a_RV.path}: the adapter of the embedding has another shape than it")
        return self._base.read().astype(np.float32) + self._scale * (b_DR @ a_RV).T


def scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of a module's adapter.

    Raises:
      ConfigError: the settings give the module another rank.
    """
    expected = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    if expected != rank:
        raise ConfigError(f"adapter_config.json gives {module} the rank r={expected}, but its matrices have {rank}")
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    own = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(own, default)


def _is_saved(adapter: Adapter, module: str) -> bool:
    names = [*(adapter.settings.get("modules_to_save") or ()), *_HEADS.get(str(adapter.settings.get("task_type")), ())]
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


def _require_targeted(adapter: Adapter, module: str) -> None:
    """PEFT leaves out adapters of modules that its settings do not name."""
    settings = adapter.settings
    if _named(settings.get("exclude_modules"), module) or _is_saved(adapter, module):
        raise DataError(f"{adapter.directory / SETTINGS}: {module} has an adapter, but exclude_modules names it")
    targets = settings.get("target_modules")
    if targets == "all-linear" or (targets and _named(targets, module) and _in_layers(settings, module)):
        return
    why = "target_modules or layers_to_transform leave it out"
    raise DataError(f"{adapter.directory / SETTINGS}: {module} has an adapter, but {why}")


def _named(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _in_layers(settings: Mapping[str, Any], module: str) -> bool:
    layers, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern") or ()
    if layers is None or layers == [] or isinstance(settings.get("target_modules"), str):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for form in forms if (match := re.match(form, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All that it holds, by the names of modules in the model.

    Raises:
      InputMissing, DataError: it has no weights, or they cannot be read.
    """
    path = adapter.directory / WEIGHTS
    if not atomic_io.exists(path):
        raise InputMissing(f"{adapter.directory} holds no {WEIGHTS}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in safetensors_io.read_header(path).items()}
