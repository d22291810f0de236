"""Products of eight-bit numbers: as near as their types allow, forward and backward, and a model learns with them."""

import functools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes, validate
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError
from lslm_jax.kernels import quantized_matmul
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model
from lslm_jax.models.layers import projections
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train import optimizers
from lslm_jax.train.train_state import init_state
from lslm_jax.train.train_step import make_train_step

pytest.importorskip("qwix")

V, T, B = 64, 32, 8
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=V, max_length=T, dtype="bfloat16"))
ONE_DEVICE, EIGHT_DEVICES = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)
STEPS, FEW_STEPS = 60, 8
kinds = pytest.mark.parametrize("kind", quantized_matmul.KINDS)
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
    shapes = (2, 5, *inputs), inputs + outputs, (2, 5, *outputs)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(product, x, w, g):
        value, gradients = jax.vjp(product, x, w)
        return value, gradients(g)

    exact, exact_gradients = value_and_gradients(lambda x, w: jnp.tensordot(x, w, len(inputs)), x, w, g)
    product = functools.partial(quantized_matmul.product, kind, len(inputs))
    value, gradients = value_and_gradients(product, x, w, g)
    near, near_gradients = NEAR[kind]
    assert 0.001 < distance(value, exact) < near
    for gradient, true in zip(gradients, exact_gradients, strict=True):
        assert gradient.shape == true.shape and distance(gradient, true) < near_gradients


@kinds
def test_what_a_row_says_depends_on_no_other_row(kind):
    model = build(kind)
    ids_BT = np.random.default_rng(0).integers(0, V, (B, T))
    features = jax.jit(lambda ids: model.features(Batch(ids, ids, None), backend=attention.XLA))
    np.testing.assert_array_equal(features(ids_BT)[:1], features(np.concatenate([ids_BT[:1], ids_BT[:0:-1] % 7]))[:1])


@kinds
def test_projections_of_blocks_are_such_and_nothing_else_changes(kind):
    plain, narrow = build("bfloat16"), build(kind)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(plain), jax.tree.leaves(narrow))
    assert {linear.narrow for _, linear in projections(narrow.blocks)} == {kind}
    assert {linear.narrow for _, linear in projections(plain.blocks)} == {""}
    ids_BT = np.zeros((B, T), np.int32)
    hidden = jax.eval_shape(lambda: narrow.features(Batch(ids_BT, ids_BT, None), backend=attention.XLA))
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.slow
@kinds
def test_a_model_learns_as_with_bfloat16(kind):
    expected = losses("bfloat16", ONE_DEVICE)
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(losses(kind, ONE_DEVICE), expected, rtol=0.02)


@pytest.mark.exhaustive
@kinds
def test_eight_devices_learn_as_one(kind):
    expected = losses(kind, ONE_DEVICE)[:FEW_STEPS]
    np.testing.assert_allclose(losses(kind, EIGHT_DEVICES, FEW_STEPS), expected, rtol=1e-3)


@pytest.mark.exhaustive
@kinds
def test_eight_devices_learn_as_with_bfloat16(kind):
    curves = [losses(dtype, EIGHT_DEVICES) for dtype in ("bfloat16", kind)]
    assert curves[0][-1] < 0.5 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)


@functools.cache
def build(dtype):
    config = replace(GPT, dtype=dtype)
    return jax.jit(lambda: build_model(config, jax.random.key(0)))()


@functools.cache
def losses(dtype, mesh, steps=STEPS):
    """Losses of the first steps of a run where seven of eight tokens determine the next one."""
    config = validate(
        Config(
            model=replace(GPT, dtype=dtype),
            data=DataConfig(source="synthetic", seq_len=T, mask_documents=False),
            train=TrainConfig(steps=STEPS, batch_size=B),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
            mesh=mesh,
        )
    )
    devices = make_mesh(config, jax.devices()[: 1 if mesh.data == 1 else 8])
    optimizer = optimizers.make_optimizer(config.optimizer, STEPS)
    step = jax.jit(make_train_step(config, optimizer, attention.XLA), donate_argnums=0)
    curve, rng = [], np.random.default_rng(0)
    with jax.set_mesh(devices):
        state = init_state(config, optimizer, devices)
        for _ in range(steps):
            ids_BT = rng.integers(0, V, (B, T))
            targets_BT = np.where(rng.random((B, T)) < 1 / 8, rng.integers(0, V, (B, T)), (5 * ids_BT + 3) % V)
            state, metrics = step(state, Batch(ids_BT, targets_BT, np.ones((B, T), np.float32)))
            curve.append(float(metrics["loss"]))
    return np.array(curve)


def test_without_qwix_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"need qwix: .* -m pip install -e '.*\[quantize\]'"):
        jax.eval_shape(lambda: build_model(replace(GPT, dtype="float8"), jax.random.key(0)))
