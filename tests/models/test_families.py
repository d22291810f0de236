"""What must hold for encoders and encoder-decoders, proved on tiny ones with all weights random."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError
from lslm_jax.models import attention, heads, model_configs
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.build_model import build_model
from lslm_jax.models.layers import INIT_STD

T, S, D = 10, 12, 32
SIZES = {"num_layers": 2, "d_model": D, "num_heads": 4, "vocab_size": 61, "num_labels": 3, "max_length": 32}
SIZES |= {"head_dim": 8, "d_ff": 48, "dropout": 0.0, "dtype": "float32", "scan_layers": True}
BERT = fill_sizes(replace(model_configs.BERT, **SIZES))
MODERN = fill_sizes(replace(model_configs.modern_encoder_base, **SIZES, window=0, layer_types=()))
T5 = fill_sizes(replace(model_configs.t5_small, **SIZES, num_decoder_layers=3, relative_buckets=8, relative_distance=9))
T5_V1_1 = replace(T5, gated=True, activation="gelu", tie_embeddings=False, logit_scale=False, num_kv_heads=2)
ORIGINAL = fill_sizes(replace(model_configs.transformer_base, **SIZES))
ENCODERS = {"bert": BERT, "modern": MODERN}
PAIRS = {"t5": T5, "t5-v1.1": T5_V1_1, "2017": ORIGINAL}
MIXED = ("full", "window")
families = pytest.mark.parametrize("config", [*ENCODERS.values(), *PAIRS.values()], ids=[*ENCODERS, *PAIRS])
# One encoder and one encoder-decoder; the other ones differ from these in code that has no part in dropout.
dropping_families = pytest.mark.parametrize(
    "config",
    [BERT, T5, *(pytest.param(config, marks=pytest.mark.exhaustive) for config in (MODERN, T5_V1_1, ORIGINAL))],
    ids=["bert", "t5", "modern", "t5-v1.1", "2017"],
)


@pytest.mark.parametrize(
    ("config", "muted", "reach"),
    [
        (BERT, [], T),
        (MODERN, [], T),
        (replace(MODERN, positions="relative"), [], T),
        (replace(MODERN, window=3), [1], 2),
        (replace(MODERN, window=3), [], 4),
        (replace(MODERN, window=3, layer_types=MIXED), [], T),
        (replace(MODERN, window=3, layer_types=MIXED), [0], 2),
        (replace(MODERN, window=3, layer_types=MIXED, scan_layers=False), [0], 2),
        (replace(MODERN, window=3, layer_types=MIXED, scan_layers=False), [1], T),
    ],
    ids=["bert", "modern", "relative", "one local", "two local", "mixed", "its local", "unrolled", "its global"],
)
def test_a_token_of_an_encoder_depends_on_exactly_those_within_reach(config, muted, reach):
    """Muted layers add nothing to the residual stream, so that the other one is seen alone."""
    model = random_model(config, "qa")
    for part in (model.blocks.attention.o, model.blocks.mlp.down):
        w = np.array(part.w.get_value())
        w[muted] = 0.0
        part.w.set_value(jnp.asarray(w))
    tokens_BT = np.arange(T)[None] + 7  # all different, so that each row of the embedding is one position
    segments_BT = np.array([[1] * 8 + [2] * 2])
    batch = Batch(tokens_BT, None, None, segments_BT=segments_BT)
    seen_TS = np.abs(np.arange(T)[:, None] - np.arange(T)[None, :]) <= reach
    seen_TS &= segments_BT[0][:, None] == segments_BT[0][None]
    assert_depends(influence(model, batch)[:, tokens_BT[0]], seen_TS)


@pytest.mark.parametrize(
    "config", [T5, pytest.param(T5_V1_1, marks=pytest.mark.exhaustive), ORIGINAL], ids=["t5", "t5-v1.1", "2017"]
)
def test_a_target_depends_on_all_of_its_source_and_on_what_it_has_read(config):
    model = random_model(config)
    source_BS, tokens_BT = np.arange(S)[None] + 7, np.arange(T)[None] + 30
    segments_BT, source_segments_BS = np.array([[1] * 4 + [2] * 6]), np.array([[1] * 7 + [2] * 3 + [0] * 2])
    batch = Batch(tokens_BT, None, None, segments_BT=segments_BT, source_BS=source_BS)
    size_TV = influence(model, batch._replace(source_segments_BS=source_segments_BS))
    own_TS = segments_BT[0][:, None] == segments_BT[0][None]
    assert_depends(size_TV[:, tokens_BT[0]], own_TS & np.tri(T, dtype=bool))
    assert_depends(size_TV[:, source_BS[0]], segments_BT[0][:, None] == source_segments_BS[0][None])


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["padded", "bare"])
@families
def test_packed_examples_equal_examples_alone(config, padded):
    """Forward and backward; padded to one length, all rows are read by one compiled program."""
    model = random_model(config, "tagging")
    packed, alone = examples(config)
    readout_TD = np.random.default_rng(3).normal(size=(T, D)).astype(np.float32)

    def score(model, batch, readout_TD):
        x_BTD = features(model, batch)
        return jnp.sum(x_BTD[0] * readout_TD), x_BTD

    gradient = jax.jit(jax.grad(score, has_aux=True))
    whole, x_BTD = gradient(model, packed, first_rows(readout_TD, 9))  # padding does not count
    parts = []
    for batch, place in zip(alone, (slice(0, 5), slice(5, 9)), strict=True):
        length = place.stop - place.start
        if padded:
            part, own_BTD = gradient(model, full_length(batch), first_rows(readout_TD[place], length))
        else:
            part, own_BTD = gradient(model, batch, readout_TD[place])
        np.testing.assert_allclose(x_BTD[:, place], own_BTD[:, :length], atol=1e-5)
        parts.append(part)
    total = jax.tree.map(np.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, total)


@families
def test_a_token_changed_in_one_example_leaves_the_others_bit_for_bit(config):
    model = random_model(config, "tagging")
    packed, _ = examples(config)
    before = np.asarray(features(model, packed))
    for name, first in [("tokens_BT", 0), ("source_BS", 0), ("tokens_BT", 9), ("source_BS", 10)]:
        if getattr(packed, name) is None:
            continue
        changed = getattr(packed, name).copy()
        changed[0, first] += 1
        after = np.asarray(features(model, packed._replace(**{name: changed})))
        if first == 0:
            assert np.any(before[0, :5] != after[0, :5])
            np.testing.assert_array_equal(before[0, 5:9], after[0, 5:9])
        else:
            np.testing.assert_array_equal(before[0, :9], after[0, :9], err_msg="padding is never read")


@families
def test_padding_changes_nothing_and_is_never_nan(config):
    model = random_model(config, "tagging")
    packed, (first, _) = examples(config)
    padded = np.asarray(features(model, full_length(first)))
    np.testing.assert_allclose(padded[:, :5], features(model, first), atol=1e-5)
    empty = jax.tree.map(np.zeros_like, packed)
    for x_BTD in (padded, features(model, packed), features(model, empty)):
        assert np.all(np.isfinite(x_BTD))


@pytest.mark.exhaustive
@families
def test_padding_of_either_side_and_a_row_of_padding_change_nothing(config):
    model = random_model(config, "tagging")
    _, (first, _) = examples(config)
    x_BTD = features(model, first)
    pair = config.family == "encoder_decoder"
    for sides in [["BT"], ["BS"], ["BT", "BS"]] if pair else [["BT"]]:
        padded = np.asarray(features(model, with_padding(first, sides)))
        np.testing.assert_allclose(padded[:1, :5], x_BTD, atol=1e-5, err_msg=str(sides))
        assert np.all(np.isfinite(padded))


@pytest.mark.parametrize(
    "config",
    [pytest.param(BERT, marks=pytest.mark.exhaustive), MODERN, replace(T5, num_decoder_layers=2)],
    ids=["bert", "modern", "t5"],
)
def test_scan_and_recomputation_change_nothing(config):
    config = replace(config, dropout=0.3, window=3 if config.positions == "rotary" else 0, layer_types=MIXED)
    packed, _ = examples(config)
    model = random_model(config, "tagging")
    leaves = jax.tree.leaves(model)

    def value_and_gradient(**changes):
        other = random_model(replace(config, **changes), "tagging")

        def loss(leaves):
            model = jax.tree.unflatten(jax.tree.structure(other), leaves)
            x_BTD = model.features(packed, backend=attention.XLA, key=jax.random.key(5))
            return jnp.mean(jnp.square(x_BTD[:, :9]))

        return jax.jit(jax.value_and_grad(loss))(leaves)

    value, gradient = value_and_gradient(scan_layers=False)
    other, other_gradient = value_and_gradient(scan_layers=True, remat="save_attention")
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for a, b in zip(other_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


WINDOWED = replace(ORIGINAL, window=3, layer_types=MIXED)


@pytest.mark.parametrize(
    ("config", "unstacked"),
    [
        (T5, False),
        (T5_V1_1, True),
        (WINDOWED, False),
        pytest.param(T5, True, marks=pytest.mark.exhaustive),
        pytest.param(T5_V1_1, False, marks=pytest.mark.exhaustive),
        pytest.param(WINDOWED, True, marks=pytest.mark.exhaustive),
    ],
    ids=["t5", "t5-v1.1-unstacked", "2017", "t5-unstacked", "t5-v1.1", "2017-unstacked"],
)
def test_an_encoder_decoder_writes_with_a_cache_what_it_reads_as_a_whole(config, unstacked):
    model = random_model(config)
    rng = np.random.default_rng(0)
    tokens_BT, source_BS = rng.integers(0, 61, (2, T)), rng.integers(0, 61, (2, S))
    source_segments_BS = (np.arange(S)[None] < np.array([[9], [S]])).astype(int)
    batch = Batch(tokens_BT, None, None, source_BS=source_BS, source_segments_BS=source_segments_BS)
    whole = features(model, batch)
    layers, zeros = config.num_decoder_layers, np.zeros((2, T, config.num_kv_heads, config.head_dim), np.float32)

    @jax.jit
    def encode(model):
        encoded_BSD = model.encode(source_BS, None, source_segments_BS, backend=attention.XLA)
        model = model.unstacked() if unstacked else model
        return model, model.cross(encoded_BSD)

    model, cross = encode(model)
    cache = [KeyValues(zeros, zeros)] * layers
    cache = cache if unstacked else jax.tree.map(lambda *a: np.stack(a), *cache)
    for first, last in [(0, 4), *((t, t + 1) for t in range(4, T))]:
        positions_BT = np.arange(first, last)[None].repeat(2, axis=0)
        mask_BTS = np.arange(T)[None, None] <= positions_BT[:, :, None]
        cross_mask_BTS = source_segments_BS[:, None] > 0
        x_BTD, cache = read(
            model, tokens_BT[:, first:last], positions_BT, cache, np.int32(first), mask_BTS, cross, cross_mask_BTS
        )
        np.testing.assert_allclose(x_BTD, whole[:, first:last], atol=2e-5)
    logits_BTV, (w_VD, _) = jax.jit(lambda model, x_BTD: (model.logits(x_BTD), model.output()))(model, x_BTD)
    logits_BTV = np.asarray(logits_BTV)
    assert logits_BTV.shape == (2, 1, 128) and np.all(logits_BTV[..., 61:] == -np.inf)
    expected = np.asarray(x_BTD) @ np.asarray(w_VD).T
    np.testing.assert_allclose(logits_BTV[..., :61], expected[..., :61], atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_decoder_with_a_window_in_some_layers_reads_with_a_cache_as_without(positions):
    config = fill_sizes(ModelConfig(**SIZES, positions=positions, window=3, layer_types=MIXED))
    model = random_model(config)
    tokens_BT, positions_BT = np.arange(T)[None], np.arange(T)[None]
    zeros = np.zeros((2, 1, T, 4, 8), np.float32)
    cache = KeyValues(zeros, zeros)
    mask_BTS = np.tri(T, dtype=bool)[None]
    parts = []
    for place in (slice(0, 5), slice(5, T)):
        start = np.int32(place.start)
        x_BTD, cache = read(model, tokens_BT[:, place], positions_BT[:, place], cache, start, mask_BTS[:, place])
        parts.append(x_BTD)
    hidden = jax.jit(lambda model: model(tokens_BT))
    whole = np.asarray(hidden(model))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert np.max(np.abs(whole - hidden(random_model(replace(config, layer_types=()))))) > 0.01


@dropping_families
def test_dropout_needs_a_key_and_follows_it(config):
    model = random_model(replace(config, dropout=0.5), "classification")
    packed, _ = examples(config)
    key, other_key = jax.random.key(1), jax.random.key(2)
    without = np.asarray(features(model, packed))
    dropped, again, other = (np.asarray(features(model, packed, k)) for k in (key, key, other_key))
    np.testing.assert_array_equal(without, features(random_model(config, "classification"), packed))
    np.testing.assert_array_equal(dropped, again)
    assert np.any(dropped != without)
    assert np.any(dropped != other)


@pytest.mark.parametrize(
    ("objective", "rows"), [("classification", 3), ("regression", 1), ("tagging", 3), ("qa", 2), ("masked", 128)]
)
def test_a_head_says_as_many_numbers_as_its_objective_has(objective, rows):
    model = random_model(BERT, objective)
    packed, _ = examples(BERT)
    shape = {"classification": (1, 1, D), "regression": (1, 1, D)}.get(objective, (1, T, D))
    assert features(model, packed).shape == shape
    w_VD, b_V = model.output()
    assert w_VD.shape == (rows, D) and b_V.shape == (rows,)
    assert (objective == "masked") == (w_VD is model.embed.get_value())


def test_an_encoder_refuses_what_it_has_no_head_for():
    with pytest.raises(ConfigError, match=r"^an encoder does not learn task\.objective=causal(\n|$)"):  # a note of JAX
        jax.eval_shape(lambda: build_model(BERT, jax.random.key(0)))


def test_masked_tokens_are_those_at_the_places_of_the_batch():
    model = random_model(BERT, "masked")
    packed, _ = examples(BERT)
    places_BP = np.array([[7, 0, 3]])
    some = np.asarray(features(model, packed._replace(places_BP=places_BP)))
    np.testing.assert_allclose(some[0], np.asarray(features(model, packed))[0, places_BP[0]], atol=1e-6)
    logits_BPV = np.asarray(jax.jit(lambda model, x_BPD: model.logits(x_BPD))(model, some))
    w_VD, b_V = map(np.asarray, model.output())
    np.testing.assert_allclose(logits_BPV[..., :61], (some @ w_VD.T + b_V)[..., :61], atol=1e-5)


def test_pooling_is_of_the_first_token_or_of_all_that_are_not_padding():
    x_BTD = np.random.default_rng(0).normal(size=(3, T, D)).astype(np.float32)
    segments_BT = (np.arange(T)[None] < np.array([[4], [T], [0]])).astype(int)
    pool = jax.jit(heads.pool, static_argnums=2)
    np.testing.assert_array_equal(pool(x_BTD, segments_BT, "first"), x_BTD[:, :1])
    mean_B1D = np.asarray(pool(x_BTD, segments_BT, "mean"))
    np.testing.assert_allclose(mean_B1D[0, 0], x_BTD[0, :4].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(mean_B1D[1, 0], pool(x_BTD, None, "mean")[1, 0], atol=1e-6)
    assert np.all(mean_B1D[2] == 0.0)


def test_types_tell_texts_apart_and_none_means_the_first():
    model = random_model(BERT, "qa")
    packed, _ = examples(BERT)
    none = np.asarray(features(model, packed._replace(types_BT=None)))
    np.testing.assert_array_equal(none, features(model, packed._replace(types_BT=np.zeros((1, T), int))))
    assert np.max(np.abs(none - features(model, packed._replace(types_BT=np.ones((1, T), int))))) > 0.1


def test_weights_start_as_large_as_what_they_sum_up_is_small():
    big = {"d_model": 144, "head_dim": 32, "num_heads": 4, "d_ff": 256, "vocab_size": 512, "num_kv_heads": 4}
    for config, table, query in [(T5, 1.0, 32**-0.5), (T5_V1_1, 1.0, 32**-0.5), (ORIGINAL, 1 / 12, 1.0)]:
        model = jax.jit(functools.partial(build_model, replace(config, **big)))(jax.random.key(0))
        block = model.decoder.blocks
        expected = [(model.embed, table), (block.attention.q.w, query / 12), (block.cross.q.w, query / 12)]
        expected += [(p.w, 1 / 12) for p in (block.attention.k, block.cross.v, block.mlp.up)]
        expected += [(block.attention.o.w, 128**-0.5), (block.mlp.down.w, 1 / 16)]
        expected += [] if model.head is None else [(model.head, 1 / 12)]
        for param, std in expected:
            assert abs(np.std(param.get_value()) / std - 1) < 0.03
    bert = jax.jit(functools.partial(build_model, replace(BERT, **big), objective="masked"))(jax.random.key(0))
    head = bert.top.transform.dense.w
    for param in (bert.embed, bert.positions, bert.blocks.attention.o.w, bert.blocks.mlp.down.w, head):
        assert abs(np.std(param.get_value()) / INIT_STD - 1) < 0.03


@jax.jit
def read(model, *inputs):
    return model.with_cache(*inputs)


def random_model(config, objective="seq2seq"):
    """A model none of whose weights is special: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = {part.name for part in path}
        # Where products are not divided by sqrt(C), queries are small instead.
        size = 0.3 / config.head_dim**0.5 if "q" in names and config.attention_scale else 0.3
        return jnp.asarray(rng.normal("scale" in names, size, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config, objective))


