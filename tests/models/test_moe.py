"""A mixture of experts is exactly what a loop over its tokens says it is; padding and packing change nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from lslm_jax.config import Config, MeshConfig, ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.kernels import grouped_matmul
from lslm_jax.kernels.grouped_matmul import block_size, grouped_dot, lay_out
from lslm_jax.models import attention, model_configs, moe
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.block import Mlp
from lslm_jax.models.build_model import build_model
from lslm_jax.models.layers import ACTIVATIONS
from lslm_jax.models.moe import Experts
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train import losses

B, T, D, F, E = 3, 12, 8, 16, 4
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=D, num_heads=2, d_ff=F, vocab_size=61, max_length=T, num_experts=E))
MIXTRAL = replace(model_configs.LLAMA, num_layers=2, d_model=D, num_heads=2, d_ff=F, vocab_size=61, max_length=T)
MIXTRAL = fill_sizes(replace(MIXTRAL, dtype="float32", num_experts=E))
kinds = pytest.mark.parametrize("config", [GPT, MIXTRAL], ids=["with biases", "gated"])
# For what a model does around its experts.
one_kind = pytest.mark.parametrize(
    "config", [pytest.param(GPT, marks=pytest.mark.exhaustive), MIXTRAL], ids=["with biases", "gated"]
)


def drawn(tree, std=0.5, seed=0):
    """The same with weights, and biases, that matter."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, std, leaf.shape), jnp.float32), tree)


mix = jax.jit(Experts.__call__, static_argnums=3)
route = jax.jit(moe.route, static_argnames=("k", "normalize", "most"))
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


@functools.cache
def tokens(seed=1, shape=(B, T)):
    return np.asarray(jax.random.normal(jax.random.key(seed), (*shape, D)))


def random_model(config, objective="causal"):
    return drawn(jax.eval_shape(lambda: build_model(config, jax.random.key(0), objective)))


def random_ids(rows):
    return np.random.default_rng(2).integers(0, 61, (rows, T))


def random_logits():
    return np.random.default_rng(0).normal(size=(B, T, E)).astype(np.float32)


def one_by_one(config, layer, x_BTD, real_BT):
    """The reference: each token alone, through its likeliest experts."""
    weights = lambda part: part.w.get_value()
    bias = lambda part, e: 0.0 if part.b is None else part.b.get_value()[e]
    act = ACTIVATIONS[config.activation]

    def expert_output(e, x_D):
        up_F = x_D @ weights(layer.up)[e] + bias(layer.up, e)
        gate_F = up_F if layer.gate is None else x_D @ weights(layer.gate)[e] + bias(layer.gate, e)
        hidden_F = act(up_F) if layer.gate is None else act(gate_F) * up_F
        return hidden_F @ weights(layer.down)[e] + bias(layer.down, e)

    def token_output(x_D, real):
        p_E = jax.nn.softmax(x_D @ weights(layer.router))
        chosen_K = jnp.argsort(-jax.lax.stop_gradient(p_E))[: config.experts_per_token]
        total = sum(p_E[e] for e in chosen_K) if config.expert_normalize else 1.0
        return jnp.where(real, sum(p_E[e] / total * expert_output(e, x_D) for e in chosen_K), 0.0)

    return jax.vmap(jax.vmap(token_output))(x_BTD, real_BT)


@jax.jit
def grouped_products(group_N, x_ND, w_GDF):
    """Outputs and gradients of the grouped product and of its reference, which multiplies all and masks."""
    N, block = 64, 8

    def grouped(x_ND, w_GDF):
        places = lay_out(group_N, 4, N, block)
        x_RD = x_ND.at[places.row_R].get(mode="fill", fill_value=0)
        y_RF = grouped_dot(x_RD, w_GDF, places.ends_G, block)
        return y_RF.at[places.place_N].get(mode="fill", fill_value=0)

    masked = lambda x_ND, w_GDF: jnp.einsum("ng,nd,gdf->nf", jax.nn.one_hot(group_N, 4), x_ND, w_GDF)
    outputs = [function(x_ND, w_GDF) for function in (grouped, masked)]
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(x_ND, w_GDF) for f in (grouped, masked)]
    return outputs, gradients


