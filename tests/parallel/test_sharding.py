"""Every array lies where the one table says; a mesh that cannot work is refused in one line."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lslm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.mesh_axes import MESH_AXES
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError
from lslm_jax.models import model_configs
from lslm_jax.models.decoder import Decoder
from lslm_jax.parallel.sharding import (
    RULES,
    batch_sharding,
    constrain,
    make_mesh,
    num_shards,
    platform,
    resolve,
    shardings_of,
    to_global,
    use,
)

GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=16))
LLAMA = replace(model_configs.LLAMA, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=61)
LLAMA = fill_sizes(replace(LLAMA, qk_norm="head"))
CUBE = Config(train=TrainConfig(batch_size=8), mesh=MeshConfig(data=2, fsdp=2, tensor=2))

LAYERS = {
    "blocks.attention_norm.scale": P(None, None),
    "blocks.attention.q.w": P(None, "fsdp", "tensor", None),
    "blocks.attention.k.w": P(None, "fsdp", "tensor", None),
    "blocks.attention.v.w": P(None, "fsdp", "tensor", None),
    "blocks.attention.o.w": P(None, "tensor", None, "fsdp"),
    "blocks.mlp_norm.scale": P(None, None),
    "blocks.mlp.up.w": P(None, "fsdp", "tensor"),
    "blocks.mlp.down.w": P(None, "tensor", "fsdp"),
    "embed": P("tensor", "fsdp"),
    "norm.scale": P(None),
}
BIASES = {
    "positions": P(None, "fsdp"),
    "blocks.attention_norm.bias": P(None, None),
    "blocks.attention.q.b": P(None, "tensor", None),
    "blocks.attention.k.b": P(None, "tensor", None),
    "blocks.attention.v.b": P(None, "tensor", None),
    "blocks.attention.o.b": P(None, None),
    "blocks.mlp_norm.bias": P(None, None),
    "blocks.mlp.up.b": P(None, "tensor"),
    "blocks.mlp.down.b": P(None, None),
    "norm.bias": P(None),
}
GATED = {
    "blocks.attention.q_norm.scale": P(None, None),
    "blocks.attention.k_norm.scale": P(None, None),
    "blocks.mlp.gate.w": P(None, "fsdp", "tensor"),
    "head": P("tensor", "fsdp"),
}


@pytest.mark.parametrize(
    ("config", "expected"), [(GPT, LAYERS | BIASES), (LLAMA, LAYERS | GATED)], ids=["gpt", "llama"]
)
def test_every_parameter_lands_where_the_rules_say(config, expected):
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shardings_of(model, make_mesh(CUBE)))
    assert {".".join(part.name for part in path[:-1]): sharding.spec for path, sharding in leaves} == expected


def test_a_dimension_that_its_axis_does_not_divide_stays_whole():
    mesh = make_mesh(CUBE)
    assert resolve(("batch", "heads"), (4, 6), mesh) == P(("data", "fsdp"), "tensor")
    assert resolve(("batch", "heads"), (1, 6), mesh) == P(None, "tensor")
    assert resolve(("batch", "heads"), (4, 3), mesh) == P(("data", "fsdp"), None)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) put two dimensions on one mesh axis"):
        resolve(("heads", "mlp"))


def test_an_axis_that_an_earlier_dimension_has_is_left_out_of_those_of_a_later_one():
    assert resolve(("experts", "embed", "mlp")) == P("expert", ("fsdp", "context"), "tensor")
    assert resolve(("embed", "mlp")) == P(("fsdp", "expert", "context"), "tensor")


def test_the_rules_name_no_axis_that_the_mesh_lacks():
    assert {axis for place in RULES.values() for axis in place} == set(MESH_AXES)


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        (MeshConfig(), 8, {"data": 8}),
        (MeshConfig(), 1, {}),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(data=1, fsdp=1, tensor=-1), 4, {"tensor": 4}),
        (MeshConfig(data=1, fsdp=8), 8, {"fsdp": 8}),
        (MeshConfig(fsdp=-1), 8, {"fsdp": 8}),
        (MeshConfig(tensor=2), 8, {"data": 4, "tensor": 2}),
        (MeshConfig(preset="fsdp"), 8, {"fsdp": 8}),
        (MeshConfig(preset="tp"), 4, {"tensor": 4}),
        (MeshConfig(preset="fsdp_tp"), 8, {"fsdp": 2, "tensor": 4}),
        (MeshConfig(preset="fsdp_tp", tensor=2), 8, {"fsdp": 4, "tensor": 2}),
        (MeshConfig(preset="fsdp_context", fsdp=2, context=-1), 8, {"fsdp": 2, "context": 4}),
        (MeshConfig(preset="moe", expert=2), 8, {"fsdp": 4, "expert": 2}),
        (MeshConfig(stage=2, data=2, tensor=2), 8, {"stage": 2, "data": 2, "tensor": 2}),
        (MeshConfig(dcn_data=2, fsdp=2, tensor=2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_the_axis_left_open_takes_what_is_left(mesh, devices, shape):
    assert {
        name: size for name, size in make_mesh(Config(mesh=mesh), jax.devices()[:devices]).shape.items() if size > 1
    } == shape


@pytest.mark.parametrize(
    ("mesh", "train", "message"),
    [
        (
            MeshConfig(data=4, fsdp=2, tensor=2),
            TrainConfig(),
            "mesh data=4 x fsdp=2 x tensor=2 is 16 devices, more than the 8 there are: set one axis to -1",
        ),
        (
            MeshConfig(data=3, fsdp=2),
            TrainConfig(),
            "mesh data=3 x fsdp=2 x tensor=1 is 6 devices, fewer than the 8 there are: set one axis to -1",
        ),
        (
            MeshConfig(data=-1, fsdp=3),
            TrainConfig(),
            "mesh data=-1 x fsdp=3 x tensor=1 does not divide 8 devices",
        ),
        (
            MeshConfig(),
            TrainConfig(batch_size=10),
            "train.batch_size=10 is not divisible by data*fsdp=8: use train.batch_size=8 or 16",
        ),
        (
            MeshConfig(),
            TrainConfig(batch_size=4),
            "train.batch_size=4 is not divisible by data*fsdp=8: use train.batch_size=8",
        ),
        (
            MeshConfig(data=2, fsdp=2, tensor=2),
            TrainConfig(batch_size=12, accumulate=2),
            "train.batch_size / train.accumulate=6 is not divisible by data*fsdp=4: use train.batch_size=8 or 16",
        ),
    ],
)
def test_a_mesh_that_cannot_work_is_refused_in_one_line(mesh, train, message):
    with pytest.raises(ConfigError) as error:
        make_mesh(Config(mesh=mesh, train=train))
    assert str(error.value) == message


def test_the_rows_of_a_device_must_fall_into_equal_microbatches():
    config = Config(
        model=ModelConfig(microbatches=8), train=TrainConfig(batch_size=32, accumulate=2), mesh=MeshConfig(stage=2)
    )
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    message = "model.microbatches=8 does not divide the 4 rows of a device: use train.batch_size=64"
    assert str(error.value) == message
    make_mesh(replace(config, train=TrainConfig(batch_size=64, accumulate=2)))


def test_constrain_and_num_shards_do_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, ("batch", "length")) is x
    assert num_shards("batch") == 1
    with jax.set_mesh(make_mesh(Config(mesh=MeshConfig(data=1)), jax.devices()[:1])):
        assert constrain(x, ("batch", "length")) is x


def test_constrain_pins_activations_to_the_mesh():
    mesh = make_mesh(CUBE)
    with jax.set_mesh(mesh):
        assert (num_shards("batch"), num_shards("vocab"), num_shards("length")) == (4, 2, 1)
        x = jax.jit(lambda: constrain(jnp.ones((8, 3, 6)), ("batch", "length", "mlp")))()
    assert x.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_a_batch_is_spread_over_rows_and_missing_parts_stay_missing():
    mesh = make_mesh(CUBE)
    rows = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    placed = to_global(Batch(rows, rows + 1, np.ones((8, 4), np.float32)), mesh)
    assert placed.positions_BT is None and placed.segments_BT is None
    assert placed.tokens_BT.sharding == batch_sharding(mesh, (8, 4))
    assert {shard.data.shape for shard in placed.tokens_BT.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(placed.tokens_BT, rows)
    np.testing.assert_array_equal(placed.targets_BT, rows + 1)


def test_the_platform_is_that_of_the_mesh_in_use_whatever_this_machine_has(monkeypatch):
    mesh = make_mesh(Config(mesh=MeshConfig(data=-1)))
    with use(mesh, MeshConfig()):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert platform() == "cpu"
    assert platform() == "gpu"
