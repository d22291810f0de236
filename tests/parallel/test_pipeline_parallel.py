"""A stack in stages is the same stack: each part of the batch meets every layer once, in order, with its own rows."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lslm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention, stack
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel import pipeline_parallel
from lslm_jax.parallel.sharding import make_mesh, shardings_of

B, T = 8, 12
exhaustive = pytest.mark.exhaustive
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
    assert pipeline_parallel.num_times(parts, stages, rounds) == times
    assert pipeline_parallel.idle(parts, stages, rounds) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("rows", "rounds", "most", "parts"),
    [(64, 1, 0, 16), (64, 1, 32, 32), (12, 1, 0, 12), (12, 1, 8, 6), (7, 1, 4, 1), (1, 1, 0, 1), (20, 2, 6, 4)],
)
def test_a_batch_is_split_into_as_many_equal_parts_as_keep_stages_busy(rows, rounds, most, parts):
    assert pipeline_parallel.num_parts(rows, 4, rounds, most) == parts


@pytest.mark.parametrize(
    ("stages", "rounds", "rows"),
    [
        (4, 1, 3),
        (2, 2, 5),
        (4, 3, 4),
        *(pytest.param(*sizes, marks=exhaustive) for sizes in [(2, 1, 8), (4, 2, 8), (2, 4, 2)]),
    ],
)
def test_every_part_meets_every_layer_in_order_with_its_own_rows(stages, rounds, rows):
    """Layers are functions that do not commute, and what a row is told makes each row's another."""
    num_layers = 2 * stages * rounds
    layers = {"w": 1.0 + np.arange(num_layers, dtype=np.float32)[:, None, None] / num_layers}
    beside = jnp.arange(num_layers, dtype=jnp.float32)
    x_BTD = np.linspace(0.0, 1.0, rows, dtype=np.float32)[:, None, None] * np.ones((1, T, 2), np.float32)
    told_BT = np.arange(rows)[:, None] * np.ones((1, T), int)

    def reading(told_BT, shared):
        def apply(layer, x_BTD, number, key):
            x_BTD = x_BTD + 0.2 * jnp.sin(x_BTD * layer["w"][None] + number + told_BT[:, :, None]) + shared
            return x_BTD, jnp.mean(x_BTD, axis=(1, 2))

        return apply

    def staged(layers, x_BTD, shared):
        options = {"beside": beside, "keys": None, "remat": "none", "parts": 0, "rounds": rounds}
        y_BTD, said_LMB = pipeline_parallel.run(layers, x_BTD, reading, told_BT, shared, **options)
        return y_BTD, jnp.swapaxes(said_LMB, 1, 2).reshape(num_layers, rows)  # part m has every M-th row

    def plain(layers, x_BTD, shared):
        return stack.run(layers, x_BTD, reading(told_BT, shared), caches=beside)

    def outputs_and_gradients(run):
        def total(*inputs):
            outputs = run(*inputs)
            return sum(jnp.mean(jnp.sin(output)) for output in outputs), outputs

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))

    inputs = layers, x_BTD, np.float32(0.1)
    expected = outputs_and_gradients(plain)(*inputs)
    with jax.set_mesh(mesh_of(stages)):
        found = outputs_and_gradients(staged)(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


REMAT = replace(GPT, remat="full")


@pytest.mark.parametrize(
    ("stages", "rounds", "rows", "config"),
    [
        (2, 2, B, REMAT),
        (4, 1, 3, MIXED),
        pytest.param(2, 2, B, GPT, marks=exhaustive),
        pytest.param(2, 2, B, MIXED, marks=exhaustive),
        pytest.param(4, 1, 3, GPT, marks=exhaustive),
        pytest.param(4, 1, 3, REMAT, marks=exhaustive),
    ],
    ids=["2-2-8-remat", "4-1-3-mixed", "2-2-8-gpt", "2-2-8-mixed", "4-1-3-gpt", "4-1-3-remat"],
)
def test_a_model_in_stages_says_the_same(stages, rounds, rows, config):
    batch = packed(rows)
    expected = features(build(config), batch)
    model = build(replace(config, pipeline_rounds=rounds))
    with jax.set_mesh(mesh := mesh_of(stages)):
        model = jax.device_put(model, shardings_of(model, mesh))
        assert model.blocks.mlp.up.w.get_value().sharding.spec == PartitionSpec("stage", None, None)
        np.testing.assert_allclose(features(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_a_function_of_key_layer_and_part():
    config = replace(GPT, dropout=0.3, microbatches=4)
    hidden = []
    for stages, rounds, seed in [(2, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)]:
        model = build(replace(config, pipeline_rounds=rounds))
        with jax.set_mesh(mesh_of(stages)):
            hidden.append(np.asarray(features(model, packed(B), jax.random.key(seed))))
    np.testing.assert_array_equal(hidden[0], hidden[1])
    for other in hidden[2:4]:
        np.testing.assert_allclose(hidden[0], other, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(hidden[0] - hidden[4])) > 0.1
    # The same row in another part, or under another layer, loses other features.
    same = packed(B)._replace(tokens_BT=np.ones((B, T), np.int32))
    with jax.set_mesh(mesh_of(2)):
        first_BTD = features(build(config), same, jax.random.key(1))
    assert len({row_TD.tobytes() for row_TD in np.asarray(first_BTD)}) == B


def build(config):
    """A model with the initial weights of a plain stack; how it is staged changes none of them."""
    abstract = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    weights = initial_weights(replace(config, dropout=0.0, microbatches=0, pipeline_rounds=1, remat="none"))
    return jax.tree.unflatten(jax.tree.structure(abstract), weights)


@functools.cache
def initial_weights(config):
    return jax.tree.leaves(build_model(config, jax.random.key(0)))


@jax.jit
def features(model, batch, key=None):
    return model.features(batch, backend=attention.XLA, key=key)


def packed(rows):
    tokens_BT = np.random.default_rng(1).integers(0, 61, (rows, T)).astype(np.int32)
    ends_B = 3 + np.arange(rows) % 5  # documents are cut differently in each row
    segments_BT = np.where(np.arange(T)[None] < ends_B[:, None], 1, 2)
    return Batch(tokens_BT, tokens_BT, None, segments_BT=segments_BT)


def mesh_of(stages):
    config = Config(train=TrainConfig(batch_size=B), mesh=MeshConfig(stage=stages, data=1))
    return make_mesh(config, jax.devices()[:stages])