@pytest.mark.parametrize("sizes", [[5, 0, 40, 19], [0, 0, 0, 64], [0, 0, 0, 0], [16, 16, 16, 16]], ids=str)
def test_a_grouped_product_is_that_of_each_row_with_its_groups_matrix(sizes):
    rng = np.random.default_rng(0)
    group_N = rng.permutation(np.append(np.repeat(np.arange(4), sizes), np.full(64 - sum(sizes), 7)))
    x_ND, w_GDF = (rng.normal(size=shape).astype(np.float32) for shape in ((64, D), (4, D, F)))
    outputs, gradients = grouped_products(group_N, x_ND, w_GDF)
    np.testing.assert_allclose(*outputs, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("sizes", [[5, 0, 40, 19], [0, 0, 0, 64], [0, 0, 0, 0]], ids=str)
def test_what_tpus_make_of_a_grouped_products_gradient_is_what_the_loop_makes(sizes):
    N, block = 64, 8
    rng = np.random.default_rng(0)
    group_N = np.append(np.repeat(np.arange(4), sizes), np.full(N - sum(sizes), 7))
    places = jax.tree.map(np.asarray, lay_out_jit(group_N, 4, N, block))
    inside = np.arange(len(places.row_R)) < block * places.ends_G[-1]  # what lies behind may be anything
    x_RD, dy_RF = (
        np.where(inside[:, None], rng.normal(size=(len(inside), size)), np.nan).astype(np.float32) for size in (D, F)
    )
    w_GDF = rng.normal(size=(4, D, F)).astype(np.float32)
    gradients, expected = both_gradients(block, x_RD, w_GDF, places.ends_G, dy_RF)
    np.testing.assert_allclose(gradients[0][inside], expected[0][inside], atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected[1], atol=1e-5)


lay_out_jit = jax.jit(lay_out, static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=0)
def both_gradients(*inputs):
    return grouped_matmul._ragged_gradients(*inputs, interpret=True), grouped_matmul._gradients(*inputs)


def test_blocks_are_small_beside_what_an_expert_gets():
    for rows, groups in [(1, 8), (512, 8), (1 << 17, 8), (1 << 17, 64)]:
        block = block_size(rows, groups)
        assert block in (8, 16, 32, 64, 128, 256, 512) and (block == 8 or 4 * block * groups <= rows)


@kinds
@pytest.mark.parametrize(("k", "normalize"), [(1, False), (3, True)])
def test_a_mixture_equals_a_loop_over_tokens_with_its_gradient(config, k, normalize):
    config = replace(config, experts_per_token=k, expert_normalize=normalize)
    layer, x_BTD = layer_of(config), tokens(shape=(2, 7))
    real_BT = np.arange(7)[None] < np.array([[7], [5]])

    def mixture(layer, x_BTD):
        y_BTD = layer(x_BTD, real_BT, 0.0)[0]
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    def loop(layer, x_BTD):
        y_BTD = one_by_one(config, layer, x_BTD, real_BT)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    gradient, y_BTD = jax.jit(jax.grad(mixture, (0, 1), has_aux=True))(layer, x_BTD)
    reference, expected = jax.jit(jax.grad(loop, (0, 1), has_aux=True))(layer, x_BTD)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    assert np.all(y_BTD[1, 5:] == 0.0) and np.max(np.abs(y_BTD)) > 0.5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, reference)


@kinds
def test_one_expert_is_the_mlp(config):
    config = replace(config, num_experts=1, experts_per_token=1)
    layer = layer_of(config)
    expected = jax.jit(lambda layer, x_BTD: dense(config, layer, 0)(x_BTD))(layer, tokens())
    np.testing.assert_allclose(mix(layer, tokens(), None, 0.0)[0], expected, atol=1e-6)


