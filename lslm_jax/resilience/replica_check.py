"""Silent corruption: devices that hold the same array must hold the same bits.

A chip that computes wrongly now and then raises no error, and what it got wrong spreads with the next sum of gradients.
Where an array lies on several devices, as weights do over `data`, each has computed its own copy: a flipped bit in one
shows as a difference. What lies on one device alone, as with `fsdp` over all, has nothing to be compared with.
"""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.errors import DeviceFault
from lslm_jax.runtime.pytree import flatten

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Copies:
    """Compares the copies of a state's arrays, each with the others."""

    def __init__(self, state: Any, mesh: Mesh):
        """Compiles the comparison for such a state, of which there may be parts that have no copies."""
        self._devices = mesh.devices.ravel()
        leaves = flatten(state)
        self._groups = {name: groups for name, leaf in leaves.items() if (groups := self._group(leaf))}
        specs = tuple(leaves[name].sharding.spec for name in self._groups)
        all_devices = PartitionSpec(mesh.axis_names)
        hashes = jax.shard_map(_hashes, mesh=mesh, in_specs=specs, out_specs=all_devices, check_vma=False)
        self._hashes = jax.jit(hashes, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def check(self, state: Any) -> None:
        """Waits for the state; raises DeviceFault where a device has other bits than those it shares an array with."""
        if not self._groups:
            return
        leaves = flatten(state)
        found = np.asarray(self._hashes(*(leaves[name] for name in self._groups)))
        wrong = [
            f"{name} on {self._devices[device]}"
            for column, (name, groups) in enumerate(self._groups.items())
            for group in groups
            for device in _odd_ones(group, found[:, column])
        ]
        if wrong:
            raise DeviceFault(
                f"step {int(state.step)}: {wrong[0]} differs from its copies, bit by bit"
                + f", and so do {len(wrong) - 1} more" * (len(wrong) > 1)
                + ": leave that device out; a restart goes on from the last checkpoint"
            )

    def _group(self, leaf: jax.Array) -> list[list[int]]:
        """Numbers of the devices that hold the same part of an array, of each part that several hold."""
        places = leaf.sharding.devices_indices_map(leaf.shape)
        groups: dict[Any, list[int]] = {}
        for number, device in enumerate(self._devices):
            groups.setdefault(str(places[device]), []).append(number)
        return [group for group in groups.values() if len(group) > 1]


def _odd_ones(group: list[int], hashes: np.ndarray) -> list[int]:
    """Devices that most of their group disagree with; all of it where no majority tells."""
    counts = Counter(hashes[device] for device in group).most_common()
    if len(counts) == 1:
        return []
    usual, times = counts[0]
    return [device for device in group if hashes[device] != usual or times * 2 <= len(group)]


def _hashes(*shards: jax.Array) -> jax.Array:
    """[1, arrays] uint32, of this device's parts: no single bit can change without changing its array's."""
    return jnp.stack([_hash(shard) for shard in shards])[None]


def _hash(x: jax.Array) -> jax.Array:
    # Odd factors, as 2^k times an odd number is never 0 modulo 2^32.
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32).ravel()
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
