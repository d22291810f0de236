"""Weights of a few bits: rounded as finely as they promise, on any mesh, and all else as it was."""

import functools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.errors import ConfigError
from lslm_jax.models import model_configs, weight_quantization
from lslm_jax.models.build_model import build_model
from lslm_jax.models.layers import Linear
from lslm_jax.models.weight_quantization import quantize
from lslm_jax.parallel.sharding import make_mesh, shardings_of
from lslm_jax.runtime.pytree import flatten

pytest.importorskip("qwix")

V, T = 61, 24
GPT = fill_sizes(ModelConfig(num_layers=3, d_model=32, num_heads=4, vocab_size=V, max_length=T, init="fan_in"))
LLAMA = replace(model_configs.LLAMA, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, vocab_size=V, max_length=T)
LLAMA = fill_sizes(replace(LLAMA, dtype="float32", d_ff=64, init="fan_in", lora_rank=2))
FINEST = {"int8": 127, "int4": 7}  # the largest whole number of each
kinds = pytest.mark.parametrize("kind", weight_quantization.KINDS)
models = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama with adapters"])


def fresh(config):
    weights, structure = initial(config)
    return jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in weights])  # copies: `quantize` donates them


@functools.cache
def initial(config):
    weights, structure = jax.tree.flatten(build_model(config, jax.random.key(0)))
    return [np.asarray(leaf) for leaf in weights], structure


def tokens():
    return np.random.default_rng(0).integers(0, V, (2, T))


@jax.jit
def logits(model, ids):
    return model.logits(model(ids))[..., :V]  # behind which are those of padding, -inf


@kinds
@pytest.mark.parametrize(("inputs", "outputs"), [({"embed": 160}, {"mlp": 3}), ({"heads": 4, "head": 8}, {"embed": 5})])
def test_a_weight_is_off_by_half_a_step_at_most(kind, inputs, outputs):
    """Which is that of its output, or in int4 that of its output and tile: 32 and 8 are the largest common parts."""
    linear = Linear(jax.random.key(1), inputs, outputs, bias=True)
    rounded, size = quantize(linear, kind), len(inputs)
    w = np.asarray(Linear(jax.random.key(1), inputs, outputs, bias=True).w.get_value())
    x = np.eye(w[..., 0].size, dtype=np.float32).reshape(-1, *w.shape[:size])
    found = np.asarray(rounded(x)).reshape(w.shape)
    if kind == "int8":
        most = np.abs(w).max(axis=tuple(range(size)), keepdims=True)
    else:
        tiles = np.abs(w.reshape(*w.shape[: size - 1], -1, min(w.shape[size - 1], 32), w.shape[-1]))
        most = np.broadcast_to(tiles.max(axis=size, keepdims=True), tiles.shape).reshape(w.shape)
    assert np.all(np.abs(found - w) <= 0.51 * most / FINEST[kind])
    assert np.max(np.abs(found - w)) > 0.1 * np.max(most) / FINEST[kind]


@kinds
@models
def test_only_the_weights_of_projections_are_rounded(config, kind):
    before, after = flatten(fresh(config)), flatten(quantize(fresh(config), kind))
    rounded = {name for name in before if name not in after}
    assert rounded and all(name.endswith(".w") for name in rounded)
    assert rounded == {name for name in before if name.endswith(".w")}
    for name in before.keys() - rounded:
        np.testing.assert_array_equal(before[name], after[name])
    for name in rounded:
        values = after[f"{name}.value.qvalue"]
        assert values.dtype == kind and values.shape == before[name].shape


@models
@pytest.mark.parametrize(("kind", "apart"), [("int8", 0.03), ("int4", 0.5)])
def test_a_model_says_nearly_the_same(config, kind, apart):
    expected = logits(fresh(config), tokens())
    found = logits(quantize(fresh(config), kind), tokens())
    assert found.dtype == expected.dtype
    found, expected = np.asarray(found), np.asarray(expected)
    error = np.sqrt(np.mean((found - expected) ** 2)) / np.std(expected)
    assert apart / 20 < error < apart


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("int8", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("int4", {"fsdp": 4, "tensor": 2}),
        pytest.param("int8", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.exhaustive),
        pytest.param("int4", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_eight_devices_say_what_one_says(kind, sizes):
    expected = logits(quantize(fresh(GPT), kind), tokens())
    mesh = make_mesh(Config(model=GPT, mesh=MeshConfig(**{"data": 1} | sizes), train=TrainConfig(batch_size=8)))
    with jax.set_mesh(mesh):
        model = fresh(GPT)
        model = jax.device_put(model, shardings_of(model, mesh))
        found = logits(quantize(model, kind), tokens())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_qwix_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"need qwix: .* -m pip install -e '.*\[quantize\]'"):
        quantize(jnp.zeros(()), "int8")