@kinds
def test_all_experts_of_an_even_router_are_their_mean(config):
    layer = layer_of(replace(config, experts_per_token=E))
    layer.router.w.set_value(jnp.zeros((D, E)))
    mean = jax.jit(lambda layer, x_BTD: sum(dense(config, layer, e)(x_BTD) for e in range(E)) / E)
    mean_BTD = mean(layer, tokens())
    np.testing.assert_allclose(mix(layer, tokens(), None, 0.0)[0], mean_BTD, atol=1e-6)


@kinds
def test_the_order_of_experts_does_not_matter(config):
    layer, order = layer_of(config), np.array([2, 0, 3, 1])
    y_BTD, routing = mix(layer, tokens(), None, 0.0)
    layer = jax.tree.map(np.asarray, layer)
    moved = jax.tree.map(lambda leaf: leaf[..., order] if leaf.shape == (D, E) else leaf[order], layer)
    other_BTD, other = mix(moved, tokens(), None, 0.0)
    np.testing.assert_allclose(other_BTD, y_BTD, atol=1e-6)
    np.testing.assert_allclose(other.balance_B, routing.balance_B, rtol=1e-6)
    np.testing.assert_array_equal(other.load_E, routing.load_E[order])


def test_balance_is_one_where_all_is_even_and_grows_to_the_number_of_experts():
    even_TE = 5.0 * np.eye(E, dtype=np.float32)[np.arange(T) % E]
    crowded_TE = np.zeros((T, E), np.float32)
    crowded_TE[:, 1] = 50.0
    _, _, routing = route(np.stack([even_TE, crowded_TE, np.zeros((T, E), np.float32)]), 1)
    np.testing.assert_allclose(routing.balance_B, [1.0, E, 1.0], rtol=1e-5)
    np.testing.assert_array_equal(routing.load_E, [3 + T, 3 + T, 3, 3])
    random_BTE = 3.0 * np.random.default_rng(0).normal(size=(50, T, E)).astype(np.float32)
    balances = jax.jit(lambda logits_BTE: [moe.route(logits_BTE, k)[2].balance_B for k in range(1, E + 1)])
    for balance_B, k in zip(balances(random_BTE)[:-1], (1, 2, 3), strict=True):
        assert 1.0 < np.mean(balance_B) < E / k
    sharp_B = balances(100.0 * random_BTE)[0]
    assert 1.0 < np.mean(sharp_B) < E and np.min(sharp_B) >= 1.0 - 1e-5
    np.testing.assert_allclose(balances(random_BTE)[-1], 1.0, rtol=1e-5)  # whoever takes all is even


def test_losses_push_towards_balance_and_small_logits():
    logits_BTE = random_logits()
    logits_BTE[..., 0] += 1.0
    push = jax.jit(jax.grad(lambda logits_BTE: jnp.sum(moe.route(logits_BTE, 2)[2].balance_B)))(logits_BTE)
    push_E = np.sum(push, axis=(0, 1))
    assert np.all(push_E[0] > np.abs(push_E[1:]))
    expected_B = np.mean(np.square(logsumexp(logits_BTE, axis=-1)), axis=-1)
    np.testing.assert_allclose(route(logits_BTE, 2)[2].router_z_B, expected_B, rtol=1e-6)


def test_padding_counts_nowhere():
    logits_BTE = random_logits()
    length = 7
    real_BT = np.broadcast_to(np.arange(T)[None] < length, (B, T))
    biased_BTE = logits_BTE.copy()
    biased_BTE[:, length:, 2] += 9.0
    expert_BTK, _, routing = route(biased_BTE, 2, real_BT)
    *_, cut = route(logits_BTE[:, :length], 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), routing, cut)
    assert np.all(np.asarray(expert_BTK)[:, length:] == E)
    *_, empty = route(logits_BTE, 2, np.zeros((B, T), bool), most=1)
    assert all(np.all(np.asarray(leaf) == 0.0) for leaf in empty)


