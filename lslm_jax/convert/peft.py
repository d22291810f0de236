"""Low-rank adapters in the format of the PEFT package: what was trained alone, beside the model it was trained on.

Where theirs has one projection for several of ours (GPT-2's c_attn), one adapter of theirs stands for several of ours:
their ranks lie side by side, and each of them reaches its own outputs only.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lslm_jax.config import ModelConfig
from lslm_jax.convert import peft_files as adapters
from lslm_jax.convert import safetensors_io, state_dict
from lslm_jax.convert.hf_mapping import LAYER, Family, Layout, Part, layout, num_inputs
from lslm_jax.convert.peft_files import PREFIX, SETTINGS, TASKS, WEIGHTS, Adapter, tensors
from lslm_jax.convert.safetensors_io import Source, Tensor
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.models import lora
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.pytree import flatten, unflatten


class _Use(NamedTuple):
    """A layer of a projection of ours that one of theirs holds, as which part of it; and how its outputs lie there."""

    ours: str
    theirs: str  # with LAYER for the layer's number
    layer: int
    part: int
    outputs: Layout


# Reading.


def apply(adapter: Adapter, model: Any, family: Family, objective: str) -> Any:
    """A model with an adapter: in its own adapters, if it has some, to be trained on, or else in its weights.

    Raises:
      ConfigError: the model's own adapters are fewer, or of smaller rank.
      DataError: it is for a projection that the model lacks, or one of another shape.
    """
    arrays = flatten(model)
    found = _read(adapter, arrays, family, objective)
    config = model.config
    if not config.lora_rank:
        return unflatten(model, lora.merge(arrays | found))
    for name, theirs in found.items():
        if name not in arrays:
            raise ConfigError(f"{adapter.directory} adapts {name.partition('.lora')[0]}: name it in model.lora_targets")
        ours = arrays[name]
        if any(size > room for size, room in zip(theirs.shape, ours.shape, strict=True)):
            rank = theirs.shape[1] if name.endswith(".b") else theirs.shape[-1]
            raise ConfigError(f"{adapter.directory} has rank {rank}: set model.lora_rank={rank} or more")
        part = theirs * (config.lora_rank / config.lora_alpha) if name.endswith(".b") else theirs
        arrays[name] = jax.device_put(_put(ours, part), ours.sharding)
    return unflatten(model, arrays)


@jax.jit
def _put(ours: jax.Array, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(ours, part, [0] * ours.ndim)


def _read(adapter: Adapter, arrays: Mapping[str, Any], family: Family, objective: str) -> dict[str, np.ndarray]:
    """Adapters of ours by name, a [L, *inputs, R] and b [L, R, *outputs], the scale in b; zeros where it has none."""
    uses, stored = _uses(arrays, family, objective), tensors(adapter)
    names = sorted(name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight"))
    if strangers := [name for name in names if name not in uses]:
        raise DataError(f"{adapter.directory} adapts {strangers[0]}, which a {family.model_type} like this lacks")
    largest = max((stored[f"{name}.lora_A.weight"].shape[0] for name in names), default=0)
    found: dict[str, np.ndarray] = {}
    for name in names:
        a, b = (_tensor(adapter, stored, f"{name}.lora_{letter}.weight") for letter in "AB")
        rank, scale = len(a), adapters.scale(adapter.settings, name, len(a))
        for use in uses[name]:
            shape = arrays[f"{use.ours}.w"].shape
            inputs, outputs = shape[1 : 1 + num_inputs(use.ours)], shape[1 + num_inputs(use.ours) :]
            if a.shape != (rank, np.prod(inputs)) or b.shape != (*use.outputs.shape, rank):
                raise DataError(f"{adapter.directory}: the adapter of {name} has another shape than {name}")
            a_name, b_name = f"{use.ours}.lora.a", f"{use.ours}.lora.b"
            all_a = found.setdefault(a_name, np.zeros((shape[0], *inputs, largest), np.float32))
            all_b = found.setdefault(b_name, np.zeros((shape[0], largest, *outputs), np.float32))
            all_a[use.layer][..., :rank] = a.T.reshape(*inputs, rank)
            all_b[use.layer][:rank] = [scale * use.outputs.ours(column, use.part) for column in b.T]
    return found


def _tensor(adapter: Adapter, stored: Mapping[str, Tensor], name: str) -> np.ndarray:
    if name not in stored or len(stored[name].shape) != 2:
        raise DataError(f"{adapter.directory} has no matrix {name}")
    return stored[name].read().astype(np.float32)


def _uses(arrays: Mapping[str, Any], family: Family, objective: str) -> dict[str, list[_Use]]:
    """Projections of ours, layer by layer, by the name of theirs that holds them."""
    places, found = family.places(objective), {}
    for name, array in arrays.items():
        module = name.removesuffix(".w")
        place = places.get(module)
        theirs, part = (place.name, place.index) if isinstance(place, Part) else (place, 0)
        if module == name or theirs is None or LAYER not in theirs:
            continue
        form = layout(f"{module}.b", array.shape[1 + num_inputs(module) :], place or "", transposed=True)
        for i in range(array.shape[0]):
            found.setdefault(theirs.replace(LAYER, str(i)), []).append(_Use(module, theirs, i, part, form))
    return found


# Writing.


def export(
    directory: epath.Path, model: Any, family: Family, config: ModelConfig, objective: str, base: str
) -> list[str]:
    """Writes a model's adapters, with the head that was trained beside them; returns the names of the files.

    Every process of a run over several hosts takes part in fetching, one writes.

    Args:
      directory: made if it is missing.
      model: with adapters.
      family: of the model.
      config: of the model.
      objective: task.objective.
      base: the model that they were trained on: a directory, or a name on the hub.

    Raises:
      SaveError: the directory cannot be written.
    """
    arrays = flatten(model)
    written, ranks = {}, {}
    for name, several in _uses(arrays, family, objective).items():
        adapted = sorted((use for use in several if f"{use.ours}.lora.a" in arrays), key=lambda use: use.part)
        if adapted:
            a, b = _theirs(arrays, adapted)
            written |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            ranks[adapted[0].theirs] = len(a)
    heads = state_dict.sources(model, family, config, objective, "float32", "top.")
    tops = {name: source.make() for name, source in heads.items()}
    if not multihost.is_primary():
        return []
    sources = {PREFIX + name: Source(a.dtype, a.shape, lambda a=a: a) for name, a in (written | tops).items()}
    with atomic_io.whole_directory(directory, lambda name: name in (WEIGHTS, SETTINGS), SETTINGS) as part:
        safetensors_io.write_file(part / WEIGHTS, sources)
        atomic_io.write_json(part / SETTINGS, _settings(ranks, family, config, objective, base, sorted(tops)))
    return [WEIGHTS, SETTINGS]


def _theirs(arrays: Mapping[str, Any], uses: list[_Use]) -> tuple[np.ndarray, np.ndarray]:
    """One adapter for all of ours that lie in one projection of theirs: A [R, inputs] and B [outputs, R]."""
    all_a, all_b = [], []
    for use in uses:
        a, b = (state_dict.fetch(arrays[f"{use.ours}.lora.{letter}"], use.layer) for letter in "ab")
        all_a.append(a.reshape(-1, a.shape[-1]).T)
        count = use.outputs.split[use.outputs.order[0]]
        parts = [[column if i == use.part else np.zeros_like(column) for i in range(count)] for column in b]
        all_b.append(np.stack([use.outputs.theirs(part) for part in parts], axis=-1))
    return np.concatenate(all_a), np.concatenate(all_b, axis=1)


def _settings(
    ranks: Mapping[str, int],
    family: Family,
    config: ModelConfig,
    objective: str,
    base: str,
    tops: list[str],
) -> dict[str, Any]:
    """The content of adapter_config.json: exactly the projections of `ranks`, in all layers."""
    named = {re.escape(name).replace(re.escape(LAYER), r"\d+"): rank for name, rank in ranks.items()}
    other = {pattern: rank for pattern, rank in named.items() if rank != config.lora_rank}
    alpha = config.lora_alpha / config.lora_rank
    return {
        "peft_type": "LORA",
        "task_type": next((theirs for theirs, ours in TASKS.items() if ours == objective), None),
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": "|".join(named),
        "rank_pattern": other,
        "alpha_pattern": {pattern: alpha * rank for pattern, rank in other.items()},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in tops}) or None,
        "fan_in_fan_out": not family.transposed,
        "bias": "none",
        "inference_mode": True,
    }
