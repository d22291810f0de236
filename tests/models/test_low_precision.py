"""Products of eight-bit numbers: as near as their types allow, forward and backward, and a model learns with them."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.batch import Batch
from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lslm_jax.config_checks import fill_sizes, validate
from lslm_jax.errors import ConfigError
from lslm_jax.models import attention, low_precision, presets
from lslm_jax.models.layers import projections
from lslm_jax.sharding import make_mesh
from lslm_jax.train import optim
from lslm_jax.train.state import init_state
from lslm_jax.train.step import make_train_step

pytest.importorskip("qwix")

V, T, B = 64, 32, 8
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=V, max_length=T, dtype="bfloat16"))
kinds = pytest.mark.parametrize("kind", low_precision.KINDS)
# A number's rounding is at most 2^-4 of it with three bits of mantissa, 2^-3 with two; 1/254 of the largest in int8.
# In a product's error, the root of the mean square, rounding to either side evens out to less than that.
NEAR = {"float8": (0.05, 0.08), "int8": (0.02, 0.02)}


def distance(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@kinds
@pytest.mark.parametrize(
    ("inputs", "outputs"), [((48,), (24,)), ((48,), (4, 8)), ((4, 8), (48,))], ids=["up", "heads", "from heads"]
)
def test_a_product_and_its_gradients_are_near(kind, inputs, outputs):
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 5, *inputs), inputs + outputs, (2, 5, *outputs))
    )
    exact, gradients = jax.vjp(lambda x, w: jnp.tensordot(x, w, len(inputs)), x, w)
    said, said_gradients = jax.vjp(lambda x, w: low_precision.product(kind, len(inputs), x, w), x, w)
    near, near_gradients = NEAR[kind]
    assert 0.001 < distance(said, exact) < near
    for found, true in zip(said_gradients(g), gradients(g), strict=True):
        assert found.shape == true.shape and distance(found, true) < near_gradients


@kinds
def test_what_a_row_says_depends_on_no_other_row(kind):
    model = presets.build(replace(GPT, dtype=kind), jax.random.key(0))
    ids_BT = np.random.default_rng(0).integers(0, V, (B, T))
    features = jax.jit(lambda ids: model.features(Batch(ids, ids, None), backend=attention.XLA))
    np.testing.assert_array_equal(features(ids_BT)[:1], features(np.concatenate([ids_BT[:1], ids_BT[:0:-1] % 7]))[:1])


@kinds
def test_projections_of_blocks_are_such_and_nothing_else_changes(kind):
    plain, narrow = (presets.build(replace(GPT, dtype=dtype), jax.random.key(0)) for dtype in ("bfloat16", kind))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(plain), jax.tree.leaves(narrow))
    assert {linear.narrow for _, linear in projections(narrow.blocks)} == {kind}
    assert {linear.narrow for _, linear in projections(plain.blocks)} == {""}
    ids_BT = np.zeros((B, T), np.int32)
    assert narrow.features(Batch(ids_BT, ids_BT, None), backend=attention.XLA).dtype == jnp.bfloat16


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "2x2x2"])
def test_a_model_learns_as_with_bfloat16(kind, mesh):
    curves = [losses(dtype, mesh) for dtype in ("bfloat16", kind)]
    assert curves[0][-1] < 0.5 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)


def losses(dtype, mesh, steps=60):
    """Where a token tells the next one, but for an eighth of them."""
    config = validate(
        Config(
            model=replace(GPT, dtype=dtype),
            data=DataConfig(source="synthetic", seq_len=T, mask_documents=False),
            train=TrainConfig(steps=steps, batch_size=B),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
            mesh=mesh,
        )
    )
    devices = make_mesh(config, jax.devices()[: 1 if mesh.data == 1 else 8])
    optimizer = optim.make_optimizer(config.optimizer, steps)
    step = jax.jit(make_train_step(config, optimizer, attention.XLA), donate_argnums=0)
    found, rng = [], np.random.default_rng(0)
    with jax.set_mesh(devices):
        state = init_state(config, optimizer, devices)
        for _ in range(steps):
            ids_BT = rng.integers(0, V, (B, T))
            targets_BT = np.where(rng.random((B, T)) < 1 / 8, rng.integers(0, V, (B, T)), (5 * ids_BT + 3) % V)
            state, metrics = step(state, Batch(ids_BT, targets_BT, np.ones((B, T), np.float32)))
            found.append(float(metrics["loss"]))
    return np.array(found)


def test_without_qwix_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"need qwix: pip install 'lslm_jax\[quantize\]'"):
        presets.build(replace(GPT, dtype="float8"), jax.random.key(0))