def test_over_capacity_the_first_come_first_and_no_token_looks_ahead():
    logits_BTE = np.zeros((1, T, E), np.float32)
    logits_BTE[..., 1], logits_BTE[..., 2], logits_BTE[:, 3:5, 2] = 9.0, 8.0, 10.0
    changed_BTE = logits_BTE.copy()
    changed_BTE[:, 6:, 3] = 20.0
    (expert_BTK, weight_BTK, routing), later = (
        jax.tree.map(np.asarray, route(logits, 2, most=4)) for logits in (logits_BTE, changed_BTE)
    )
    assert np.all(np.sort(expert_BTK[0, :4]) == [1, 2]) and np.all(expert_BTK[0, 4:] == E)
    assert np.all(weight_BTK[0, 4:] == 0.0) and np.all(weight_BTK[0, :4] > 0.0)
    assert routing.dropped == 2 * (T - 4) and routing.load_E.tolist() == [0, T, T, 0]
    np.testing.assert_array_equal(expert_BTK[:, :6], later[0][:, :6])
    np.testing.assert_array_equal(weight_BTK[:, :6], later[1][:, :6])


@kinds
def test_what_is_dropped_passes_by_and_enough_room_drops_nothing(config):
    layer, x_BTD = layer_of(config), np.broadcast_to(tokens()[:, :1], (B, T, D))  # all tokens want the same
    free = np.asarray(mix(layer, x_BTD, None, 0.0)[0])
    tight, routing = jax.tree.map(np.asarray, mix(layer, x_BTD, None, 0.5))  # 0.5 * 2 * 12 / 4
    np.testing.assert_allclose(tight[:, :3], free[:, :3], atol=1e-6)
    assert np.all(tight[:, 3:] == 0.0) and routing.dropped == 2 * B * (T - 3) and np.min(np.abs(free)) > 1e-4
    roomy, routing = mix(layer, x_BTD, None, E / config.experts_per_token)
    np.testing.assert_allclose(roomy, free, atol=1e-6)
    assert routing.dropped == 0


@pytest.mark.parametrize(
    ("config", "rows", "length"),
    [
        (MIXTRAL, 1, 1),
        (MIXTRAL, 2, 5),
        (GPT, 4, 5),
        pytest.param(GPT, 1, 1, marks=pytest.mark.exhaustive),
        pytest.param(GPT, 2, 5, marks=pytest.mark.exhaustive),
        pytest.param(MIXTRAL, 4, 5, marks=pytest.mark.exhaustive),
    ],
    ids=["gated-1", "gated-2", "with biases-4", "with biases-1", "with biases-2", "gated-4"],
)
def test_rows_that_devices_cannot_share_are_read_by_all_of_them(config, rows, length):
    layer, mesh = layer_of(config), make_mesh(Config(mesh=MeshConfig(data=1, expert=4, tensor=2)))
    x_BTD = tokens()
    alone = np.asarray(mix(layer, x_BTD, None, 0.0)[0])[:rows, :length]
    with jax.set_mesh(mesh):
        found, _ = mix(layer, x_BTD[:rows, :length], None, 0.0)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_a_shared_expert_is_added_for_every_token():
    model = random_model(replace(MIXTRAL, shared_experts=2))

    @jax.jit
    def outputs(model, x_BTD):
        block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
        return block._mlp(x_BTD, None, 0.0)[0], block.mlp(x_BTD, None, 0.0)[0] + block.shared(x_BTD)

    assert model.blocks.shared.up.w.shape == (2, D, 2 * F)
    out_BTD, expected = outputs(model, tokens())
    np.testing.assert_allclose(out_BTD, expected, atol=1e-6)


