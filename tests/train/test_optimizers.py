"""Schedules at their corners, which weights decay, and AdamW against NumPy."""

import operator
from dataclasses import replace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lslm_jax.config import ModelConfig, OptimizerConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.models import model_configs
from lslm_jax.models.decoder import Decoder
from lslm_jax.models.layers import Linear
from lslm_jax.train import optimizers

NAMES = get_args(get_type_hints(OptimizerConfig)["name"])
GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=16))
LLAMA = replace(model_configs.LLAMA, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=61)
LLAMA = fill_sizes(replace(LLAMA, qk_norm="head"))


def abstract(config):
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


def named(tree, **kwargs):
    """Leaves by the names of the modules that hold them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, **kwargs)
    return {".".join(part.name for part in path if part.name != "value"): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("schedule", "corners"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0, 500: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("rsqrt", {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ("wsd", {0: 0.0, 5: 0.5, 10: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_schedules_pass_through_their_corners(schedule, corners):
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=10, final_ratio=0.1)
    rate = optimizers.schedule(config, steps=110)
    for step, share in corners.items():
        assert rate(step) == pytest.approx(2.0 * share, abs=1e-6), f"step {step}"


@pytest.mark.parametrize("schedule", get_args(get_type_hints(OptimizerConfig)["schedule"]))
def test_schedules_survive_no_warmup_and_a_warmup_longer_than_the_run(schedule):
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=0)
    assert optimizers.schedule(config, steps=1)(0) == pytest.approx(2.0)
    rates = [float(optimizers.schedule(replace(config, warmup_steps=100), steps=5)(step)) for step in range(5)]
    assert rates == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6])


def test_a_warmup_need_not_begin_with_a_step_of_rate_0():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, warmup_from=0.1)
    rates = [float(optimizers.schedule(config, steps=100)(step)) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.65, 1.1, 1.55, 2.0])


@pytest.mark.parametrize(
    ("name", "nesterov"),
    [(name, False) for name in NAMES] + [(name, True) for name in ("sgd", "adam", "adamw", "muon")],
)
def test_every_optimizer_finds_the_bottom_of_a_bowl(name, nesterov):
    rate = {"sgd": 0.3, "adafactor": 0.5, "muon": 0.3}.get(name, 0.05)
    config = OptimizerConfig(
        name=name, learning_rate=rate, schedule="linear", warmup_steps=3, weight_decay=0.0, clip=0.0, nesterov=nesterov
    )
    optimizer = optimizers.make_optimizer(config, steps=60)
    params = Linear(jax.random.key(0), {"embed": 6}, {"mlp": 4}, bias=True)
    target = Linear(jax.random.key(1), {"embed": 6}, {"mlp": 4}, bias=True, std=0.5)

    def loss(params):
        return optax.tree.norm(jax.tree.map(operator.sub, params, target)) ** 2

    def body(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.jit(lambda params: jax.lax.scan(body, (params, optimizer.init(params)), None, 60))(params)
    assert loss(params) < 0.05 * values[0]


MATRICES = "blocks.attention.k.w blocks.attention.o.w blocks.attention.q.w blocks.attention.v.w".split()


@pytest.mark.parametrize(
    ("config", "decayed"),
    [
        (GPT, {*MATRICES, "blocks.mlp.up.w", "blocks.mlp.down.w", "embed"}),
        (LLAMA, {*MATRICES, "blocks.mlp.up.w", "blocks.mlp.gate.w", "blocks.mlp.down.w", "embed", "head"}),
    ],
    ids=["gpt", "llama"],
)
def test_exactly_the_matrices_decay(config, decayed):
    mask = named(optimizers.is_decayed(abstract(config)))
    assert {name for name, decays in mask.items() if decays} == decayed
    kept = {"norm.scale", "blocks.attention_norm.scale", "blocks.mlp_norm.scale"}
    kept |= {"positions", "blocks.attention.q.b", "norm.bias"} if config is GPT else {"blocks.attention.q_norm.scale"}
    assert kept <= {name for name, decays in mask.items() if not decays}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adam"])
def test_decay_shrinks_matrices_and_nothing_else(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = optimizers.make_optimizer(config, steps=10)
    params = Linear(jax.random.key(0), {"embed": 6}, {"mlp": 4}, bias=True)
    params.b.set_value(jnp.ones(4))
    zero = jax.tree.map(np.zeros_like, params)
    update = lambda zero, params: optimizer.update(zero, optimizer.init(params), params)[0]
    updates = jax.jit(update)(zero, params)
    np.testing.assert_array_equal(updates.b.get_value(), 0.0)
    ratio = np.asarray(updates.w.get_value() / params.w.get_value())
    assert np.all(ratio < 0) and np.ptp(ratio) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_moments_take_the_type_asked_for(name, dtype):
    optimizer = optimizers.make_optimizer(OptimizerConfig(name=name, moment_dtype=dtype), steps=10)
    params = abstract(LLAMA)
    state = jax.eval_shape(optimizer.init, params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim} == {dtype}
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(updates)} == {"float32"}


def test_what_is_too_small_for_a_short_moment_adds_up_all_the_same():
    config = OptimizerConfig(moment_dtype="bfloat16", b1=0.99, b2=0.999, clip=0.0)
    optimizer = optimizers.make_optimizer(config, steps=400)
    params = Linear(jax.random.key(0), {"embed": 64}, {"mlp": 64}, bias=False)
    gradient = jax.tree.map(jnp.ones_like, params)
    body = lambda state, _: (optimizer.update(gradient, state, params)[1], None)
    state = jax.jit(lambda: jax.lax.scan(body, optimizer.init(params), None, 400)[0])()
    for name, decay in {"mu": 0.99, "nu": 0.999}.items():
        moment = np.asarray(optax.tree.get(state, name).w.get_value(), np.float32)
        # Rounded to the nearest, the second would stand still near 0.25: a thousandth of the rest is half a place.
        assert moment.mean() == pytest.approx(1 - decay**400, rel=2e-3) and moment.std() > 0


def test_rounding_at_random_is_right_on_average_and_keeps_what_needs_none():
    round_at_random = jax.jit(optimizers._round_at_random)
    for x, below, above in [(1.001, 1.0, 1.0078125), (-1.006, -1.0078125, -1.0), (3e-38, 0, 1)]:
        rounded = np.asarray(round_at_random(np.full(100_000, x, np.float32), jax.random.key(1)), np.float32)
        assert rounded.min() >= below and rounded.max() <= above and len(np.unique(rounded)) == 2
        assert rounded.mean() == pytest.approx(x, rel=1e-4)
    exact = np.array([0.0, -0.0, 1.0, -2.5, 1e30, np.inf, -np.inf, np.nan], jnp.bfloat16)
    kept = np.asarray(round_at_random(exact.astype(np.float32), jax.random.key(0)))
    np.testing.assert_array_equal(kept.view(np.uint16), exact.view(np.uint16))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_short_moments_lead_to_about_the_same_weights(name):
    def trained(dtype):
        optimizer = optimizers.make_optimizer(OptimizerConfig(name=name, moment_dtype=dtype, warmup_steps=0), steps=50)

        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(operator.sub, params, target), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda params: jax.lax.scan(body, (params, optimizer.init(params)), None, 50)[0][0])
        return np.asarray(run(params).w.get_value())

    params, target = (Linear(jax.random.key(seed), {"embed": 16}, {"mlp": 16}, bias=False) for seed in (0, 1))
    before = np.asarray(params.w.get_value())
    full, short = trained("float32") - before, trained("bfloat16") - before
    assert np.linalg.norm(short - full) < 0.02 * np.linalg.norm(full)


def test_muon_knows_the_inputs_and_outputs_of_every_projection():
    numbers = named(optimizers._matrices(abstract(LLAMA)), is_leaf=lambda x: isinstance(x, tuple) or x is None)
    axes = {name: (n.reduction_axis, n.output_axis) for name, n in numbers.items() if n is not None}
    assert axes == {
        "blocks.attention.q.w": ((1,), (2, 3)),
        "blocks.attention.k.w": ((1,), (2, 3)),
        "blocks.attention.v.w": ((1,), (2, 3)),
        "blocks.attention.o.w": ((1, 2), (3,)),
        "blocks.mlp.up.w": ((1,), (2,)),
        "blocks.mlp.gate.w": ((1,), (2,)),
        "blocks.mlp.down.w": ((1,), (2,)),
    }


def test_muon_takes_each_expert_for_a_matrix_of_its_own():
    config = replace(LLAMA, num_experts=4)
    numbers = named(optimizers._matrices(abstract(config)), is_leaf=lambda x: isinstance(x, tuple) or x is None)
    axes = {name: (n.reduction_axis, n.output_axis) for name, n in numbers.items() if n and ".mlp." in name}
    experts = {f"blocks.mlp.{part}.w": ((2,), (3,)) for part in ("up", "gate", "down")}
    assert axes == experts | {"blocks.mlp.router.w": ((1,), (2,))}


def test_muon_makes_each_layers_update_orthogonal():
    config = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
    optimizer = optimizers.make_optimizer(config, steps=10)
    rng = np.random.default_rng(0)
    draw = lambda leaf: np.float32(rng.normal(size=leaf.shape))
    params, gradient = jax.tree.map(draw, abstract(LLAMA)), jax.tree.map(draw, abstract(LLAMA))
    update = lambda gradient, params: optimizer.update(gradient, optimizer.init(params), params)[0]
    updates = jax.jit(update)(gradient, params)
    q = updates.blocks.attention.q.w.get_value().reshape(2, 32, 32)
    o = updates.blocks.attention.o.w.get_value().reshape(2, 32, 32)
    for matrix in [*q, *o, *updates.blocks.mlp.up.w.get_value()]:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert np.quantile(singular, 0.1) > 0.5 * singular.max()  # Newton-Schulz stops near 1, and short of it for few
        assert 0.1 < np.sqrt(np.mean(np.square(matrix))) < 0.3


def test_adamw_equals_its_formula():
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.3, clip=0.5, eps=1e-6, b1=0.8, b2=0.9)
    optimizer = optimizers.make_optimizer(config, steps=8)
    rate = optimizers.schedule(config, steps=8)
    params = Linear(jax.random.key(0), {"embed": 6}, {"mlp": 4}, bias=True)
    values = {name: np.asarray(leaf, np.float64) for name, leaf in named(params).items()}
    first, second = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    state, rng = jax.jit(optimizer.init)(params), np.random.default_rng(0)

    @jax.jit
    def moved(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(5):
        gradient = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
        params, state = moved(gradient, state, params)
        gradients = {name: np.asarray(leaf, np.float64) for name, leaf in named(gradient).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        for name, g in gradients.items():
            g = g * min(1.0, 0.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            step = first[name] / (1 - 0.8 ** (t + 1)) / (np.sqrt(second[name] / (1 - 0.9 ** (t + 1))) + 1e-6)
            decay = 0.3 * values[name] if name == "w" else 0.0
            values[name] = values[name] - float(rate(t)) * (step + decay)
    for name, leaf in named(params).items():
        np.testing.assert_allclose(leaf, values[name], atol=1e-6)
