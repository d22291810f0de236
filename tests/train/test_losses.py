"""The chunked cross-entropy against a plain one in float64, value and gradient; and that no logits of a batch exist."""

import itertools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.mesh_axes import mesh_axes
from lslm_jax.config.validation import validate
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention
from lslm_jax.parallel.sharding import batch_sharding, make_mesh
from lslm_jax.train import losses, optimizers, train_state
from lslm_jax.train import train_step as step
from lslm_jax.train.losses import Settings, cross_entropy

B, T, D, V, ROWS = 3, 20, 8, 37, 40  # the output layer has three rows of padding


def example(seed=0):
    """Hidden states, output layer, targets, and weights of which some are 0 and some uneven; NumPy's, to save time."""
    rng = np.random.default_rng(seed)
    weights_BT = rng.choice([0.0, 1.0, 1.0, 0.25], (B, T))
    targets_BT = np.where(weights_BT > 0, rng.integers(0, V, (B, T)), 0)
    x_BTD, w_VD = rng.normal(size=(B, T, D)), rng.normal(size=(ROWS, D))
    return np.float32(x_BTD), np.float32(w_VD), np.int32(targets_BT), np.float32(weights_BT)


def plain(x_BTD, w_VD, targets_BT, weights_BT, settings, b_V=None):
    """Objective, likelihood, hits and weight, with all logits at once and no care for overflow or memory."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD[: settings.vocab_size])
    if b_V is not None:
        logits_BTV += b_V[None, None, : settings.vocab_size]
    if settings.softcap:
        logits_BTV = settings.softcap * jnp.tanh(logits_BTV / settings.softcap)
    normaliser_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
    logp_BTV = logits_BTV - normaliser_BT[..., None]
    wanted_BTV = jax.nn.one_hot(targets_BT, settings.vocab_size, dtype=logits_BTV.dtype)
    smooth_BTV = (1 - settings.label_smoothing) * wanted_BTV + settings.label_smoothing / settings.vocab_size
    objective_BT = -jnp.sum(smooth_BTV * logp_BTV, axis=-1) + settings.z_loss * normaliser_BT**2
    nll_BT = -jnp.sum(wanted_BTV * logp_BTV, axis=-1)
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return [jnp.sum(weights_BT * a) for a in (objective_BT, nll_BT, correct_BT, jnp.ones_like(nll_BT))]


def expected(arrays, settings):
    """Sums and gradients of the plain cross-entropy in float64."""
    x, w, targets, weights = (np.asarray(a) for a in arrays)

    def objective(x, w):
        sums = plain(x, w, targets, np.float64(weights), settings)
        return sums[0], sums

    with jax.enable_x64(True):
        gradients, sums = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(np.float64(x), np.float64(w))
        return jax.tree.map(np.asarray, (sums, gradients))


def value_and_gradients(arrays, settings):
    x, w, targets, weights = arrays

    def objective(x, w):
        sums = cross_entropy(x, w, targets, weights, settings)
        return sums.objective, sums

    gradients, sums = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(x, w)
    return sums, gradients


COMBINATIONS = list(itertools.product([0.0, 0.01], [0.0, 0.1], [0.0, 4.0]))


FAST = [(0.0, 0.0, 0.0, 25), (0.01, 0.0, 0.0, 1000), (0.0, 0.1, 0.0, 25), (0.0, 0.0, 4.0, 1)]
FAST += [(0.01, 0.1, 4.0, chunk) for chunk in (1, 25, 1000)]


@pytest.mark.parametrize(
    ("z_loss", "label_smoothing", "softcap", "chunk"),
    [
        pytest.param(*combination, chunk, marks=[] if (*combination, chunk) in FAST else pytest.mark.exhaustive)
        for combination in COMBINATIONS
        for chunk in (1, 25, 1000)
    ],
)
def test_sums_and_gradients_equal_those_of_the_whole_logits(z_loss, label_smoothing, softcap, chunk):
    settings = Settings(V, chunk, softcap, z_loss, label_smoothing)
    arrays = example()
    sums, gradients = value_and_gradients(arrays, settings)
    expected_sums, expected_gradients = expected(arrays, settings)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-6)
    for ours, theirs in zip(gradients, [*expected_gradients], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)
    assert np.all(np.asarray(gradients[1])[V:] == 0.0), "the padding of the vocabulary is not trained"
    assert np.all(np.asarray(gradients[0])[np.asarray(arrays[3]) == 0] == 0.0), "nor does what weighs nothing count"


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_a_bias_of_the_output_layer_counts_and_has_a_gradient(softcap):
    x_BTD, w_VD, targets_BT, weights_BT = example()
    b_V = np.float32(np.random.default_rng(1).normal(size=ROWS))
    settings = Settings(V, 12, softcap, z_loss=0.01, label_smoothing=0.1)

    def ours(x, w, b):
        sums = cross_entropy(x, w, targets_BT, weights_BT, settings, b)
        return sums.objective, sums

    def theirs(x, w, b):
        sums = plain(x, w, targets_BT, weights_BT, settings, b)
        return sums[0], sums

    gradients, sums = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(x_BTD, w_VD, b_V)
    with jax.enable_x64(True):
        exact = (np.float64(a) for a in (x_BTD, w_VD, b_V))
        expected_gradients, expected_sums = jax.jit(jax.grad(theirs, argnums=(0, 1, 2), has_aux=True))(*exact)
    np.testing.assert_allclose(sums, expected_sums, rtol=2e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    assert np.all(np.asarray(gradients[2])[V:] == 0.0)
    evaluated = jax.jit(cross_entropy, static_argnums=4)(x_BTD, w_VD, targets_BT, weights_BT, settings, b_V)
    np.testing.assert_array_equal(evaluated, sums)


def test_squared_error_is_the_sum_of_squares_of_what_counts():
    x_BTD, w_VD, _, weights_BT = example()
    w_1D, b_1 = w_VD[:1], np.float32([0.7])
    numbers_BT = np.float32(np.random.default_rng(1).normal(size=(B, T)))

    def ours(x, w, b):
        sums = losses.squared_error(x, w, numbers_BT, weights_BT, b)
        return sums.objective, sums

    gradients, sums = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(x_BTD, w_1D, b_1)
    x, w, weights, numbers = (np.float64(a) for a in (x_BTD, w_1D, weights_BT, numbers_BT))
    error_BT = x @ w[0] + 0.7 - numbers
    total = np.sum(weights * error_BT**2)
    np.testing.assert_allclose(sums, [total, total, 0.0, weights.sum()], rtol=1e-6)
    weighed_BT1 = (2 * weights * error_BT)[..., None]
    np.testing.assert_allclose(gradients[0], weighed_BT1 * w[:1], atol=1e-4)
    np.testing.assert_allclose(gradients[1], [np.sum(weighed_BT1 * x, axis=(0, 1))], rtol=1e-5)
    np.testing.assert_allclose(gradients[2], [weighed_BT1.sum()], rtol=1e-5)


def test_a_span_is_scored_over_the_tokens_of_its_row():
    x_BTD, w_VD, _, _ = example()
    w_2D, b_2 = w_VD[:2], np.float32([0.3, -0.2])
    segments_BT = np.where(np.arange(T)[None] < np.array([[T], [12], [0]]), 1, 0)
    logits_BT2 = np.asarray(jax.jit(losses._products)(x_BTD, w_2D, b_2))
    first, last = logits_BT2[0].argmax(axis=0)
    targets_B2 = np.int32([[first, last], [3, 11], [0, 0]])
    weights_B2 = np.float32([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])

    def objective(x, targets_B2):
        sums = losses.span(x, w_2D, targets_B2, weights_B2, segments_BT, b_2)
        return sums.objective, sums

    gradient_and_sums = jax.jit(jax.grad(objective, has_aux=True))
    gradient, sums = gradient_and_sums(x_BTD, targets_B2)
    nll = 0.0
    for row, (weight, length) in enumerate([(1.0, T), (0.5, 12)]):
        for end in range(2):
            logits_T = np.float64(logits_BT2[row, :length, end])
            nll += weight * (np.log(np.exp(logits_T).sum()) - logits_T[targets_B2[row, end]])
    np.testing.assert_allclose(sums, [nll, nll, 2.0, 3.0], rtol=1e-6)
    missed_B2 = targets_B2.copy()
    missed_B2[0, 1] += 1
    _, missed = gradient_and_sums(x_BTD, missed_B2 % T)
    assert missed.correct == 0.0, "half an answer is none"

    assert np.all(np.isfinite(gradient))
    assert np.all(np.any(gradient != 0.0, axis=-1) == (segments_BT > 0))


def test_the_padding_of_the_vocabulary_gets_neither_probability_nor_smoothing():
    x_BTD, w_VD, targets_BT, weights_BT = example()
    settings = Settings(V, 25, z_loss=0.01, label_smoothing=0.1)
    changed = w_VD.copy()
    changed[V:] = 1000.0
    before = value_and_gradients((x_BTD, w_VD, targets_BT, weights_BT), settings)
    after = value_and_gradients((x_BTD, changed, targets_BT, weights_BT), settings)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_tied_output_layer_gets_the_gradients_of_both_its_uses():
    _, w_VD, targets_BT, weights_BT = example()
    tokens_BT = np.flip(targets_BT, axis=1)
    settings = Settings(V, 7, label_smoothing=0.1)
    ours = jax.jit(jax.grad(lambda w: cross_entropy(w[tokens_BT], w, targets_BT, weights_BT, settings).objective))
    theirs = jax.jit(jax.grad(lambda w: plain(w[tokens_BT], w, targets_BT, weights_BT, settings)[0]))
    np.testing.assert_allclose(ours(w_VD), theirs(w_VD), rtol=1e-4, atol=1e-5)


def test_the_gradient_scales_with_the_loss():
    x_BTD, w_VD, targets_BT, weights_BT = example()
    objective = lambda x, w: cross_entropy(x, w, targets_BT, weights_BT, Settings(V, 25)).objective
    scaled = jax.jit(jax.grad(lambda x, w, factor: factor * objective(x, w), argnums=(0, 1)))
    once, thrice = (scaled(x_BTD, w_VD, np.float32(factor)) for factor in (1.0, 3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3.0 * b, rtol=1e-6), thrice, once)


def test_bfloat16_states_lose_no_more_than_their_own_rounding():
    x_BTD, w_VD, targets_BT, weights_BT = example()
    x_BTD, w_VD = x_BTD.astype(jnp.bfloat16), w_VD.astype(jnp.bfloat16).astype(np.float32)
    settings = Settings(V, 25, z_loss=1e-4, label_smoothing=0.1)
    sums, (dx, dw) = value_and_gradients((x_BTD, w_VD, targets_BT, weights_BT), settings)
    exact = x_BTD.astype(np.float32), w_VD, targets_BT, weights_BT
    expected_sums, (expected_dx, expected_dw) = expected(exact, settings)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32 and sums.objective.dtype == jnp.float32
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    np.testing.assert_allclose(np.float32(dx), expected_dx, atol=0.02)
    np.testing.assert_allclose(dw, expected_dw, atol=0.05)


def test_narrow_logits_lose_no_more_than_their_own_rounding():
    x_BTD, w_VD, *rest = example()
    arrays = x_BTD.astype(jnp.bfloat16), w_VD, *rest
    wide, (wide_dx, wide_dw) = value_and_gradients(arrays, Settings(V, 25))
    narrow, (dx, dw) = value_and_gradients(arrays, Settings(V, 25, narrow=True))
    assert narrow.objective != wide.objective and dw.dtype == jnp.float32
    np.testing.assert_allclose(narrow.objective, wide.objective, rtol=2e-3)
    np.testing.assert_allclose(np.float32(dx), np.float32(wide_dx), atol=0.05)
    np.testing.assert_allclose(dw, wide_dw, atol=0.1)
    exact = value_and_gradients((x_BTD, w_VD, *rest), Settings(V, 25, narrow=True))
    jax.tree.map(np.testing.assert_array_equal, exact, value_and_gradients((x_BTD, w_VD, *rest), Settings(V, 25)))


def test_evaluation_and_training_give_the_same_sums():
    arrays, settings = example(), Settings(V, 12, 4.0, 0.01, 0.1)
    sums, _ = value_and_gradients(arrays, settings)
    np.testing.assert_array_equal(jax.jit(cross_entropy, static_argnums=4)(*arrays, settings), sums)


def test_huge_logits_neither_overflow_nor_vanish():
    _, w_VD, targets_BT, weights_BT = example()
    x_BTD = np.float32(1e4) * w_VD[targets_BT]
    sums, gradients = value_and_gradients((x_BTD, w_VD, targets_BT, weights_BT), Settings(V, 25))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((sums, gradients)))


def test_chunks_follow_the_mesh_and_change_nothing():
    x_BTD, w_VD, targets_BT, weights_BT = (np.concatenate([a] * 4)[:8] if a.shape[0] == B else a for a in example())
    settings = Settings(V, 10, z_loss=0.01)
    alone = value_and_gradients((x_BTD, w_VD, targets_BT, weights_BT), settings)
    with jax.set_mesh(make_mesh(Config(train=TrainConfig(batch_size=8), mesh=MeshConfig(fsdp=2, tensor=2)))):
        assert losses._chunks(settings, x_BTD, targets_BT, weights_BT)[1].shape == (4, 4, 10)
        meshed = value_and_gradients((x_BTD, w_VD, targets_BT, weights_BT), settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), meshed, alone)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "mesh"])
def test_the_logits_of_a_batch_never_exist(mesh):
    B, T = 8, 256
    model = ModelConfig(num_layers=1, d_model=32, num_heads=2, vocab_size=50_257, max_length=T)
    config = Config(model=model, data=DataConfig(source="synthetic", seq_len=T), mesh=mesh)
    config = validate(replace(config, train=TrainConfig(batch_size=B, loss_chunk=16)))
    size = math.prod(mesh_axes(mesh).values())
    devices = make_mesh(config, jax.devices()[:size])
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=batch_sharding(devices, (B, T)))
    weights_BT = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=batch_sharding(devices, (B, T)))
    train_step = jax.jit(step.make_train_step(config, optimizer, attention.XLA), donate_argnums=0)
    with jax.set_mesh(devices):
        abstract = train_state.abstract_state(config, optimizer, devices)
        compiled = train_step.lower(abstract, Batch(ids_BT, ids_BT, weights_BT)).compile()
    largest = max(
        math.prod(int(n) for n in shape.split(",")) for shape in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    )
    logits = B * T * 50_304 // size  # entries on each device, had they all been there
    peak = compiled.memory_analysis().temp_size_in_bytes
    print(f"{size} devices: temporaries {peak / 2**20:.1f} MiB, logits alone would be {4 * logits / 2**20:.1f} MiB")
    assert largest < logits / 2
    assert peak < 4 * logits
