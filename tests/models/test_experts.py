"""A mixture of experts is exactly what a loop over its tokens says it is; padding and packing change nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.batch import Batch
from lslm_jax.config import Config, MeshConfig, ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.models import attention, experts, grouped, presets
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.block import Mlp
from lslm_jax.models.experts import Experts
from lslm_jax.models.grouped import block_size, grouped_dot, lay_out
from lslm_jax.models.layers import ACTIVATIONS
from lslm_jax.sharding import make_mesh
from lslm_jax.train import losses

B, T, D, F, E = 3, 12, 8, 16, 4
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=D, num_heads=2, d_ff=F, vocab_size=61, max_length=T, num_experts=E))
MIXTRAL = replace(presets.LLAMA, num_layers=2, d_model=D, num_heads=2, d_ff=F, vocab_size=61, max_length=T)
MIXTRAL = fill_sizes(replace(MIXTRAL, dtype="float32", num_experts=E))
kinds = pytest.mark.parametrize("config", [GPT, MIXTRAL], ids=["with biases", "gated"])


def drawn(tree, std=0.5, seed=0):
    """The same with weights, and biases, that matter."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, std, leaf.shape), jnp.float32), tree)


mix = jax.jit(Experts.__call__, static_argnums=3)
route = jax.jit(experts.route, static_argnames=("k", "normalize", "most"))
read = jax.jit(lambda model, *args: model(*args))


def layer_of(config, seed=0):
    return drawn(jax.eval_shape(lambda: Experts(config, jax.random.key(0), sublayers=2)), seed=seed)


def dense(config, layer, e):
    """Expert e as the MLP of a model without any."""
    mlp = jax.eval_shape(lambda: Mlp(config, jax.random.key(0), sublayers=2))
    chosen = jax.tree.map(lambda leaf: leaf[e], {"up": layer.up, "gate": layer.gate, "down": layer.down})
    return jax.tree.unflatten(
        jax.tree.structure(mlp), jax.tree.leaves([chosen["down"], *filter(None, [chosen["gate"]]), chosen["up"]])
    )


def tokens(seed=1, shape=(B, T)):
    return jax.random.normal(jax.random.key(seed), (*shape, D))


def one_by_one(config, layer, x_BTD, real_BT=None):
    """The reference: each token alone, through its likeliest experts."""
    weights = lambda part: part.w.get_value()
    bias = lambda part, e: 0.0 if part.b is None else part.b.get_value()[e]
    act = ACTIVATIONS[config.activation]

    def says(e, x_D):
        up_F = x_D @ weights(layer.up)[e] + bias(layer.up, e)
        gate_F = up_F if layer.gate is None else x_D @ weights(layer.gate)[e] + bias(layer.gate, e)
        hidden_F = act(up_F) if layer.gate is None else act(gate_F) * up_F
        return hidden_F @ weights(layer.down)[e] + bias(layer.down, e)

    rows = []
    for b in range(x_BTD.shape[0]):
        for t in range(x_BTD.shape[1]):
            x_D = x_BTD[b, t]
            p_E = jax.nn.softmax(x_D @ weights(layer.router))
            chosen = np.argsort(-np.asarray(jax.lax.stop_gradient(p_E)))[: config.experts_per_token]
            chosen = chosen if real_BT is None or real_BT[b, t] else []
            total = sum(p_E[e] for e in chosen) if config.expert_normalize else 1.0
            rows.append(sum([p_E[e] / total * says(e, x_D) for e in chosen], jnp.zeros(D)))
    return jnp.stack(rows).reshape(x_BTD.shape)