@one_kind
def test_packed_documents_equal_documents_alone(config):
    model, ids_BT = random_model(config), random_ids(1)
    places_T = np.arange(T)
    segments_BT = np.where(places_T < 5, 1, np.where(places_T < 10, 2, 0))[None]
    packed = np.asarray(
        read(model, ids_BT, np.where(segments_BT == 2, places_T[None] - 5, places_T[None]), segments_BT)
    )
    for first, last in ((0, 5), (5, 10)):
        np.testing.assert_allclose(packed[:, first:last], read(model, ids_BT[:, first:last]), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "unstacked"),
    [
        (GPT, False),
        (MIXTRAL, True),
        pytest.param(GPT, True, marks=pytest.mark.exhaustive),
        pytest.param(MIXTRAL, False, marks=pytest.mark.exhaustive),
    ],
    ids=["with biases", "gated-unstacked", "with biases-unstacked", "gated"],
)
def test_what_is_read_with_a_cache_equals_what_is_read_as_a_whole(config, unstacked):
    model, ids_BT = random_model(config), random_ids(2)
    whole = np.asarray(read(model, ids_BT))
    zeros = np.zeros((2, 2, T, 2, D // 2), np.float32)
    model.config = replace(config, expert_capacity=0.25)  # whoever writes drops nothing
    cache = KeyValues(zeros, zeros)
    if unstacked:
        model, cache = jax.jit(lambda model: model.unstacked())(model), [KeyValues(z, z) for z in zeros]
    write = jax.jit(type(model).with_cache)
    for first, last in [(0, 6), (6, T)]:
        positions_BT = np.arange(first, last)[None].repeat(2, axis=0)
        mask_BTS = np.arange(T)[None, None] <= positions_BT[:, :, None]
        x_BTD, cache = write(model, ids_BT[:, first:last], positions_BT, cache, np.int32(first), mask_BTS)
        np.testing.assert_allclose(x_BTD, whole[:, first:last], atol=1e-4)


@pytest.mark.parametrize(("family", "scan"), [("decoder", False), ("encoder", True), ("encoder_decoder", True)])
def test_every_layer_of_every_family_tells_how_it_sent_its_tokens(family, scan):
    config = replace(GPT, family=family, scan_layers=scan, num_decoder_layers=3 if family == "encoder_decoder" else 2)
    model, ids_BT = random_model(config, "masked"), random_ids(B)
    segments_BT = (np.arange(T)[None] < np.array([[T], [5], [9]])) * 1
    batch = Batch(ids_BT, ids_BT, np.ones((B, T), np.float32), segments_BT=segments_BT)
    layers, words = 2, T + 5 + 9
    if family == "encoder_decoder":
        batch, layers = batch._replace(source_BS=ids_BT, source_segments_BS=segments_BT), 5

    @jax.jit
    def routing_and_metrics(model, batch):
        _, routing = model.features_and_routing(batch, backend=attention.XLA)
        return routing, losses.routing_metrics(losses.routing(routing, batch.weights_BT), jnp.float32(B * T))

    routing, metrics = jax.tree.map(np.asarray, routing_and_metrics(model, batch))
    assert routing.balance_B.shape == routing.router_z_B.shape == (layers, B) and routing.dropped.shape == (layers,)
    np.testing.assert_array_equal(np.sum(routing.load_E, axis=-1), np.full(layers, 2 * words))
    assert metrics["balance_loss"] == pytest.approx(np.mean(routing.balance_B), rel=1e-5)
    assert metrics["expert_load"] == pytest.approx(np.mean(np.max(routing.load_E, axis=1)) / (2 * words / E))


def test_a_model_without_experts_has_none_of_this():
    config, batch = replace(GPT, num_experts=0), Batch(jnp.zeros((1, T), jnp.int32), None, None)
    find = lambda: build_model(config, jax.random.key(0)).features_and_routing(batch, backend=attention.XLA)
    assert jax.eval_shape(find)[1] is None
