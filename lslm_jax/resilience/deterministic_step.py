"""The same bits on 1, 2, 4 or 8 devices, in one process or several (`train.reproducible`), to audit a run by.

Sums of floating-point numbers depend on their order, and how a batch lies on devices decides the order; what is more,
the compiler rounds in other places when it splits a program over other devices. So here nothing is split. A batch is
eight parts, wherever it lies, and one program for a single device works each of them off. All parts' gradients then
come to all devices, where another program for a single device adds them up, from the first to the last, and moves its
copy of the weights.

On CPUs the libraries below XLA cut products and sums by the number of their threads, which follows that of cores and
devices: so it is eight, everywhere. The cost is that of small parts, and of gradients held eight times.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError
from lslm_jax.models.attention import Backend
from lslm_jax.parallel.sharding import use
from lslm_jax.train.train_state import State, divide
from lslm_jax.train.train_step import Metrics, accumulate_gradients, apply_gradients, key_of

PARTS = 8


def check(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where a run is to be reproducible on a mesh that is not for it."""
    if config.train.reproducible and (mesh.shape["data"] != mesh.size or PARTS % mesh.size):
        raise ConfigError(
            f"train.reproducible needs all devices on mesh.data, and 1, 2, 4 or 8 of them: it has {mesh.shape['data']} "
            f"of {mesh.size}"
        )


def fix_threads() -> None:
    """Makes the CPU's sums those of eight threads, on any machine; before anything asks jax for devices."""
    os.environ["PJRT_NPROC"] = str(PARTS)


def make_step(
    config: Config, optimizer: optax.GradientTransformation, backend: Backend, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics) of `step.make_train_step`; not to be jitted. The state is donated.

    Args:
      config: resolved, with all devices on the data axis.
      optimizer: of the run.
      backend: attention kernel.
      mesh: of 1, 2, 4 or 8 devices; the state lies whole on each.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    alone = {device: Mesh(np.reshape(device, (1,) * mesh.devices.ndim), mesh.axis_names) for device in devices}
    each = PARTS // mesh.size
    first = {device: number * each for number, device in enumerate(mesh.devices.flat)}
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    # Computes nothing: every device gets all parts.
    spread = jax.jit(lambda found: found, out_shardings=whole)

    @jax.jit
    def gradients(model: Any, step: jax.Array, rows: Batch, number: jax.Array) -> Any:
        key = jax.random.fold_in(key_of(config, step), number)
        return accumulate_gradients(config, backend, *divide(config, model), rows, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, found: Any) -> tuple[State, Metrics]:
        in_order = lambda leaf: functools.reduce(jnp.add, [leaf[part] for part in range(PARTS)])
        return apply_gradients(config, optimizer, state, *jax.tree.map(in_order, found))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        states, batches, found = _per_device(state), _per_device(batch), {}
        for device in devices:
            rows = len(batches[device].tokens_BT) // each
            with use(alone[device], config.mesh):
                parts = [
                    gradients(
                        states[device].model,
                        states[device].step,
                        jax.tree.map(lambda a, i=i, rows=rows: a[i * rows : (i + 1) * rows], batches[device]),
                        jax.device_put(np.int32(first[device] + i), device),
                    )
                    for i in range(each)
                ]
                found[device] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        gathered = _per_device(spread(_joined(found, split)))
        moved = {}
        for device in devices:
            with use(alone[device], config.mesh):
                moved[device] = update(states[device], gathered[device])
        return _joined(moved, whole)

    return train_step


def _per_device(tree: Any) -> dict[Any, Any]:
    """What each device of this process has of arrays."""
    leaves, form = jax.tree.flatten(tree)
    # The only shard of an array is that array, of its mesh, for which all would be compiled a second time.
    if len(leaves[0].sharding.device_set) == 1:
        leaves = [jax.device_put(leaf, *leaf.sharding.device_set) for leaf in leaves]
    shards = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
    return {device: jax.tree.unflatten(form, [leaf[device] for leaf in shards]) for device in shards[0]}


def _joined(trees: dict[Any, Any], sharding: NamedSharding) -> Any:
    """The arrays that devices have copies, or parts, of."""

    def join(*parts: jax.Array) -> jax.Array:
        shape = parts[0].shape
        if sharding.spec:
            shape = (shape[0] * sharding.mesh.size, *shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return jax.tree.map(join, *trees.values())