@pytest.mark.parametrize("sizes", [[5, 0, 40, 19], [0, 0, 0, 64], [0, 0, 0, 0], [16, 16, 16, 16]], ids=str)
def test_a_grouped_product_is_that_of_each_row_with_its_groups_matrix(sizes):
    N, block = 64, 8
    rng = np.random.default_rng(0)
    group_N = jnp.asarray(rng.permutation(np.append(np.repeat(np.arange(4), sizes), np.full(N - sum(sizes), 7))))
    x_ND = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    w_GDF = jnp.asarray(rng.normal(size=(4, D, F)), jnp.float32)

    def grouped(x_ND, w_GDF):
        places = lay_out(group_N, 4, N, block)
        x_RD = x_ND.at[places.row_R].get(mode="fill", fill_value=0)
        y_RF = grouped_dot(x_RD, w_GDF, places.ends_G, block)
        return y_RF.at[places.place_N].get(mode="fill", fill_value=0)

    masked = lambda x_ND, w_GDF: jnp.einsum("ng,nd,gdf->nf", jax.nn.one_hot(group_N, 4), x_ND, w_GDF)
    np.testing.assert_allclose(grouped(x_ND, w_GDF), masked(x_ND, w_GDF), atol=1e-5)
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x_ND, w_GDF) for f in (grouped, masked)]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("sizes", [[5, 0, 40, 19], [0, 0, 0, 64], [0, 0, 0, 0]], ids=str)
def test_what_tpus_make_of_a_grouped_products_gradient_is_what_the_loop_makes(sizes):
    N, block = 64, 8
    rng = np.random.default_rng(0)
    places = lay_out(jnp.asarray(np.append(np.repeat(np.arange(4), sizes), np.full(N - sum(sizes), 7))), 4, N, block)
    inside = jnp.arange(len(places.row_R)) < block * places.ends_G[-1]  # what lies behind may be anything
    x_RD, dy_RF = (jnp.where(inside[:, None], rng.normal(size=(len(inside), size)), jnp.nan) for size in (D, F))
    w_GDF = jnp.asarray(rng.normal(size=(4, D, F)), jnp.float32)
    found = grouped._ragged_gradients(block, x_RD, w_GDF, places.ends_G, dy_RF, interpret=True)
    expected = grouped._gradients(block, x_RD, w_GDF, places.ends_G, dy_RF)
    np.testing.assert_allclose(found[0][inside], expected[0][inside], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_blocks_are_small_beside_what_an_expert_gets():
    for rows, groups in [(1, 8), (512, 8), (1 << 17, 8), (1 << 17, 64)]:
        block = block_size(rows, groups)
        assert block in (8, 16, 32, 64, 128, 256, 512) and (block == 8 or 4 * block * groups <= rows)


@kinds
@pytest.mark.parametrize(("k", "normalize"), [(1, False), (3, True)])
def test_a_mixture_equals_a_loop_over_tokens_with_its_gradient(config, k, normalize):
    config = replace(config, experts_per_token=k, expert_normalize=normalize)
    layer, x_BTD = layer_of(config), tokens(shape=(2, 7))
    real_BT = jnp.arange(7)[None] < jnp.array([[7], [5]])

    def value(ours, layer, x_BTD):
        y_BTD = layer(x_BTD, real_BT, 0.0)[0] if ours else one_by_one(config, layer, x_BTD, real_BT)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    (_, y_BTD), gradient = jax.jit(jax.value_and_grad(lambda *a: value(True, *a), (0, 1), has_aux=True))(layer, x_BTD)
    (_, expected), reference = jax.value_and_grad(lambda *a: value(False, *a), (0, 1), has_aux=True)(layer, x_BTD)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    assert np.all(y_BTD[1, 5:] == 0.0) and np.max(np.abs(y_BTD)) > 0.5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, reference)


@kinds
def test_one_expert_is_the_mlp(config):
    config = replace(config, num_experts=1, experts_per_token=1)
    layer = layer_of(config)
    np.testing.assert_allclose(mix(layer, tokens(), None, 0.0)[0], dense(config, layer, 0)(tokens()), atol=1e-6)


@kinds
def test_all_experts_of_an_even_router_are_their_mean(config):
    layer = layer_of(replace(config, experts_per_token=E))
    layer.router.w.set_value(jnp.zeros((D, E)))
    mean_BTD = sum(dense(config, layer, e)(tokens()) for e in range(E)) / E
    np.testing.assert_allclose(mix(layer, tokens(), None, 0.0)[0], mean_BTD, atol=1e-6)


@kinds
def test_the_order_of_experts_does_not_matter(config):
    layer, order = layer_of(config), jnp.array([2, 0, 3, 1])
    y_BTD, routing = mix(layer, tokens(), None, 0.0)
    moved = jax.tree.map(lambda leaf: leaf[..., order] if leaf.shape == (D, E) else leaf[order], layer)
    other_BTD, other = mix(moved, tokens(), None, 0.0)
    np.testing.assert_allclose(other_BTD, y_BTD, atol=1e-6)
    np.testing.assert_allclose(other.balance_B, routing.balance_B, rtol=1e-6)
    np.testing.assert_array_equal(other.load_E, routing.load_E[order])


