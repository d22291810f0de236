"""The small parts against their formulas in NumPy."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import ModelConfig
from lslm_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    Norm,
    distance_buckets,
    dropout,
    relative_bias,
    rotary_frequencies,
    rotate,
    rotation,
    sinusoids,
    softcap,
)

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)


def test_linear_maps_named_axes_to_named_axes():
    key = jax.random.key(0)
    into_heads = Linear(key, {"embed": 12}, {"heads": 3, "head_dim": 4}, bias=True)
    out_of_heads = Linear(key, {"heads": 3, "head_dim": 4}, {"embed": 12}, bias=False)
    into_heads.b.set_value(jax.random.normal(key, (3, 4)))
    heads = into_heads(X)
    expected = np.einsum("btd,dhc->bthc", X, into_heads.w.get_value()) + np.asarray(into_heads.b.get_value())
    np.testing.assert_allclose(heads, expected, atol=1e-6)
    expected = np.einsum("bthc,hcd->btd", heads, out_of_heads.w.get_value())
    np.testing.assert_allclose(out_of_heads(heads), expected, atol=1e-6)
    assert into_heads.w.get_metadata("axes") == ("embed", "heads", "head_dim")
    assert into_heads.b.get_metadata("axes") == ("heads", "head_dim")
    assert out_of_heads.w.get_metadata("axes") == ("heads", "head_dim", "embed")


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_follow_their_formulas(kind):
    norm = Norm(ModelConfig(norm=kind, norm_eps=1e-3), {"width": 12})
    norm.scale.set_value(jnp.linspace(0.5, 2.0, 12))
    x = X - X.mean(-1, keepdims=True) if kind == "layernorm" else X
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.linspace(0.5, 2.0, 12)
    if kind == "layernorm":
        norm.bias.set_value(jnp.linspace(-1.0, 1.0, 12))
        expected = expected + np.linspace(-1.0, 1.0, 12)
    else:
        assert norm.bias is None
    np.testing.assert_allclose(norm(X), expected, atol=1e-6)


@pytest.mark.parametrize("axes", [{"width": 12}, {"heads": 3, "head_dim": 4}], ids=["one axis", "two axes"])
@pytest.mark.parametrize("config", [{}, {"norm": "rmsnorm"}, {"norm": "rmsnorm", "norm_offset": True}], ids=str)
def test_the_slopes_of_norms_are_those_of_their_formulas(config, axes):
    norm, rng = Norm(ModelConfig(**config), axes), np.random.default_rng(1)
    sizes = tuple(axes.values())
    structure = jax.tree.structure(norm)
    weights = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in jax.tree.leaves(norm)]
    x, g = (rng.normal(size=(2, 5, *sizes)).astype(np.float32) for _ in range(2))

    def plain(x, weights):
        norm = structure.unflatten(weights)
        over = tuple(range(-len(sizes), 0))
        if norm.kind == "layernorm":
            x = x - x.mean(over, keepdims=True)
        y = x / jnp.sqrt(jnp.square(x).mean(over, keepdims=True) + norm.eps)
        y = y * (norm.scale.get_value() + norm.offset)[None, None]
        return y if norm.bias is None else y + norm.bias.get_value()[None, None]

    @jax.jit
    def both_gradients(x, weights, g):
        functions = lambda x, weights: structure.unflatten(weights)(x), plain
        return [jax.vjp(function, x, weights)[1](g) for function in functions]

    gradients, expected = both_gradients(x, weights, g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_keep_nothing_float32_as_large_as_what_they_read(kind):
    norm = Norm(ModelConfig(norm=kind), {"width": 12})
    kept = jax.eval_shape(lambda x: jax.vjp(norm, x)[1], jax.ShapeDtypeStruct((4, 64, 12), jnp.bfloat16))
    large = [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size >= 4 * 64 * 12]
    assert large == [jnp.bfloat16]


def test_norms_are_computed_in_float32_whatever_goes_in():
    norm = Norm(ModelConfig(), {"width": 12})
    large = jnp.asarray(X + 100.0, jnp.bfloat16)
    assert norm(large).dtype == jnp.bfloat16
    exact = norm(large.astype(jnp.float32))
    np.testing.assert_array_equal(norm(large), exact.astype(jnp.bfloat16))


def test_rotary_embedding_turns_pairs_of_features_like_complex_numbers():
    x_BTHC = X.reshape(2, 5, 2, 6)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    complex_BTHC = x_BTHC[..., :3] + 1j * x_BTHC[..., 3:]
    frequency_C = 10_000.0 ** (-np.arange(3) / 3)
    turned = complex_BTHC * np.exp(1j * positions_BT[:, :, None, None] * frequency_C)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    config = ModelConfig(positions="rotary", head_dim=6)
    to = rotation(jnp.asarray(positions_BT), rotary_frequencies(config, "full"))
    np.testing.assert_allclose(rotate(jnp.asarray(x_BTHC), to), expected, atol=1e-5)


def test_rotary_positions_turn_a_share_of_the_features_or_none():
    x_BTHC = jnp.asarray(X.reshape(2, 5, 1, 12))
    positions_BT = jnp.arange(5)[None].repeat(2, axis=0)
    config = ModelConfig(positions="rotary", head_dim=12, rope_fraction=0.5)
    whole = replace(config, head_dim=6, rope_fraction=1.0)
    in_part = rotate(x_BTHC, rotation(positions_BT, rotary_frequencies(config, "full")))
    expected = rotate(x_BTHC[..., :6], rotation(positions_BT, rotary_frequencies(whole, "full")))
    np.testing.assert_array_equal(in_part[..., :6], expected)
    np.testing.assert_array_equal(in_part[..., 6:], x_BTHC[..., 6:])
    none = rotate(x_BTHC, rotation(positions_BT, rotary_frequencies(config, "no_rope")))
    np.testing.assert_array_equal(none, x_BTHC)


def test_stretched_rotary_waves_follow_their_formulas():
    plain = ModelConfig(positions="rotary", head_dim=64, rope_theta=1e4, rope_factor=8.0, rope_original_length=100)
    frequency_C = rotary_frequencies(plain, "full")
    np.testing.assert_allclose(frequency_C, 1e4 ** (-np.arange(32) / 32), rtol=1e-6)
    linear = replace(plain, rope_scaling="linear", rope_local_theta=100.0)
    np.testing.assert_allclose(rotary_frequencies(linear, "full"), frequency_C / 8, rtol=1e-6)
    np.testing.assert_allclose(rotary_frequencies(linear, "window"), 100.0 ** (-np.arange(32) / 32), rtol=1e-6)
    stretched = rotary_frequencies(replace(plain, rope_scaling="llama3"), "full")
    waves = 100 * frequency_C / (2 * np.pi)
    np.testing.assert_array_equal(stretched[waves > 4], frequency_C[waves > 4])
    np.testing.assert_allclose(stretched[waves < 1], frequency_C[waves < 1] / 8, rtol=1e-6)
    between = (waves > 1) & (waves < 4)
    share = (waves[between] - 1) / 3
    np.testing.assert_allclose(stretched[between], frequency_C[between] * (share + (1 - share) / 8), rtol=1e-6)
    assert between.any() and (waves > 4).any() and (waves < 1).any()


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_are_sines_and_then_the_cosines_of_the_same_waves(width):
    positions_BT = np.array([[0, 1, 2, 500], [7, 8, 0, 1]])
    angle_BTC = positions_BT[:, :, None] * 10_000.0 ** (-2 * np.arange(4) / width)
    expected = np.concatenate([np.sin(angle_BTC), np.cos(angle_BTC)], axis=-1)[..., :width]
    np.testing.assert_allclose(sinusoids(jnp.asarray(positions_BT), width), expected, atol=5e-5)


def test_near_distances_have_buckets_of_their_own_and_far_ones_share():
    bucket_N = distance_buckets(16, 128)
    np.testing.assert_array_equal(bucket_N[:8], np.arange(8))
    np.testing.assert_array_equal(
        bucket_N[[8, 11, 12, 16, 22, 23, 31, 32, 127, 128]], [8, 8, 9, 10, 10, 11, 11, 12, 15, 15]
    )
    assert np.all(np.diff(bucket_N) >= 0) and bucket_N[-1] == 15


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "source_length", "start"), [(9, 9, 0), (1, 9, 6), (4, 9, 5), (3, 5, 0)])
def test_a_relative_bias_depends_on_the_distance_alone(length, source_length, start, causal):
    table_NH = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    place = {"start": jnp.int32(start), "causal": causal, "farthest": 6}
    bias_HTS = jax.jit(lambda table, start: relative_bias(table, length, source_length, **place | {"start": start}))(
        table_NH, start
    )
    bias_HTS = np.asarray(bias_HTS)
    bucket_N = distance_buckets(8 if causal else 4, 6)
    for t, s in np.ndindex(length, source_length):
        after = s - (start + t)
        bucket = bucket_N[min(abs(after), 6)] if after <= 0 else 0 if causal else 4 + bucket_N[min(after, 6)]
        np.testing.assert_array_equal(bias_HTS[:, t, s], table_NH[bucket])


def test_activations_are_what_their_names_say():
    x = np.linspace(-4, 4, 41)
    sigmoid, positive = 1 / (1 + np.exp(-x)), np.maximum(x, 0)
    expected = {
        "gelu": 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_exact": x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]),
        "relu": positive,
        "relu2": positive**2,
        "silu": x * sigmoid,
        "tanh": np.tanh(x),
    }
    assert set(ACTIVATIONS) == set(expected)
    for name, values in expected.items():
        activation = jax.jit(ACTIVATIONS[name])
        np.testing.assert_allclose(activation(x.astype(np.float32)), values, atol=2e-6, err_msg=name)


def test_dropout_keeps_the_mean_and_is_the_identity_without_key_or_rate():
    x, key = jnp.ones((400, 400)), jax.random.key(0)
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, key) is x
    dropped = dropout(x, 0.3, key)
    assert abs(float(jnp.mean(dropped == 0)) - 0.3) < 0.01
    assert abs(float(jnp.mean(dropped)) - 1.0) < 0.01


def test_softcap_bounds_what_is_large_and_leaves_what_is_small():
    x = jnp.array([-1000.0, -1.0, 0.0, 0.1, 1000.0])
    np.testing.assert_allclose(softcap(x, 30.0), 30 * np.tanh(x / 30), rtol=1e-6)
    assert softcap(x, 0.0) is x


FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMULAS)
def test_activations_and_their_slopes_are_those_of_the_formulas(name, dtype):
    x = np.concatenate([np.linspace(-12.0, 12.0, 4801), [-100.0, 100.0]]).astype(dtype)
    g = np.random.default_rng(0).normal(size=x.shape).astype(dtype)
    formula, wide, step = FORMULAS[name], x.astype(np.float64), 1e-5
    slope = (formula(wide + step) - formula(wide - step)) / (2 * step)

    @jax.jit
    def value_and_gradient(x, g):
        value, pull = jax.vjp(ACTIVATIONS[name], x)
        return value, pull(g)[0]

    value, back = value_and_gradient(x, g)
    assert value.dtype == back.dtype == dtype
    digits = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.float64(value), formula(wide), rtol=digits, atol=digits)
    np.testing.assert_allclose(np.float64(back), g.astype(np.float64) * slope, rtol=digits, atol=2 * digits)
