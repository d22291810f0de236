"""What must hold for every decoder, proved on tiny ones with all weights random, norms and biases too."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.models import block, model_configs
from lslm_jax.models.decoder import Decoder
from lslm_jax.models.embedding import padded_vocab
from lslm_jax.models.layers import INIT_STD

T = 12
TOKENS_BT = np.arange(T)[None]
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=32))
LLAMA = fill_sizes(
    replace(
        model_configs.LLAMA,
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        d_ff=48,
        vocab_size=61,
        max_length=32,
    )
)
LLAMA = replace(LLAMA, dtype="float32")
families = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


@pytest.mark.parametrize(
    ("config", "window", "num_layers"),
    [(GPT, 0, 2), pytest.param(LLAMA, 0, 2, marks=pytest.mark.exhaustive), (GPT, 3, 1), (LLAMA, 3, 2)],
    ids=["gpt", "llama", "window", "window over two layers"],
)
def test_a_token_depends_on_exactly_the_tokens_it_may_see(config, window, num_layers):
    model = random_model(replace(config, window=window, num_layers=num_layers))
    tokens_BT = np.arange(T)[None] + 7  # all different, so that each row of the embedding is one position
    readout_D = np.random.default_rng(3).normal(size=config.d_model).astype(np.float32)

    def project(embed_VD):
        other = jax.tree.map(lambda leaf: leaf, model)
        other.embed.set_value(embed_VD)
        return other(tokens_BT)[0] @ readout_D

    jacobian_TVD = np.asarray(jax.jit(jax.jacrev(project))(model.embed.get_value()))
    size_TS = np.max(np.abs(jacobian_TVD[:, tokens_BT[0]]), axis=-1)
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    reach = num_layers * (window - 1) if window else T
    seen_TS = (distance_TS >= 0) & (distance_TS <= reach)
    assert np.all(size_TS[~seen_TS] == 0.0)
    assert np.all(size_TS[seen_TS] > 1e-4)


@pytest.mark.parametrize(("config", "window"), [(GPT, 0), (LLAMA, 3)], ids=["gpt", "llama with a window"])
def test_packed_documents_equal_documents_alone(config, window):
    model = random_model(replace(config, window=window))
    tokens_BT, positions_BT, segments_BT = packed_row([5, 5])
    readout_TV = np.random.default_rng(3).normal(size=(T, padded_vocab(config))).astype(np.float32)

    def score(model, tokens_BT, readout_TV, *rest):
        logits_BTV = finite(model.logits(model(tokens_BT, *rest)))
        return jnp.sum(logits_BTV[0] * readout_TV), logits_BTV

    gradient = jax.jit(jax.grad(score, has_aux=True))
    weighed_TV = readout_TV * (np.arange(T) < 10)[:, None]  # padding does not count
    packed, logits_BTV = gradient(model, tokens_BT, weighed_TV, positions_BT, segments_BT)
    logits_BTV = np.asarray(logits_BTV)
    alone = []
    for document in (slice(0, 5), slice(5, 10)):
        gradients, own_BTV = gradient(model, tokens_BT[:, document], readout_TV[document])
        np.testing.assert_allclose(logits_BTV[:, document], own_BTV, atol=1e-5)
        alone.append(gradients)
    total = jax.tree.map(np.add, *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), packed, total)


@families
def test_a_token_changed_in_one_document_leaves_the_others_bit_for_bit(config):
    model = random_model(config)
    tokens_BT, positions_BT, segments_BT = packed_row([5, 1, 4])
    score = jax.jit(lambda tokens_BT: model.logits(model(tokens_BT, positions_BT, segments_BT)))
    changed_BT = tokens_BT + (np.arange(T) == 2)[None]
    before, after = np.asarray(score(tokens_BT)), np.asarray(score(changed_BT))
    assert np.any(before[0, 2:5] != after[0, 2:5])
    np.testing.assert_array_equal(before[0, :2], after[0, :2])
    np.testing.assert_array_equal(before[0, 5:], after[0, 5:])


@families
def test_learned_positions_are_places_and_rotary_ones_distances(config):
    model = random_model(config)
    tokens_BT = TOKENS_BT
    here, there, scattered = (
        np.asarray(read(model, tokens_BT, positions_BT)) for positions_BT in (tokens_BT, tokens_BT + 9, tokens_BT * 2)
    )
    np.testing.assert_array_equal(here, read(model, tokens_BT))
    moved = np.max(np.abs(here - there))
    assert moved < 1e-4 if config.positions == "rotary" else moved > 0.1
    assert np.max(np.abs(here - scattered)) > 0.1


def test_a_learned_table_is_read_at_the_positions_given():
    model = random_model(GPT)
    positions_BT = TOKENS_BT[:, ::-1]
    flipped = random_model(GPT)
    flipped.positions.set_value(jnp.asarray(np.asarray(model.positions.get_value())[:T][::-1]))
    np.testing.assert_array_equal(read(model, TOKENS_BT, positions_BT), read(flipped, TOKENS_BT))


def test_grouped_key_heads_equal_repeated_ones():
    grouped = random_model(LLAMA)

    def repeat(path, leaf):
        return jnp.asarray(np.repeat(leaf, 2, axis=2)) if {"k", "v"} & {part.name for part in path} else leaf

    leaves = jax.tree.leaves(jax.tree_util.tree_map_with_path(repeat, grouped))
    whole = jax.tree.unflatten(jax.tree.structure(random_model(replace(LLAMA, num_kv_heads=4))), leaves)
    np.testing.assert_allclose(read(grouped, TOKENS_BT), read(whole, TOKENS_BT), atol=1e-5)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    for qk_norm in ("head", "all", "none"):
        model = random_model(replace(LLAMA, qk_norm=qk_norm, norm_eps=1e-12))
        before = np.asarray(read(model, TOKENS_BT))
        model.blocks.attention.q.w.set_value(7.0 * model.blocks.attention.q.w.get_value())
        model.blocks.attention.k.w.set_value(0.3 * model.blocks.attention.k.w.get_value())
        change = np.max(np.abs(np.asarray(read(model, TOKENS_BT)) - before))
        assert change < 1e-4 if qk_norm != "none" else change > 0.1


@families
def test_logits_are_float32_capped_and_never_a_padding_token(config):
    config = replace(config, dtype="bfloat16", logit_softcap=3.0)
    model = random_model(config)
    x_BTD = read(model, TOKENS_BT)
    assert x_BTD.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    logits_BTV = jax.jit(lambda model, x_BTD: model.logits(x_BTD))(model, x_BTD)
    assert logits_BTV.dtype == jnp.float32 and logits_BTV.shape == (1, T, 128)
    logits_BTV = np.asarray(logits_BTV)
    assert np.all(logits_BTV[..., 61:] == -np.inf)
    w_VD = np.asarray(model.output()[0]).astype(jnp.bfloat16).astype(np.float32)
    raw = np.asarray(x_BTD, np.float32) @ w_VD.T
    np.testing.assert_allclose(logits_BTV[..., :61], (3.0 * np.tanh(raw / 3.0))[..., :61], atol=1e-5)


def test_a_tied_output_layer_is_the_embedding():
    assert random_model(GPT).head is None and random_model(LLAMA).head is not None
    tied = random_model(replace(LLAMA, tie_embeddings=True))
    assert tied.output()[0] is tied.embed.get_value()


@families
def test_dropout_needs_a_key_and_follows_it(config):
    plain, dropping = random_model(config), random_model(replace(config, dropout=0.5))
    key, other_key = jax.random.key(4), jax.random.key(5)
    without = np.asarray(read(dropping, TOKENS_BT))
    dropped, again, other = (np.asarray(read(dropping, TOKENS_BT, key=k)) for k in (key, key, other_key))
    np.testing.assert_array_equal(without, read(plain, TOKENS_BT))
    np.testing.assert_array_equal(read(plain, TOKENS_BT, key=key), without)
    np.testing.assert_array_equal(dropped, again)
    assert np.any(dropped != without)
    assert np.any(dropped != other)


def test_each_layer_drops_others(monkeypatch):
    keys = []

    def recording(x, rate, key):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return x

    monkeypatch.setattr(block, "dropout", recording)
    model = random_model(replace(GPT, dropout=0.5, num_layers=3))
    jax.jit(model)(TOKENS_BT, key=jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 6


@pytest.mark.parametrize("scaled", [True, False])
def test_projections_into_the_residual_stream_start_smaller(scaled):
    config = replace(GPT, num_layers=8, d_model=128, d_ff=256, vocab_size=512, init="residual" if scaled else "normal")
    model = Decoder(fill_sizes(replace(config, head_dim=0)), jax.random.key(0))
    small = INIT_STD / np.sqrt(16) if scaled else INIT_STD
    attention, mlp = model.blocks.attention, model.blocks.mlp
    expected = [(attention.o.w, small), (mlp.down.w, small)]
    expected += [(p, INIT_STD) for p in (model.embed, model.positions, attention.q.w, attention.v.w, mlp.up.w)]
    for param, std in expected:
        values = np.asarray(param.get_value())
        assert abs(np.std(values) / std - 1) < 0.03
        assert abs(np.mean(values)) < 0.03 * std
    assert not np.any(attention.q.b.get_value()) and np.all(np.asarray(model.blocks.mlp_norm.scale.get_value()) == 1.0)
    layers = np.asarray(attention.q.w.get_value())
    assert np.any(layers[0] != layers[1])


def random_model(config):
    """A model none of whose weights is special: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-2].name == "scale", 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config))


@functools.cache
def abstract_model(config):
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


@jax.jit
def read(model, tokens_BT, positions_BT=None, key=None):
    """The final hidden state."""
    return model(tokens_BT, positions_BT, key=key)


def packed_row(lengths):
    """One row of documents and padding: tokens, positions and segments."""
    positions = np.concatenate([np.arange(n) for n in [*lengths, T - sum(lengths)]])
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, T - sum(lengths)])
    tokens = np.random.default_rng(0).integers(0, 60, T)
    return tokens[None], positions[None], segments[None]


def finite(logits_BTV):
    """Logits with a zero for each -inf of the padding of the vocabulary."""
    return jnp.where(jnp.isfinite(logits_BTV), logits_BTV, 0.0)
