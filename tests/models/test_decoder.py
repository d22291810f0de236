"""What must hold for every decoder, proved on tiny ones with all weights random, norms and biases too."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.models import block, presets
from lslm_jax.models.decoder import Decoder
from lslm_jax.models.embedding import padded_vocab
from lslm_jax.models.layers import INIT_STD

T = 12
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=32))
LLAMA = fill_sizes(
    replace(presets.LLAMA, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=61, max_length=32)
)
LLAMA = replace(LLAMA, dtype="float32")
families = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


@pytest.mark.parametrize(
    ("config", "window", "num_layers"),
    [(GPT, 0, 2), (LLAMA, 0, 2), (GPT, 3, 1), (LLAMA, 3, 2)],
    ids=["gpt", "llama", "window", "window over two layers"],
)
def test_a_token_depends_on_exactly_the_tokens_it_may_see(config, window, num_layers):
    model = random_model(replace(config, window=window, num_layers=num_layers))
    tokens_BT = jnp.arange(T)[None] + 7  # all different, so that each row of the embedding is one position
    readout_D = jax.random.normal(jax.random.key(3), (config.d_model,))

    def project(embed_VD):
        other = jax.tree.map(lambda leaf: leaf, model)
        other.embed.set_value(embed_VD)
        return other(tokens_BT)[0] @ readout_D

    jacobian_TVD = jax.jit(jax.jacrev(project))(model.embed.get_value())
    size_TS = jnp.max(jnp.abs(jacobian_TVD[:, tokens_BT[0]]), axis=-1)
    distance_TS = np.arange(T)[:, None] - np.arange(T)[None, :]
    reach = num_layers * (window - 1) if window else T
    seen_TS = (distance_TS >= 0) & (distance_TS <= reach)
    assert np.all(size_TS[~seen_TS] == 0.0)
    assert np.all(size_TS[seen_TS] > 1e-4)


@pytest.mark.parametrize(("config", "window"), [(GPT, 0), (LLAMA, 3)], ids=["gpt", "llama with a window"])
def test_packed_documents_equal_documents_alone(config, window):
    model = random_model(replace(config, window=window))
    tokens_BT, positions_BT, segments_BT = packed_row([5, 5])
    readout_TV = jax.random.normal(jax.random.key(3), (T, padded_vocab(config)))

    def score(model, tokens_BT, readout_TV, *rest):
        logits_BTV = finite(model.logits(model(tokens_BT, *rest)))
        return jnp.sum(logits_BTV[0] * readout_TV), logits_BTV

    gradient = jax.jit(jax.grad(score, has_aux=True))
    weighed_TV = readout_TV.at[10:].set(0.0)  # padding does not count
    packed, logits_BTV = gradient(model, tokens_BT, weighed_TV, positions_BT, segments_BT)
    alone = []
    for document in (slice(0, 5), slice(5, 10)):
        gradients, own_BTV = gradient(model, tokens_BT[:, document], readout_TV[document])
        np.testing.assert_allclose(logits_BTV[:, document], own_BTV, atol=1e-5)
        alone.append(gradients)
    total = jax.tree.map(jnp.add, *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), packed, total)


@families
def test_a_token_changed_in_one_document_leaves_the_others_bit_for_bit(config):
    model = random_model(config)
    tokens_BT, positions_BT, segments_BT = packed_row([5, 1, 4])
    score = jax.jit(lambda tokens_BT: model.logits(model(tokens_BT, positions_BT, segments_BT)))
    before, after = score(tokens_BT), score(tokens_BT.at[0, 2].add(1))
    assert np.any(before[0, 2:5] != after[0, 2:5])
    np.testing.assert_array_equal(before[0, :2], after[0, :2])
    np.testing.assert_array_equal(before[0, 5:], after[0, 5:])


@families
def test_learned_positions_are_places_and_rotary_ones_distances(config):
    model = random_model(config)
    tokens_BT = jnp.arange(T)[None]
    here = read(model, tokens_BT, jnp.arange(T)[None])
    np.testing.assert_array_equal(here, read(model, tokens_BT))
    there = read(model, tokens_BT, jnp.arange(T)[None] + 9)
    scattered = read(model, tokens_BT, jnp.arange(T)[None] * 2)
    moved = float(jnp.max(jnp.abs(here - there)))
    assert moved < 1e-4 if config.positions == "rotary" else moved > 0.1
    assert float(jnp.max(jnp.abs(here - scattered))) > 0.1


def test_a_learned_table_is_read_at_the_positions_given():
    model = random_model(GPT)
    tokens_BT, positions_BT = jnp.arange(T)[None], jnp.flip(jnp.arange(T))[None]
    flipped = random_model(GPT)
    flipped.positions.set_value(jnp.flip(model.positions.get_value()[:T], axis=0))
    np.testing.assert_array_equal(read(model, tokens_BT, positions_BT), read(flipped, tokens_BT))


def test_grouped_key_heads_equal_repeated_ones():
    grouped, tokens_BT = random_model(LLAMA), jnp.arange(T)[None]

    def repeat(path, leaf):
        return jnp.repeat(leaf, 2, axis=2) if {"k", "v"} & {part.name for part in path} else leaf

    leaves = jax.tree.leaves(jax.tree_util.tree_map_with_path(repeat, grouped))
    whole = jax.tree.unflatten(jax.tree.structure(random_model(replace(LLAMA, num_kv_heads=4))), leaves)
    np.testing.assert_allclose(read(grouped, tokens_BT), read(whole, tokens_BT), atol=1e-5)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    tokens_BT = jnp.arange(T)[None]
    for qk_norm in ("head", "all", "none"):
        model = random_model(replace(LLAMA, qk_norm=qk_norm, norm_eps=1e-12))
        before = read(model, tokens_BT)
        model.blocks.attention.q.w.set_value(7.0 * model.blocks.attention.q.w.get_value())
        model.blocks.attention.k.w.set_value(0.3 * model.blocks.attention.k.w.get_value())
        change = float(jnp.max(jnp.abs(read(model, tokens_BT) - before)))
        assert change < 1e-4 if qk_norm != "none" else change > 0.1


@families
def test_logits_are_float32_capped_and_never_a_padding_token(config):
    config = replace(config, dtype="bfloat16", logit_softcap=3.0)
    model = random_model(config)
    x_BTD = read(model, jnp.arange(T)[None])
    assert x_BTD.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    logits_BTV = model.logits(x_BTD)
    assert logits_BTV.dtype == jnp.float32 and logits_BTV.shape == (1, T, 128)
    assert np.all(logits_BTV[..., 61:] == -np.inf)
    raw = np.asarray(x_BTD, np.float32) @ np.asarray(model.output()[0].astype("bfloat16"), np.float32).T
    np.testing.assert_allclose(logits_BTV[..., :61], (3.0 * np.tanh(raw / 3.0))[..., :61], atol=1e-5)


def test_a_tied_output_layer_is_the_embedding():
    assert random_model(GPT).head is None and random_model(LLAMA).head is not None
    tied = random_model(replace(LLAMA, tie_embeddings=True))
    assert tied.output()[0] is tied.embed.get_value()


@families
def test_dropout_needs_a_key_and_follows_it(config):
    plain, dropping = random_model(config), random_model(replace(config, dropout=0.5))
    tokens_BT, key = jnp.arange(T)[None], jax.random.key(4)
    np.testing.assert_array_equal(read(dropping, tokens_BT), read(plain, tokens_BT))
    np.testing.assert_array_equal(read(plain, tokens_BT, key=key), read(plain, tokens_BT))
    np.testing.assert_array_equal(read(dropping, tokens_BT, key=key), read(dropping, tokens_BT, key=key))
    assert np.any(read(dropping, tokens_BT, key=key) != read(dropping, tokens_BT))
    assert np.any(read(dropping, tokens_BT, key=key) != read(dropping, tokens_BT, key=jax.random.key(5)))


def test_each_layer_drops_others(monkeypatch):
    keys = []

    def recording(x, rate, key):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return x

    monkeypatch.setattr(block, "dropout", recording)
    model = random_model(replace(GPT, dropout=0.5, num_layers=3))
    jax.jit(model)(jnp.arange(T)[None], key=jax.random.key(0)).block_until_ready()
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
        assert abs(float(jnp.std(param.get_value())) / std - 1) < 0.03
        assert abs(float(jnp.mean(param.get_value()))) < 0.03 * std
    assert np.all(attention.q.b.get_value() == 0.0) and np.all(model.blocks.mlp_norm.scale.get_value() == 1.0)
    layers = attention.q.w.get_value()
    assert np.any(layers[0] != layers[1])


def random_model(config):
    """A model none of whose weights is special: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-2].name == "scale", 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))


@jax.jit
def read(model, tokens_BT, positions_BT=None, key=None):
    """The final hidden state."""
    return model(tokens_BT, positions_BT, key=key)


def packed_row(lengths):
    """One row of documents and padding: tokens, positions and segments."""
    positions = np.concatenate([np.arange(n) for n in [*lengths, T - sum(lengths)]])
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, T - sum(lengths)])
    tokens = np.random.default_rng(0).integers(0, 60, T)
    return tuple(jnp.asarray(x[None]) for x in (tokens, positions, segments))


def finite(logits_BTV):
    """Logits with a zero for each -inf of the padding of the vocabulary."""
    return jnp.where(jnp.isfinite(logits_BTV), logits_BTV, 0.0)
