"""A stack in stages is the same stack: each part of the batch meets every layer once, in order, with its own rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lslm_jax.batch import Batch
from lslm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.models import attention, pipeline, presets, stack
from lslm_jax.sharding import make_mesh, shardings_of

B, T = 8, 12
GPT = fill_sizes(ModelConfig(num_layers=4, d_model=32, num_heads=4, vocab_size=61, max_length=T))
# Windows, two kinds of rotation and a first layer without a norm: all that makes layers differ.
MIXED = replace(
    GPT,
    positions="rotary",
    norm="rmsnorm",
    bias=False,
    first_norm=False,
    window=3,
    layer_types=("window", "full", "no_rope", "window"),
    rope_local_theta=100.0,
)


@pytest.mark.parametrize(
    ("parts", "stages", "rounds", "times", "idle"),
    [
        (1, 2, 1, 2, 1 / 2),
        (4, 4, 1, 7, 3 / 7),
        (16, 4, 1, 19, 3 / 19),
        (16, 4, 4, 67, 3 / 67),
        (5, 2, 1, 6, 1 / 6),
        (5, 2, 2, 12, 1 / 6),  # the last part waits for a second that never comes
    ],
)
def test_stages_idle_while_the_pipeline_fills_and_empties(parts, stages, rounds, times, idle):
    assert pipeline.num_times(parts, stages, rounds) == times
    assert pipeline.idle(parts, stages, rounds) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("rows", "rounds", "most", "parts"),
    [(64, 1, 0, 16), (64, 1, 32, 32), (12, 1, 0, 12), (12, 1, 8, 6), (7, 1, 4, 1), (1, 1, 0, 1), (20, 2, 6, 4)],
)
def test_a_batch_is_split_into_as_many_equal_parts_as_keep_stages_busy(rows, rounds, most, parts):
    assert pipeline.num_parts(rows, 4, rounds, most) == parts


@pytest.mark.parametrize(
    ("stages", "rounds", "rows"), [(2, 1, 8), (4, 1, 3), (2, 2, 5), (4, 2, 8), (2, 4, 2), (4, 3, 4)][:]
)
def test_every_part_meets_every_layer_in_order_with_its_own_rows(stages, rounds, rows):
    """Layers are functions that do not commute, and what a row is told makes each row's another."""
    num_layers = 2 * stages * rounds
    layers = {"w": 1.0 + jnp.arange(num_layers, dtype=jnp.float32)[:, None, None] / num_layers}
    beside = jnp.arange(num_layers, dtype=jnp.float32)
    x_BTD = jnp.linspace(0.0, 1.0, rows)[:, None, None] * jnp.ones((1, T, 2))
    told_BT = jnp.arange(rows)[:, None] * jnp.ones((1, T), int)

    def reading(told_BT, shared):
        def apply(layer, x_BTD, number, key):
            x_BTD = jnp.sin(x_BTD * layer["w"][None] + number + told_BT[:, :, None]) + shared
            return x_BTD, jnp.sum(x_BTD, axis=(1, 2))

        return apply

    def staged(layers, x_BTD, shared):
        options = {"beside": beside, "keys": None, "remat": "none", "parts": 0, "rounds": rounds}
        y_BTD, said_LMB = pipeline.run(layers, x_BTD, reading, told_BT, shared, **options)
        return y_BTD, jnp.swapaxes(said_LMB, 1, 2).reshape(num_layers, rows)  # part m has every M-th row

    def plain(layers, x_BTD, shared):
        return stack.run(layers, x_BTD, reading(told_BT, shared), caches=beside)

    def both(run):
        total = lambda *inputs: sum(jnp.sum(jnp.sin(7.0 * said)) for said in run(*inputs))
        return jax.jit(run), jax.jit(jax.grad(total, argnums=(0, 1, 2)))

    inputs = layers, x_BTD, jnp.float32(0.1)
    expected = [function(*inputs) for function in both(plain)]
    with jax.set_mesh(mesh_of(stages)):
        got = [function(*inputs) for function in both(staged)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("config", [GPT, replace(GPT, remat="full"), MIXED], ids=["gpt", "remat", "mixed"])
@pytest.mark.parametrize(("stages", "rounds", "rows"), [(2, 2, B), (4, 1, 3)])
def test_a_model_in_stages_says_the_same(config, stages, rounds, rows):
    model, batch = presets.build(config, jax.random.key(0)), packed(rows)
    expected = features(model, batch)
    model = presets.build(replace(config, pipeline_rounds=rounds), jax.random.key(0))
    with jax.set_mesh(mesh := mesh_of(stages)):
        model = jax.device_put(model, shardings_of(model, mesh))
        assert model.blocks.mlp.up.w.get_value().sharding.spec == PartitionSpec("stage", None, None)
        np.testing.assert_allclose(features(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_a_function_of_key_layer_and_part():
    config = replace(GPT, dropout=0.3, microbatches=4)
    said = []
    for stages, rounds, seed in [(2, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)]:
        model = presets.build(replace(config, pipeline_rounds=rounds), jax.random.key(0))
        with jax.set_mesh(mesh_of(stages)):
            said.append(np.asarray(features(model, packed(B), jax.random.key(seed))))
    np.testing.assert_array_equal(said[0], said[1])
    for other in said[2:4]:
        np.testing.assert_allclose(said[0], other, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(said[0] - said[4])) > 0.1
    # The same row in another part, or under another layer, loses other features.
    same = packed(B)._replace(tokens_BT=jnp.ones((B, T), int))
    with jax.set_mesh(mesh_of(2)):
        first_BTD = features(presets.build(config, jax.random.key(0)), same, jax.random.key(1))
    assert len({row_TD.tobytes() for row_TD in np.asarray(first_BTD)}) == B


def features(model, batch, key=None):
    return jax.jit(lambda model, batch: model.features(batch, backend=attention.XLA, key=key))(model, batch)


def packed(rows):
    tokens_BT = jax.random.randint(jax.random.key(1), (rows, T), 0, 61)
    ends_B = 3 + jnp.arange(rows) % 5  # documents are cut differently in each row
    segments_BT = jnp.where(jnp.arange(T)[None] < ends_B[:, None], 1, 2)
    return Batch(tokens_BT, tokens_BT, None, segments_BT=segments_BT)


def mesh_of(stages):
    config = Config(train=TrainConfig(batch_size=B), mesh=MeshConfig(stage=stages, data=1))
    return make_mesh(config, jax.devices()[:stages])