def test_balance_is_one_where_all_is_even_and_grows_to_the_number_of_experts():
    even_TE = 5.0 * jnp.eye(E)[jnp.arange(T) % E]
    crowded_TE = jnp.zeros((T, E)).at[:, 1].set(50.0)
    _, _, routing = route(jnp.stack([even_TE, crowded_TE, jnp.zeros((T, E))]), 1)
    np.testing.assert_allclose(routing.balance_B, [1.0, E, 1.0], rtol=1e-5)
    np.testing.assert_array_equal(routing.load_E, [3 + T, 3 + T, 3, 3])
    random_BTE = 3.0 * jax.random.normal(jax.random.key(0), (50, T, E))
    for k, sharpness in [(1, 1.0), (2, 1.0), (3, 1.0), (1, 100.0)]:
        balance_B = route(sharpness * random_BTE, k)[2].balance_B
        assert 1.0 < np.mean(balance_B) < E / k and (sharpness == 1.0 or np.min(balance_B) >= 1.0 - 1e-5)
    np.testing.assert_allclose(route(random_BTE, E)[2].balance_B, 1.0, rtol=1e-5)  # whoever takes all is even


def test_losses_push_towards_balance_and_small_logits():
    logits_BTE = jax.random.normal(jax.random.key(0), (B, T, E)).at[..., 0].add(1.0)
    push = jax.grad(lambda logits_BTE: jnp.sum(route(logits_BTE, 2)[2].balance_B))(logits_BTE)
    assert np.all(np.sum(push, axis=(0, 1))[0] > np.abs(np.sum(push, axis=(0, 1))[1:]))
    expected_B = jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), axis=-1)
    np.testing.assert_allclose(route(logits_BTE, 2)[2].router_z_B, expected_B, rtol=1e-6)


def test_padding_counts_nowhere():
    logits_BTE = jax.random.normal(jax.random.key(0), (B, T, E))
    length = 7
    real_BT = jnp.broadcast_to(jnp.arange(T)[None] < length, (B, T))
    expert_BTK, _, routing = route(logits_BTE.at[:, length:, 2].add(9.0), 2, real_BT)
    *_, cut = route(logits_BTE[:, :length], 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), routing, cut)
    assert np.all(expert_BTK[:, length:] == E)
    *_, empty = route(logits_BTE, 2, jnp.zeros((B, T), bool), most=1)
    assert all(np.all(leaf == 0.0) for leaf in empty)


def test_over_capacity_the_first_come_first_and_no_token_looks_ahead():
    logits_BTE = jnp.zeros((1, T, E)).at[..., 1].set(9.0).at[:, :, 2].set(8.0).at[:, 3:5, 2].set(10.0)
    expert_BTK, weight_BTK, routing = route(logits_BTE, 2, most=4)
    assert np.all(np.sort(expert_BTK[0, :4]) == [1, 2]) and np.all(expert_BTK[0, 4:] == E)
    assert np.all(weight_BTK[0, 4:] == 0.0) and np.all(weight_BTK[0, :4] > 0.0)
    assert routing.dropped == 2 * (T - 4) and routing.load_E.tolist() == [0, T, T, 0]
    first = [part[:, :6] for part in route(logits_BTE, 2, most=4)[:2]]
    later = [part[:, :6] for part in route(logits_BTE.at[:, 6:, 3].set(20.0), 2, most=4)[:2]]
    jax.tree.map(np.testing.assert_array_equal, first, later)


@kinds
def test_what_is_dropped_passes_by_and_enough_room_drops_nothing(config):
    layer, x_BTD = layer_of(config), jnp.broadcast_to(tokens()[:, :1], (B, T, D))  # all tokens want the same
    free, _ = mix(layer, x_BTD, None, 0.0)
    tight, routing = mix(layer, x_BTD, None, 0.5)  # 0.5 * 2 * 12 / 4
    np.testing.assert_allclose(tight[:, :3], free[:, :3], atol=1e-6)
    assert np.all(tight[:, 3:] == 0.0) and routing.dropped == 2 * B * (T - 3) and np.min(np.abs(free)) > 1e-4
    roomy, routing = mix(layer, x_BTD, None, E / config.experts_per_token)
    np.testing.assert_allclose(roomy, free, atol=1e-6)
    assert routing.dropped == 0


@kinds
def test_rows_that_devices_cannot_share_are_read_by_all_of_them(config):
    layer, mesh = layer_of(config), make_mesh(Config(mesh=MeshConfig(data=1, expert=4, tensor=2)))
    for shape in [(1, 1), (2, 5), (4, 5)]:
        x_BTD = tokens(shape=shape)
        alone, _ = mix(layer, x_BTD, None, 0.0)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(mix(layer, x_BTD, None, 0.0)[0], alone, atol=1e-5)


