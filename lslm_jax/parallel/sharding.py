"""The device mesh, and the one table that says which logical axis lies on which mesh axes.

Models name logical axes only; parameters are born with them (`axes` in their metadata) and activations are pinned to
them by `constrain`. To shard differently, change RULES, or `mesh.rules` of one run.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config, MeshConfig
from lslm_jax.config.mesh_axes import MESH_AXES, mesh_axes, multiples, slices
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    # Parameters and activations alike.
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "experts": ("expert",),
    # Parameters only.
    "embed": ("fsdp", "expert", "context"),
    "positions": (),
    "types": (),
    "buckets": (),
    "labels": (),
    "routes": (),
    "rank": (),
    "layers": ("stage",),
    # Activations only; "width" also for norms and biases.
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "rows": ("data", "fsdp", "expert", "stage"),  # of the loss, which stages share
    "tokens": ("data", "fsdp", "expert", "stage", "context"),
    "width": (),
    # Moments only: they need not be whole where parameters are.
    "moments": ("fsdp", "expert", "context", "data"),
}

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)
_platform: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def use(mesh: Mesh, config: MeshConfig) -> Iterator[None]:
    """Sets the mesh, and the table as its config changes it, that everything below goes by in this thread."""
    token, before = _rules.set(make_rules(config)), _platform.set(mesh.devices.flat[0].platform)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)
        _platform.reset(before)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh in use, whose devices need not be there; without one, of those that are."""
    return _platform.get() or jax.default_backend()