@functools.cache
def abstract_model(config, objective):
    return jax.eval_shape(lambda: build_model(config, jax.random.key(0), objective))


@jax.jit
def features(model, batch, key=None):
    return model.features(batch, backend=attention.XLA, key=key)


@jax.jit
def embedding_jacobian(model, batch):
    """Derivative of a projection of the hidden state at each position with respect to the embedding: [T, V, D]."""
    readout_D = jax.random.normal(jax.random.key(3), (D,))

    def project(embed_VD):
        other = jax.tree.map(lambda leaf: leaf, model)
        other.embed.set_value(embed_VD)
        return features(other, batch)[0] @ readout_D

    return jax.jacrev(project)(model.embed.get_value())


def influence(model, batch):
    """How much each row of the embedding moves what the model says at each position: [T, V]."""
    return np.max(np.abs(embedding_jacobian(model, batch)), axis=-1)


def assert_depends(size_TS, seen_TS):
    assert np.all(size_TS[~seen_TS] == 0.0)
    assert np.all(size_TS[seen_TS] > 1e-5)


def examples(config):
    """A row of two examples, of 5 and of 4 tokens, and of padding; and the two in rows of their own."""
    rng = np.random.default_rng(0)
    cuts = [slice(0, 5), slice(5, 9)]
    row = {
        "tokens_BT": rng.integers(0, 60, T),
        "positions_BT": np.r_[0:5, 0:4, 0],
        "segments_BT": np.repeat([1, 2, 0], [5, 4, 1]),
        "types_BT": rng.integers(0, 2, T) if config.token_types else None,
    }
    if config.family == "encoder_decoder":
        row |= {
            "source_BS": rng.integers(0, 60, S),
            "source_positions_BS": np.r_[0:7, 0:3, 0:2],
            "source_segments_BS": np.repeat([1, 2, 0], [7, 3, 2]),
        }
    row = {name: part if part is None else part[None] for name, part in row.items()}
    alone = []
    for cut, source_cut in zip(cuts, [slice(0, 7), slice(7, 10)], strict=True):
        parts = {
            name: part if part is None else part[:, source_cut if "BS" in name else cut] for name, part in row.items()
        }
        ones = {name: np.minimum(part, 1) for name, part in parts.items() if "segments" in name}
        alone.append(Batch(**(parts | ones), targets_BT=None, weights_BT=None))
    return Batch(**row, targets_BT=None, weights_BT=None), alone


def full_length(batch):
    """The batch with padding behind its targets (up to T) and its source (up to S)."""

    def pad(name, part):
        length = S if name.endswith("BS") else T
        return part if part is None else np.pad(part, ((0, 0), (0, length - part.shape[1])))

    return Batch(*(pad(name, part) for name, part in batch._asdict().items()))


def first_rows(x_TD, count):
    """The first rows, and zeros behind them up to T."""
    return np.pad(x_TD[:count], ((0, T - count), (0, 0)))


def with_padding(batch, sides):
    """The batch with padding behind its target (BT) or its source (BS), and a row that is nothing but padding."""

    def pad(name, part):
        longer = 4 if name[-2:] in sides else 0
        return part if part is None else np.pad(part, ((0, 1), (0, longer)))

    return Batch(*(pad(name, part) for name, part in batch._asdict().items()))