def test_a_shared_expert_is_added_for_every_token():
    config = replace(MIXTRAL, shared_experts=2)
    model = drawn(jax.eval_shape(lambda: presets.build(config, jax.random.key(0))))
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    assert block.shared.up.w.shape == (D, 2 * F)
    out_BTD, _ = block._mlp(tokens(), None, 0.0)
    np.testing.assert_allclose(out_BTD, mix(block.mlp, tokens(), None, 0.0)[0] + block.shared(tokens()), atol=1e-6)


@kinds
def test_packed_documents_equal_documents_alone(config):
    model = drawn(jax.eval_shape(lambda: presets.build(config, jax.random.key(0))))
    ids_T = jax.random.randint(jax.random.key(2), (T,), 0, 61)
    segments_T = jnp.where(jnp.arange(T) < 5, 1, jnp.where(jnp.arange(T) < 10, 2, 0))
    packed = read(
        model, ids_T[None], jnp.where(segments_T == 2, jnp.arange(T) - 5, jnp.arange(T))[None], segments_T[None]
    )
    for first, last in ((0, 5), (5, 10)):
        np.testing.assert_allclose(packed[:, first:last], read(model, ids_T[None, first:last]), atol=1e-4)


@kinds
@pytest.mark.parametrize("unstacked", [False, True])
def test_what_is_read_with_a_cache_equals_what_is_read_as_a_whole(config, unstacked):
    model = drawn(jax.eval_shape(lambda: presets.build(config, jax.random.key(0))))
    ids_BT = jax.random.randint(jax.random.key(2), (2, T), 0, 61)
    whole = read(model, ids_BT)
    zeros = jnp.zeros((2, 2, T, 2, D // 2))
    model.config = replace(config, expert_capacity=0.25)  # whoever writes drops nothing
    model, cache = (
        (model.unstacked(), [KeyValues(z, z) for z in zeros]) if unstacked else (model, KeyValues(zeros, zeros))
    )
    write = jax.jit(type(model).with_cache)
    for first, last in [(0, 6), (6, T)]:
        positions_BT = jnp.arange(first, last)[None].repeat(2, axis=0)
        mask_BTS = jnp.arange(T)[None, None] <= positions_BT[:, :, None]
        x_BTD, cache = write(model, ids_BT[:, first:last], positions_BT, cache, jnp.int32(first), mask_BTS)
        np.testing.assert_allclose(x_BTD, whole[:, first:last], atol=1e-4)


@pytest.mark.parametrize(("family", "scan"), [("decoder", False), ("encoder", True), ("encoder_decoder", True)])
def test_every_layer_of_every_family_tells_how_it_sent_its_tokens(family, scan):
    config = replace(GPT, family=family, scan_layers=scan, num_decoder_layers=3 if family == "encoder_decoder" else 2)
    model = drawn(jax.eval_shape(lambda: presets.build(config, jax.random.key(0), "masked")))
    ids_BT = jax.random.randint(jax.random.key(2), (B, T), 0, 61)
    batch = Batch(ids_BT, ids_BT, jnp.ones((B, T)), segments_BT=(jnp.arange(T)[None] < jnp.array([[T], [5], [9]])) * 1)
    layers, words = 2, T + 5 + 9
    if family == "encoder_decoder":
        batch, layers = batch._replace(source_BS=ids_BT, source_segments_BS=batch.segments_BT), 5
    find = jax.jit(lambda model, batch: model.features_and_routing(batch, backend=attention.XLA))
    _, routing = find(model, batch)
    assert routing.balance_B.shape == routing.router_z_B.shape == (layers, B) and routing.dropped.shape == (layers,)
    np.testing.assert_array_equal(np.sum(routing.load_E, axis=-1), np.full(layers, 2 * words))
    metrics = losses.routing_metrics(losses.routing(routing, batch.weights_BT), jnp.float32(B * T))
    assert metrics["balance_loss"] == pytest.approx(float(jnp.mean(routing.balance_B)), rel=1e-5)
    assert metrics["expert_load"] == pytest.approx(np.mean(np.max(routing.load_E, axis=1)) / (2 * words / E))


def test_a_model_without_experts_has_none_of_this():
    config, batch = replace(GPT, num_experts=0), Batch(jnp.zeros((1, T), jnp.int32), None, None)
    find = lambda: presets.build(config, jax.random.key(0)).features_and_routing(batch, backend=attention.XLA)
    assert jax.eval_shape(find)[1] is None
