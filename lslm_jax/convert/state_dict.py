"""Weights between a Hugging Face directory and a model of ours, one tensor at a time.

Each tensor goes from its file straight to the devices that hold a part of it, and back: the host never holds more
than one of them, and what lies on its own devices.
"""

import fnmatch
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lslm_jax.config import ModelConfig
from lslm_jax.convert.hf_mapping import EXPERT, LAYER, Family, Layout, Part, layout
from lslm_jax.convert.safetensors_io import Source, Stored, View, same_bytes
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.runtime.pytree import flatten, unflatten

_CHUNK = 1 << 22  # values that are checked at once
_SUFFIXES = {"w": ".weight", "scale": ".weight", "b": ".bias", "bias": ".bias"}
_HEAD = ("top.", "head", "output_bias")  # how names of what a body may lack begin
_VOCAB = ("embed", "head", "output_bias")  # have a row a token, and ours rows of padding behind them


class _Use(NamedTuple):
    """Where a part of one of their tensors goes: to which parameter of ours, to which layer, and expert, of it."""

    ours: str
    at: tuple[int, ...]
    index: int
    layout: Layout


class Loaded(NamedTuple):
    """A model with weights from a directory.

    Attributes:
      model: of the abstract model's kind.
      fresh: names of parameters that the directory lacks; they are those of the model that was given.
      skipped: names of theirs that were left out knowingly: masks, copies, other heads.
    """

    model: Any
    fresh: list[str]
    skipped: list[str]


def load(
    tensors: Mapping[str, Stored],
    family: Family,
    config: ModelConfig,
    objective: str,
    abstract: Any,
    fresh: Any = None,
) -> Loaded:
    """Reads weights into a model.

    Args:
      tensors: of the directory.
      family: how they are named.
      config: of the model, as the directory's config.json says.
      objective: which head the model has.
      abstract: its shapes and shardings, or such a model.
      fresh: a model whose adapters are taken, and whose head where the directory has none, or one of another shape;
        None: a missing head is an error.

    Raises:
      DataError: weights are missing, have other shapes, or there are some that such a model has no place for.
    """
    wanted, given = flatten(abstract), {} if fresh is None else flatten(fresh)
    adapters = {name: array for name, array in given.items() if ".lora." in name}
    tensors, stand_ins, uses = _matched(tensors, family, config, objective, wanted)
    heads = [name for name in _unfit_heads(tensors, uses) if name in given]
    parts = [(name, use) for name, several in uses.items() for use in several]
    if lacking := {name for name, use in parts if name not in tensors and use.ours not in heads}:
        raise DataError(
            f"the weights lack {len(lacking)} tensors of a {family.model_type}: {_some(lacking)} "
            f"(config.json: {family.sizes(config)})"
        )
    uses = {name: kept for name, several in uses.items() if (kept := [use for use in several if use.ours not in heads])}
    skipped = [name for name in tensors if name not in uses and name not in stand_ins]
    if strangers := [name for name in skipped if not _is_known(name, family, config)]:
        raise DataError(
            f"a {family.model_type} like this has no place for {len(strangers)} tensors: {_some(strangers)} "
            f"(config.json: {family.sizes(config)})"
        )
    _check_copies(tensors, skipped, family, objective)
    arrays = _read(tensors, uses, wanted, family, config)
    return Loaded(unflatten(abstract, arrays | adapters | {name: given[name] for name in heads}), heads, skipped)


def lacking_heads(
    tensors: Mapping[str, Stored], family: Family, config: ModelConfig, objective: str, abstract: Any
) -> list[str]:
    """Names of the parameters of a head for which `load`, with the same arguments, needs fresh ones."""
    tensors, _, uses = _matched(tensors, family, config, objective, flatten(abstract))
    return _unfit_heads(tensors, uses)


def _matched(
    tensors: Mapping[str, Stored], family: Family, config: ModelConfig, objective: str, wanted: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, Stored], dict[str, list[_Use]]]:
    """All tensors by the names of today, those of them that stand in for others, and what each holds."""
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    stand_ins = {name: tensors[other] for name, other in family.stand_ins.items() if other in tensors}
    tensors = stand_ins | tensors
    return tensors, stand_ins, _uses(family, config, objective, wanted, bare=_is_bare(tensors, family))


def _unfit_heads(tensors: Mapping[str, Stored], uses: Mapping[str, list[_Use]]) -> list[str]:
    """Parameters of a head that are not there, or tell something else apart: are of another shape."""
    fits = lambda name, use: name in tensors and (use.ours in _VOCAB or _shape(tensors[name], use) == use.layout.shape)
    heads = [(name, use) for name, several in uses.items() for use in several if use.ours.startswith(_HEAD)]
    return sorted({use.ours for name, use in heads if not fits(name, use)})