def make_rules(mesh: MeshConfig) -> Rules:
    """The table with the changes of `mesh.rules`.

    Raises:
      ConfigError: one names an axis that is not there.
    """
    rules = dict(RULES)
    for rule in mesh.rules:
        name, equals, places = rule.partition("=")
        axes = tuple(place for place in places.split("+") if place)
        if not equals or name not in rules:
            raise ConfigError(f"mesh.rules: {rule!r} must be AXIS=MESH AXES, with AXIS one of {', '.join(rules)}")
        if unknown := set(axes) - set(MESH_AXES):
            raise ConfigError(f"mesh.rules: {rule!r} names {unknown.pop()}; mesh axes are {', '.join(MESH_AXES)}")
        rules[name] = axes
    return rules


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as the config says, every one of them used.

    Raises:
      ConfigError: the axes multiply to more or fewer than the devices, or the batch does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    sizes: dict[str, int] = dict(zip(MESH_AXES, shape, strict=True))
    split = [name for name in make_rules(config.mesh)["batch"] if name in ("data", "fsdp") or sizes[name] > 1]
    rows = math.prod(sizes[name] for name in split)
    step_rows = config.train.batch_size // config.train.accumulate
    if step_rows % rows:
        part = "train.batch_size / train.accumulate" if config.train.accumulate > 1 else "train.batch_size"
        suggestion = multiples(step_rows, rows, config.train.accumulate)
        raise ConfigError(
            f"{part}={step_rows} is not divisible by {'*'.join(split)}={rows}: use train.batch_size={suggestion}"
        )
    parts = config.model.microbatches
    if sizes["stage"] > 1 and parts and step_rows // rows % parts:
        raise ConfigError(
            f"model.microbatches={parts} does not divide the {step_rows // rows} rows of a device: "
            f"use train.batch_size={multiples(step_rows, rows * parts, config.train.accumulate)}"
        )
    slow = tuple(slices(config.mesh).values())
    fast = tuple(size // many for size, many in zip(shape, slow, strict=True))
    parts = [
        mesh_utils.create_device_mesh(fast, part, allow_split_physical_axes=True) for part in _slices(devices, slow)
    ]
    # Slices lie outermost on each axis, so that what talks most stays within one.
    laid = np.stack(parts).reshape(*slow, *fast)
    laid = laid.transpose([axis + part * len(shape) for axis in range(len(shape)) for part in range(2)]).reshape(shape)
    return Mesh(laid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices: Sequence[Any], shape: Sequence[int]) -> list[list[Any]]:
    """The devices of each slice: of a TPU slice or a GPU host as they say, else of a process; simulated, in order."""
    count = math.prod(shape)
    if count == 1:
        return [list(devices)]
    for key in ("slice_index", "process_index"):
        groups: dict[int, list[Any]] = {}
        for device in devices:
            groups.setdefault(getattr(device, key, 0), []).append(device)
        if len(groups) == count and len({len(group) for group in groups.values()}) == 1:
            return [groups[index] for index in sorted(groups)]
    if devices[0].platform == "cpu" and len({device.process_index for device in devices}) == 1:
        return np.reshape(np.array(devices, object), (count, -1)).tolist()
    named = " * ".join(f"mesh.dcn_{name}" for name, size in zip(MESH_AXES, shape, strict=True) if size > 1)
    raise ConfigError(f"{named} is {count} slices, but the devices are not that many slices, hosts or processes")


def mesh_shape(mesh: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of the axes, slices included, with the one that is -1 worked out.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes, many = mesh_axes(mesh), slices(mesh)
    shown = [name for name in MESH_AXES if name in ("data", "fsdp", "tensor") or sizes[name] != 1 or many[name] != 1]
    named = " x ".join(f"{name}={sizes[name]}" + f"*{many[name]}" * (many[name] > 1) for name in shown)
    known = math.prod(size for size in sizes.values() if size != -1) * math.prod(many.values())
    if -1 in sizes.values() and num_devices % known:
        raise ConfigError(f"mesh {named} does not divide {num_devices} devices")
    sizes = {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
    shape = tuple(sizes[name] * many[name] for name in MESH_AXES)
    if (product := math.prod(shape)) != num_devices:
        relation = "more" if product > num_devices else "fewer"
        raise ConfigError(
            f"mesh {named} is {product} devices, {relation} than the {num_devices} there are: set one axis to -1"
        )
    return shape


def resolve(
    axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Any = None, rules: Rules | None = None
) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Args:
      axes: one logical name, or None, for each dimension. Where several mesh axes are a dimension's, those that an
        earlier dimension has are left out.
      shape: if given (with `mesh`), a dimension is split over as many of its mesh axes as divide it, from the first
        on; a single prompt, say, is copied to every device.
      mesh: concrete or abstract mesh.
      rules: another table than the one in use.

    Raises:
      ValueError: two dimensions want the same mesh axis.
    """
    rules = rules or _rules.get()
    wanted = [rules[name] if name is not None else () for name in axes]
    places: list[tuple[str, ...]] = []
    for place in wanted:
        used = {axis for before in places for axis in before}
        free = tuple(axis for axis in place if axis not in used)
        if place and not free:
            raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis: {wanted}")
        places.append(free)
    if shape is not None:
        places = [_dividing(place, size, mesh) for place, size in zip(places, shape, strict=True)]
    return PartitionSpec(*(place[0] if len(place) == 1 else place or None for place in places))


def _dividing(place: tuple[str, ...], size: int, mesh: Any) -> tuple[str, ...]:
    """The mesh axes, from the first on, that there are and that divide a dimension."""
    kept: list[str] = []
    for axis in place:
        if mesh.shape[axis] > 1:
            if size % (_size(kept, mesh) * mesh.shape[axis]):
                break
            kept.append(axis)
    return tuple(kept)


def _size(place: Sequence[str], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in place)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation to its place on the mesh in use; without one, returns it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, resolve(axes, x.shape, mesh))


def num_shards(axis: str, size: int | None = None, mesh: Any = None) -> int:
    """Into how many parts a mesh, by default the one in use, splits a logical axis, or one of that size; else 1."""
    mesh = mesh or jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    place = _rules.get()[axis]
    return _size(place if size is None else _dividing(place, size, mesh), mesh)


def axes_of(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in use that split a dimension of this logical axis and size; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else _dividing(_rules.get()[axis], size, mesh)


def beside_weights(function: Callable[..., jax.Array], rows: Sequence[jax.Array], weights: Any) -> jax.Array:
    """What `function(weights, *rows)` says of the parts that weights are in, each on the devices that hold it, summed.

    Rows come to the weights: those of devices that hold different parts are gathered, and what is said of them is
    added up and scattered back. To send each row only where it is needed (all-to-all) moves less if a row goes to few
    parts of many; but with static shapes there must be room for all rows at each of them lest some be lost, which then
    is moved as well, and exchanges without that (ragged_all_to_all) do not run on CPUs.

    Args:
      function: [B, T, ...] each to [B, T, D]; linear in the parts: with all weights it says the sum.
      rows: split as "batch" and "length" are.
      weights: nnx.Variables with their axes, of which "embed" is gathered before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(weights, *rows)

    def place(leaf: nnx.Variable) -> PartitionSpec:
        x = leaf.get_value()
        axes = leaf.get_metadata("axes")[-x.ndim :]  # one layer has no more "layers"
        return resolve([None if name == "embed" else name for name in axes], x.shape, mesh)

    specs = jax.tree.map(place, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    row_specs = [resolve(("batch", "length", *[None] * (x.ndim - 2)), x.shape, mesh) for x in rows]
    parted = _names(axis for spec in jax.tree.leaves(specs) for axis in spec)
    shared = [(dim, name) for dim in (0, 1) for name in _names([row_specs[0][dim]]) if name in parted]

    def shard(weights: Any, *rows: jax.Array) -> jax.Array:
        for dim, name in reversed(shared):
            rows = tuple(jax.lax.all_gather(x, name, axis=dim, tiled=True) for x in rows)
        out = function(weights, *rows)
        for dim, name in shared:
            out = jax.lax.psum_scatter(out, name, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(out, [name for name in parted if name not in {name for _, name in shared}])

    return jax.shard_map(shard, in_specs=(specs, *row_specs), out_specs=row_specs[0], check_vma=False)(weights, *rows)


def _names(places: Iterable[str | tuple[str, ...] | None]) -> list[str]:
    """Mesh axes that are named in parts of a PartitionSpec, each once."""
    return list(
        dict.fromkeys(name for place in places for name in ((place,) if isinstance(place, str) else place or ()))
    )


def shardings_of(tree: Any, mesh: Mesh, *, moments: bool = False) -> Any:
    """The sharding of every array in a tree of shapes, from the `axes` its parameters carry.

    Optimizer `moments` are trees of the same parameters and lie where their parameters lie, but are split over the data
    axis as well. What has no axes, or another rank than its parameter (step counts, factored moments), is copied.
    """
    rules = _rules.get()
    rules = {**rules, "embed": rules["moments"]} if moments else rules

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata("axes")

        def of(x: Any) -> NamedSharding:
            spec = resolve(axes, x.shape, mesh, rules) if len(axes) == x.ndim else PartitionSpec()
            return NamedSharding(mesh, spec)

        return jax.tree.map(of, leaf)

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Where a part [B, ...] of a batch lies: rows over the data axes, positions over context if it divides them."""
    return NamedSharding(mesh, resolve(("batch", "length"), shape, mesh))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a global batch that this process's devices hold, in order."""
    places = batch_sharding(mesh, (batch_size, 1)).addressable_devices_indices_map((batch_size, 1))
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in places.values() if index]))


def to_global(batch: Batch, mesh: Mesh, batch_size: int | None = None) -> Batch:
    """Places this process's rows of a batch on its devices; together the processes hold the global batch.

    Args:
      batch: the rows that `local_rows` names, or all.
      mesh: where they go.
      batch_size: rows of the global batch. None: all of them are here, as they are in every process.
    """

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape = (batch_size or len(x), *x.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), x, shape)

    return jax.tree.map(place, batch)
