"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Models name logical axes only; parameters are born with them (`axes` in their metadata) and activations are pinned to
them by `constrain`. To shard differently, change RULES.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lslm_jax.batch import Batch
from lslm_jax.config import Config, MeshConfig
from lslm_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters and activations alike.
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    # Parameters only.
    "embed": "fsdp",
    "positions": None,
    "types": None,
    "buckets": None,
    "labels": None,
    "rank": None,
    "layers": None,
    # Activations only; "width" also for norms and biases.
    "batch": ("data", "fsdp"),
    "length": None,
    "width": None,
}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as the config says, every one of them used.

    Raises:
      ConfigError: the axes multiply to more or fewer than the devices, or the batch does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    rows = shape[0] * shape[1]
    step_rows = config.train.batch_size // config.train.accumulate
    if step_rows % rows:
        part = "train.batch_size / train.accumulate" if config.train.accumulate > 1 else "train.batch_size"
        suggestion = " or ".join(str(n * config.train.accumulate) for n in _multiples_around(step_rows, rows))
        raise ConfigError(f"{part}={step_rows} is not divisible by data*fsdp={rows}: use train.batch_size={suggestion}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(mesh: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the axes, with the one that is -1 worked out.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    named = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known:
        raise ConfigError(f"mesh {named} does not divide {num_devices} devices")
    data, fsdp, tensor = (num_devices // known if size == -1 else size for size in sizes)
    product = data * fsdp * tensor
    if product != num_devices:
        relation = "more" if product > num_devices else "fewer"
        raise ConfigError(
            f"mesh {named} is {product} devices, {relation} than the {num_devices} there are: set one axis to -1"
        )
    return data, fsdp, tensor


def _multiples_around(size: int, divisor: int) -> list[int]:
    below = size // divisor * divisor
    return [n for n in (below, below + divisor) if n]


def resolve(axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Any = None) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Args:
      axes: one logical name, or None, for each dimension.
      shape: if given (with `mesh`), a dimension that its mesh axes do not divide stays whole; a single prompt, say, is
        copied to every device.
      mesh: concrete or abstract mesh.

    Raises:
      ValueError: two dimensions want the same mesh axis.
    """
    places = [RULES[name] if name is not None else None for name in axes]
    if shape is not None:
        places = [p if p is None or n % _size(p, mesh) == 0 else None for p, n in zip(places, shape, strict=True)]
    used = [axis for place in places if place for axis in ((place,) if isinstance(place, str) else place)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis: {places}")
    return PartitionSpec(*places)


def _size(place: str | tuple[str, ...], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in ((place,) if isinstance(place, str) else place))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation to its place on the mesh set by `jax.set_mesh`; without one, returns it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, resolve(axes, x.shape, mesh))


def num_shards(axis: str) -> int:
    """Into how many parts the mesh set by `jax.set_mesh` splits a logical axis; 1 without one."""
    mesh, place = jax.sharding.get_abstract_mesh(), RULES[axis]
    return 1 if mesh.empty or place is None else _size(place, mesh)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array in a tree of shapes, from the `axes` its parameters carry.

    Optimizer moments are trees of the same parameters and so lie where their parameters lie. What has no axes, or
    another rank than its parameter (step counts, factored moments), is copied.
    """

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = leaf.get_metadata("axes")
        return jax.tree.map(
            lambda x: NamedSharding(mesh, resolve(axes, x.shape, mesh) if len(axes) == x.ndim else PartitionSpec()),
            leaf,
        )

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axes, positions whole."""
    return NamedSharding(mesh, resolve(("batch", "length")))


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """Places this process's rows of a batch on its devices; together the processes hold the global batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