def _read(
    tensors: Mapping[str, Stored],
    uses: Mapping[str, list[_Use]],
    wanted: Mapping[str, Any],
    family: Family,
    config: ModelConfig,
) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = {}
    present = {name: tensor for name, tensor in tensors.items() if name in uses}
    for name, tensor in present.items():
        for use in uses[name]:
            _check(name, tensor, use, family, config)
    for name, tensor in sorted(present.items(), key=lambda item: (str(item[1].path), item[1].begin)):
        for use in uses[name]:
            if use.ours not in arrays and use.at:
                leaf = wanted[use.ours]
                arrays[use.ours] = _blank(leaf.shape, leaf.dtype, leaf.sharding, use.ours)
        _take(_finite(name, tensor), uses[name], wanted, arrays)  # and let go of it before the next is read
    return arrays


def _finite(name: str, tensor: Stored) -> np.ndarray:
    """A whole tensor. In a row that no text uses, a bad value would otherwise first be seen when training saves."""
    array = tensor.read()
    rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    step = max(_CHUNK // max(rows.shape[1], 1), 1)
    for first in range(0, len(rows), step):
        if not np.isfinite(rows[first : first + step]).all():
            bad = first + int(np.argmin(np.isfinite(rows[first : first + step]).all(axis=1)))
            raise DataError(f"{tensor.path}: {name} holds a value that is not finite, in row {bad}")
    return array


def with_rows(
    tensors: Mapping[str, Stored], family: Family, objective: str, rows: Sequence[int], count: int
) -> dict[str, Stored]:
    """Tensors of which those of a head with `count` outputs hold these rows, in this order."""
    names = {place for name, place in family.heads.get(objective, {}).items() if name in ("top.head", "top.bias")}
    return {
        name: _Rows(tensor, rows) if name in names and tensor.shape[:1] == (count,) else tensor
        for name, tensor in tensors.items()
    }


class _Rows(View):
    """Some rows of a stored tensor."""

    def __init__(self, base: Stored, rows: Sequence[int]):
        super().__init__(base)
        self._rows = list(rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return (len(self._rows), *self._base.shape[1:])

    def read(self) -> np.ndarray:
        """The rows."""
        return self._base.read()[self._rows]


def _check_copies(tensors: Mapping[str, Stored], skipped: list[str], family: Family, objective: str) -> None:
    """Copies of tied weights may be left out only where they are copies."""
    if family.heads and objective != "masked":
        return  # the copies are of a head that is not read
    for name in skipped:
        other = next((of for pattern, of in family.copies.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if other and other in tensors and not same_bytes(tensors[name], tensors[other]):
            raise DataError(
                f"{tensors[name].path}: {name} differs from {other}, which a {family.model_type} like this reads for it"
            )


def _take(theirs: np.ndarray, uses: list[_Use], wanted: Mapping[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Puts one of their tensors into the arrays that it is a part of."""
    for use in uses:
        leaf, ours = wanted[use.ours], use.layout.ours(theirs, use.index)
        if not use.at:
            arrays[use.ours] = _place(ours, leaf.shape, leaf.dtype, leaf.sharding)
        else:
            spec = PartitionSpec(*leaf.sharding.spec[len(use.at) :])
            one = _place(ours, leaf.shape[len(use.at) :], leaf.dtype, NamedSharding(leaf.sharding.mesh, spec))
            arrays[use.ours] = _put(arrays[use.ours], one, use.at)
    jax.block_until_ready([arrays[use.ours] for use in uses])  # or what waits for its turn would pile up


def _place(ours: np.ndarray, shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    """On its devices: each is given its part alone, one after another, with zeros for rows of padding."""

    def part(index: Any) -> np.ndarray:
        cut = np.asarray(ours[index], dtype)
        rows = len(range(*index[0].indices(shape[0])))
        return np.pad(cut, [(0, rows - len(cut)), *[(0, 0)] * (cut.ndim - 1)]) if len(cut) < rows else cut

    places = sharding.addressable_devices_indices_map(shape)
    # A callback would be asked for all parts before the first of them is on its device; so would this, did it not wait.
    parts = [jax.device_put(part(index), device).block_until_ready() for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _blank(shape: tuple[int, ...], dtype: Any, sharding: Any, name: str) -> jax.Array:
    """All layers of a parameter before they are read; ones where a layer lacks a scale, as ModernBERT's first does."""
    return _constant(shape, dtype, sharding, 1.0 if name.endswith(".scale") else 0.0)()


@functools.cache
def _constant(shape: tuple[int, ...], dtype: Any, sharding: Any, value: float) -> Any:
    """The program that fills an array; compiled once for all parameters of one shape."""
    return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, one: jax.Array, at: tuple[int, ...]) -> jax.Array:
    start = (*at, *[0] * one.ndim)
    return jax.lax.dynamic_update_slice(whole, one.reshape(*[1] * len(at), *one.shape), start)


def sources(
    model: Any, family: Family, config: ModelConfig, objective: str, dtype: str, prefix: str = ""
) -> dict[str, Source]:
    """What to write: their tensors by name, each fetched from its devices when its turn comes.

    Every process of a run over several hosts must fetch them, in this order. What adapters say is in the weights; with
    a prefix, all whose names of ours begin otherwise are left out.
    """
    arrays = {name: array for name, array in flatten(model).items() if name.startswith(prefix)}
    parts = _uses(family, config, objective, arrays)
    kind = np.dtype(jnp.dtype(dtype))

    def source(name: str, uses: list[_Use]) -> Source:
        uses = sorted(uses, key=lambda use: use.index)
        shape = uses[0].layout.shape

        def make() -> np.ndarray:
            fetched = [_fetch(arrays, use, config) for use in uses]
            return uses[0].layout.theirs(fetched).astype(kind, order="C")

        return Source(kind, (1, *shape) if name in family.rows else shape, make)

    return {name: source(name, uses) for name, uses in parts.items()}


def _fetch(arrays: Mapping[str, jax.Array], use: _Use, config: ModelConfig) -> np.ndarray:
    """One layer of a parameter, or all of it, on the host: with what an adapter adds, without rows of padding."""
    found = fetch(arrays[use.ours], *use.at)[: config.vocab_size if use.ours in _VOCAB else None]
    a, b = (f"{use.ours.removesuffix('.w')}.lora.{letter}" for letter in "ab")
    if a not in arrays:
        return found
    scale = config.lora_alpha / config.lora_rank
    return found + scale * np.tensordot(fetch(arrays[a], *use.at), fetch(arrays[b], *use.at), 1)


def fetch(array: jax.Array, *at: int) -> np.ndarray:
    """An array, or one layer, or expert, of it, on the host; every process of a run over several must take part."""
    if not at and array.is_fully_addressable:  # joined on the host, without a program for each shape
        return np.asarray(array)
    sharding = array.sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return np.asarray(_gather(whole)(array, at).addressable_data(0))


@functools.cache
def _gather(whole: NamedSharding | None) -> Any:
    """Brings an array, or one layer of it, whole to every device: one program for all layers."""
    return jax.jit(lambda array, at: array[at], out_shardings=whole)


def _uses(
    family: Family, config: ModelConfig, objective: str, leaves: Mapping[str, Any], *, bare: bool = False
) -> dict[str, list[_Use]]:
    """What each of their tensors holds, by name; `bare` where the names lack the family's prefix."""
    places = family.places(objective)
    uses: dict[str, list[_Use]] = {}
    for name, leaf in leaves.items():
        if ".lora." in name:
            continue
        module, _, last = name.rpartition(".")
        place, suffix = (places[name], "") if name in places else (places.get(module), _SUFFIXES.get(last, ""))
        if place is None:
            raise ConfigError(f"{family.model_type} has no place for {name}")
        theirs, index = (place.name, place.index) if isinstance(place, Part) else (place, 0)
        axes = [key for key in (LAYER, EXPERT) if key in theirs]
        shape = leaf.shape[len(axes) :]
        if name in _VOCAB:
            shape = (config.vocab_size, *shape[1:])
        form = layout(name, shape, place, transposed=family.transposed)
        for at in np.ndindex(leaf.shape[: len(axes)]):
            if at == (0,) and not config.first_norm and module == "blocks.attention_norm":
                continue
            full = theirs + suffix
            for key, number in zip(axes, at, strict=True):
                full = full.replace(key, str(number))
            uses.setdefault(full.removeprefix(family.prefix) if bare else full, []).append(_Use(name, at, index, form))
    return uses


def _is_bare(tensors: Mapping[str, Stored], family: Family) -> bool:
    """Whether this is a body saved without a head, whose names lack the prefix."""
    return not any(name.startswith(family.prefix) for name in tensors)


def _is_known(name: str, family: Family, config: ModelConfig) -> bool:
    """Whether a tensor may be left out: it holds nothing to learn, is a copy, or belongs to another head."""
    names = (name, family.prefix + name)
    if config.tie_embeddings and name == family.modules.get("head"):
        return True
    heads = [place for head in family.heads.values() for place in head.values() if isinstance(place, str)]
    patterns = [*family.ignored, *heads, *(f"{place}.*" for place in heads)]
    return any(fnmatch.fnmatchcase(each, pattern) for each in names for pattern in patterns)


def _shape(tensor: Stored, use: _Use) -> tuple[int, ...]:
    """Of a tensor, without the axis of size 1 that some have in front of it."""
    return tensor.shape[1:] if tensor.shape == (1, *use.layout.shape) else tensor.shape


def _check(name: str, tensor: Stored, use: _Use, family: Family, config: ModelConfig) -> None:
    expected, found = use.layout.shape, _shape(tensor, use)
    if use.ours in _VOCAB and found[:1] != (config.vocab_size,):
        rows = found[0] if found else 0
        raise DataError(f"{tensor.path}: {name} has {rows} rows where config.json says vocab_size={config.vocab_size}")
    if found != expected:
        raise DataError(
            f"{tensor.path}: {name} is {list(found)} where config.json makes it {list(expected)} "
            f"({family.sizes(config)})"
        )
    if tensor.dtype.kind in "iub":
        raise DataError(f"{tensor.path}: {name} is of whole numbers ({tensor.dtype}), not weights")


def _modern(name: str) -> str:
    """The name as it is today: once BERT's norms had a gamma and a beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
