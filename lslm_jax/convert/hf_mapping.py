"""A model family of Hugging Face as a table: which of its names and settings are which of ours.

Both directions are read off the same table. What our blocks cannot express exactly is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from lslm_jax.config import ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import hf_keys
from lslm_jax.errors import ConfigError
from lslm_jax.models.model_configs import layer_types

Settings = Mapping[str, Any]  # of a config.json
LAYER = "{i}"  # stands for a layer's number in a name of theirs
EXPERT = "{e}"  # and this for an expert's
# Are chosen by whoever runs a model.
RUN_KEYS = ("dtype", "attention", "scan_layers", "remat", "microbatches", "pipeline_rounds", "init")
RUN_KEYS += ("lora_rank", "lora_alpha", "lora_targets")
_SIZES: dict[str, int] = dict.fromkeys(
    ("vocab_size", "d_model", "num_heads", "d_ff", "head_dim", "token_types", "max_length"), 2**31 - 1
)
_SIZES |= dict.fromkeys(("num_layers", "num_decoder_layers", "num_experts"), 10_000)  # each layer costs time to plan
_OF_A_RUN = {*RUN_KEYS, "dropout", "pool"}  # change how it is trained or run, not what it computes


class Part(NamedTuple):
    """One of several projections of ours that lie side by side in one of theirs.

    Attributes:
      name: of theirs.
      index: which one it is.
      count: of how many.
      by_head: whether each head's own lie side by side (GPT-NeoX), not all heads' of one after another (GPT-2).
    """

    name: str
    index: int
    count: int
    by_head: bool = False


class Setting(NamedTuple):
    """Settings that do not go over one by one: theirs to ours, and ours to theirs; `keys` of theirs are read."""

    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    keys: tuple[str, ...] = ()


class Unlike(ConfigError):
    """A directory of another family than the one that it is compared with."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    Attributes:
      model_type: as config.json names it.
      classes: by objective of ours, the class of transformers with that head.
      prefix: of the names in the body; a model saved without a head may lack it.
      modules: names of the body, ours to theirs, without `.weight` and `.bias`; `blocks.` and LAYER for each layer,
        EXPERT for each expert.
      heads: the same of what only models for one objective have.
      ignored: patterns of names that hold nothing to learn: masks, tables of waves, copies of tied weights.
      stand_ins: by name of a tensor that may be missing, the one that is meant then.
      copies: by pattern of the names of tied tensors in the file, the tensor that they must equal.
      fields: settings, ours to theirs; a missing one has the default of the transformers class.
      settings: those that need more.
      fixed: settings of ours that all models of the family share.
      demands: settings of theirs that must be so, or not be there.
      rows: names of theirs that have one axis more in front, of size 1.
      transposed: whether weights are stored [outputs, inputs], as PyTorch's Linear has them.
    """

    model_type: str
    classes: Mapping[str, str]
    prefix: str
    modules: Mapping[str, str | Part]
    heads: Mapping[str, Mapping[str, str | Part]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str]
    settings: tuple[Setting, ...] = ()
    fixed: Mapping[str, Any]
    demands: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    transposed: bool = True

    @property
    def keys(self) -> set[str]:
        """Keys of config.json that `read` uses."""
        return {*self.fields.values(), *self.demands, *(key for setting in self.settings for key in setting.keys)}

    def read(self, theirs: Settings) -> ModelConfig:
        """The model that a config.json describes, sizes filled in.

        Raises:
          Unlike: a setting tells that it is of another family with this model_type.
          ConfigError: it has a setting that our blocks cannot express, or of the wrong kind.
        """
        theirs = hf_keys.resolve(self.model_type, theirs, self.keys)
        for name, value in self.demands.items():
            if theirs.get(name, value) != value:
                raise Unlike(f"{self.model_type} with {name}={theirs[name]!r} is not supported, only {value!r}")
        ours = dict(self.fixed)
        for name, key in self.fields.items():
            if name in _SIZES and not 0 < theirs[key] <= _SIZES[name]:
                raise ConfigError(f"{key}={theirs[key]} must be from 1 to {_SIZES[name]:,}")
            ours[name] = theirs[key]
        for setting in self.settings:
            ours |= setting.read(theirs)
        return fill_sizes(ModelConfig(**ours))

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model.

        Raises:
          ConfigError: the family has no such models.
        """
        theirs = self.spell(model)
        if unlike := differences(self.read(theirs), model):
            raise ConfigError(f"{self.model_type} has no {unlike[0]}")
        return theirs

    def spell(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of the model of this family that is nearest to one; ConfigError where there is none near."""
        theirs: dict[str, Any] = {"model_type": self.model_type}
        theirs |= {key: getattr(model, name) for name, key in self.fields.items()}
        for setting in self.settings:
            theirs |= setting.write(model)
        return theirs | dict(self.demands)

    def sizes(self, model: ModelConfig) -> str:
        """Settings of config.json that determine the names and shapes of tensors, as messages list them."""
        is_size = lambda key, value: type(value) is int or key == "tie_word_embeddings"
        return ", ".join(f"{key}={value}" for key, value in self.spell(model).items() if is_size(key, value))

    def places(self, objective: str) -> dict[str, str | Part]:
        """Names of the body and of the head for an objective, ours to theirs."""
        return {**self.modules, **self.heads.get(objective, {})}


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """What tells two models apart, as `model.norm=layernorm`, in the words of the second; not how they are run."""
    a, b = _normal(a), _normal(b)
    names = [f.name for f in fields(ModelConfig) if f.name not in _OF_A_RUN]
    return [f"model.{name}={getattr(b, name)}" for name in names if getattr(a, name) != getattr(b, name)]


def _normal(model: ModelConfig) -> ModelConfig:
    """The same model with every layer named, and without settings that do nothing in it."""
    model = replace(fill_sizes(model), num_labels=0)
    kinds = layer_types(model, model.num_layers)
    unused: dict[str, Any] = {}
    blank = ModelConfig()
    if model.positions != "rotary":
        unused |= {f.name: getattr(blank, f.name) for f in fields(ModelConfig) if f.name.startswith("rope_")}
    elif model.rope_scaling != "llama3":
        stretched = ("rope_low_factor", "rope_high_factor", "rope_original_length")
        unused |= {name: getattr(blank, name) for name in stretched}
    if model.positions == "relative":  # which reach as far as memory does
        unused["max_length"] = blank.max_length
    else:
        unused |= {name: getattr(blank, name) for name in ("relative_buckets", "relative_distance")}
    if model.family != "encoder":
        unused |= {name: getattr(blank, name) for name in ("head_activation", "head_norm")}
    if model.bias:
        unused["qkv_bias"] = False
    if not model.num_experts:
        unused |= {name: getattr(blank, name) for name in ("experts_per_token", "expert_normalize")}
    if model.attention_scale == model.head_dim**-0.5:
        unused["attention_scale"] = 0.0
    if "window" not in kinds:
        unused |= {"window": 0, "rope_local_theta": 0.0}
    elif model.rope_local_theta == model.rope_theta and model.rope_scaling == "none":
        unused["rope_local_theta"] = 0.0
    return replace(model, layer_types=tuple(kinds), **unused)


class Layout(NamedTuple):
    """How an array of ours lies in one of theirs: cut that into `split`, put the axes in `order`: [count, *ours].

    Attributes:
      shape: of theirs.
      split: sizes that it is cut into.
      order: of these axes, the first is of the parts.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    def ours(self, theirs: np.ndarray, index: int) -> np.ndarray:
        """A part of theirs as ours has it: a view."""
        return theirs.reshape(self.split).transpose(self.order)[index]

    def theirs(self, ours: list[np.ndarray]) -> np.ndarray:
        """All parts as theirs has them."""
        return np.stack(ours).transpose(np.argsort(self.order)).reshape(self.shape)


def num_inputs(module: str) -> int:
    """Axes that a projection of ours sums over: heads and their width, or one."""
    return 2 if module.endswith(".o") else 1


def layout(name: str, shape: tuple[int, ...], place: str | Part, *, transposed: bool) -> Layout:
    """The layout of a parameter of ours, of one layer where there are several.

    Args:
      name: of ours; it tells what is multiplied with it.
      shape: of ours.
      place: where it lies.
      transposed: whether theirs is stored [outputs, inputs].
    """
    count, by_head = (1, False) if isinstance(place, str) else (place.count, place.by_head)
    is_matrix = name.endswith(".w")
    count_in = num_inputs(name.removesuffix(".w")) if is_matrix else 0
    inputs, outputs = shape[:count_in], shape[count_in:]
    whole = lambda sizes: (int(np.prod(sizes)),) if sizes else ()
    if by_head:
        split_out, axes_out, axis_count = (outputs[0], count, *outputs[1:]), [0, *range(2, len(outputs) + 1)], 1
    else:
        split_out, axes_out, axis_count = (count, *outputs), list(range(1, len(outputs) + 1)), 0
    if name.split(".")[-1] in ("w", "b", "scale", "bias"):
        flat_out = (count * int(np.prod(outputs)),)
    else:
        flat_out = outputs  # a table
    if is_matrix and not transposed:
        split, shift, first = (*inputs, *split_out), count_in, 0
        flat = (*whole(inputs), *flat_out)
    else:
        split, shift, first = (*split_out, *inputs), 0, len(split_out)
        flat = (*flat_out, *whole(inputs))
    order = (axis_count + shift, *range(first, first + count_in), *(axis + shift for axis in axes_out))
    return Layout(flat, split, order)
