"""A device whose copy of an array has another bit than the others is found and named."""

import functools

import jax
import numpy as np
import pytest
from error_table import assert_told
from jax.sharding import NamedSharding, PartitionSpec

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.errors import DeviceFault
from lslm_jax.parallel.sharding import make_mesh, use
from lslm_jax.resilience.replica_check import Copies
from lslm_jax.runtime.pytree import flatten, unflatten
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state


@functools.cache
def state_on(mesh_config):
    """A fresh state on a mesh of all devices, the mesh, and what compares its copies, which compiles once."""
    config = validate(
        Config(
            model=ModelConfig(num_layers=1, d_model=32, num_heads=4, vocab_size=64, max_length=16),
            data=DataConfig(source="synthetic", seq_len=16),
            train=TrainConfig(batch_size=8, ema=0.9),
            mesh=mesh_config,
        )
    )
    mesh, optimizer = make_mesh(config), make_optimizer(config.optimizer, 10)
    with use(mesh, config.mesh):
        abstract = abstract_state(config, optimizer, mesh)
    # Numbers that are drawn by NumPy: to compile what draws the weights takes a second on each mesh.
    rng = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(np.asarray(rng.normal(size=leaf.shape), leaf.dtype), leaf.sharding)
    state = jax.tree.map(draw, abstract)
    return state, mesh, Copies(state, mesh)


def flipped(array, device, place, bit):
    """An array one of whose copies has one bit flipped."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def damaged(state, name, *where):
    leaves = flatten(state)
    return unflatten(state, leaves | {name: flipped(leaves[name], *where)})


@pytest.mark.parametrize("bit", [0, 17, 31])
@pytest.mark.parametrize("name", ["model.blocks.mlp.up.w", "ema.embed", "step"])
def test_a_flipped_bit_is_told_with_its_device(name, bit):
    state, _, copies = state_on(MeshConfig(data=8))
    copies.check(state)
    with pytest.raises(DeviceFault, match=rf"^step \d+: {name} on .*5 differs") as error:
        copies.check(damaged(state, name, jax.devices()[5], 0, bit))
    told = error.value.exit_code, str(error.value)
    assert_told("A device that holds another bit than its copies (`train.check_copies`)", *told)


def test_of_two_copies_both_are_named_and_parts_are_compared_with_their_own_copies():
    state, _, copies = state_on(MeshConfig(data=2, fsdp=2, tensor=2))
    copies.check(state)
    with pytest.raises(DeviceFault, match=r"blocks.mlp.up.w on .* differs .*, and so do 1 more"):
        copies.check(damaged(state, "model.blocks.mlp.up.w", jax.devices()[3], 7, 20))


def test_what_has_no_copies_is_not_compared():
    state, mesh, copies = state_on(MeshConfig(fsdp=8))
    split = "model.blocks.mlp.up.w"
    assert flatten(state)[split].sharding == NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    copies.check(damaged(state, split, jax.devices()[3], 7, 20))
    with pytest.raises(DeviceFault):
        copies.check(damaged(state, "step", jax.devices()[3], 0, 2))
