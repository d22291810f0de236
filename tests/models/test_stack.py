"""Scanned or unrolled, with or without recomputation: the same function and the same gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.models import model_configs, stack
from lslm_jax.models.decoder import Decoder
from lslm_jax.models.layers import Linear
from lslm_jax.parallel.sharding import make_mesh

GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=16, dropout=0.2))
LLAMA = fill_sizes(replace(model_configs.LLAMA, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, vocab_size=61))
LLAMA = replace(LLAMA, dtype="float32", max_length=16)


def loss_and_gradient(config, weights):
    """Over a packed batch, with dropout where the config has any."""
    structure = jax.tree.structure(jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    tokens_BT = rng.integers(0, 61, (2, 16))
    segments_BT = np.where(np.arange(16) < 9, 1, 2)[None].repeat(2, axis=0)
    readout_D = rng.normal(size=config.d_model).astype(np.float32)

    def loss(weights):
        model = jax.tree.unflatten(structure, weights)
        x_BTD = model(tokens_BT, None, segments_BT, key=jax.random.key(3))
        return jnp.mean(jnp.square(x_BTD @ readout_D))

    return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize(
    ("config", "variants"),
    [
        (GPT, [(True, name) for name in stack.REMAT]),
        (replace(LLAMA, num_experts=4), [(True, "dots")]),
        pytest.param(GPT, [(False, "full")], marks=pytest.mark.exhaustive),
        pytest.param(LLAMA, [(True, "none"), (True, "save_attention")], marks=pytest.mark.exhaustive),
        pytest.param(replace(LLAMA, num_experts=4), [(True, "none"), (True, "full")], marks=pytest.mark.exhaustive),
    ],
    ids=["gpt", "mixtral-dots", "gpt-loop", "llama", "mixtral-none-full"],
)
def test_scan_and_every_remat_equal_the_plain_loop(config, variants):
    rng = np.random.default_rng(0)
    abstract = jax.tree.leaves(jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    weights = [jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), jnp.float32) for leaf in abstract]
    value, gradient = loss_and_gradient(replace(config, scan_layers=False), weights)
    for scan, remat in variants:
        other, other_gradient = loss_and_gradient(replace(config, scan_layers=scan, remat=remat), weights)
        np.testing.assert_allclose(other, value, rtol=1e-6, err_msg=f"{scan=} {remat=}")
        for a, b in zip(other_gradient, gradient, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{scan=} {remat=}")


@pytest.mark.parametrize(
    ("platform", "layers", "mesh", "scans"),
    [
        ("gpu", 16, MeshConfig(data=8), False),
        ("gpu", 17, MeshConfig(data=8), True),
        ("gpu", 12, MeshConfig(fsdp=8), True),
        ("tpu", 12, MeshConfig(data=8), True),
        ("cpu", 12, MeshConfig(data=8), False),
        ("cpu", 17, MeshConfig(data=1, tensor=8), True),
    ],
)
def test_few_layers_are_unrolled_where_weights_are_whole_but_on_tpus(platform, layers, mesh, scans, monkeypatch):
    monkeypatch.setattr(stack, "platform", lambda: platform)
    with jax.set_mesh(make_mesh(Config(train=TrainConfig(batch_size=8), mesh=mesh))):
        assert stack.scans(replace(GPT, num_layers=layers)) == scans
        assert stack.scans(replace(GPT, num_layers=layers, scan_layers=not scans)) != scans


def test_the_tree_of_weights_does_not_depend_on_scan_or_remat():
    configs = GPT, replace(GPT, scan_layers=False, remat="full")
    trees = [jax.eval_shape(lambda config=config: Decoder(config, jax.random.key(0))) for config in configs]
    first, second = (jax.tree_util.tree_leaves_with_path(tree) for tree in trees)
    assert first == second


def test_stacked_layers_carry_their_axis_in_names_and_arrays():
    layers = stack.stacked(lambda key: Linear(key, {"embed": 4}, {"mlp": 6}, bias=True), 3, jax.random.key(0))
    assert layers.w.get_value().shape == (3, 4, 6) and layers.w.get_metadata("axes") == ("layers", "embed", "mlp")
    assert layers.b.get_value().shape == (3, 6) and layers.b.get_metadata("axes") == ("layers", "mlp")
    assert len({float(w[0, 0]) for w in layers.w.get_value()}) == 3


@pytest.mark.parametrize("scan", [True, False])
def test_layers_run_in_order_each_with_its_own_weights_cache_and_key(scan):
    layers = {"w": jnp.arange(1.0, 5.0)[:, None, None]}
    keys = jax.random.split(jax.random.key(0), 4)

    def apply(layer, x, cache, key):
        return 10.0 * x + layer["w"], (cache + layer["w"][0, 0], jax.random.key_data(key))

    x, (caches, used) = stack.run(layers, jnp.zeros((1, 1)), apply, caches=jnp.arange(4.0) * 100, keys=keys, scan=scan)
    assert x == 1234.0
    np.testing.assert_array_equal(caches, [1.0, 102.0, 203.0, 304.0])
    np.testing.assert_array_equal(used, jax.random.key_data(keys))
