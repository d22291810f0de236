"""Training some of the parameters: adapters, heads, upper layers faster than lower ones; the rest stays bit for bit."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TaskConfig, TrainConfig
from lslm_jax.config.mesh_axes import mesh_axes
from lslm_jax.config.validation import validate
from lslm_jax.data.dataloader import SyntheticInput
from lslm_jax.errors import ConfigError
from lslm_jax.models import attention, lora
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh, to_global
from lslm_jax.runtime.pytree import flatten, unflatten
from lslm_jax.train import train_step
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import State, abstract_model, abstract_state, divide, init_state, num_parameters

B, T, V, L = 8, 16, 120, 2


def run_of(family="decoder", objective="causal", model=None):
    sizes = {"num_layers": L, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": V, "max_length": T}
    config = Config(
        model=ModelConfig(family=family, positions="rotary", gated=True, **sizes | (model or {})),
        data=DataConfig(source="synthetic", seq_len=T),
        task=TaskConfig(objective=objective),
        train=TrainConfig(steps=50, batch_size=B),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"),
        mesh=MeshConfig(data=1),
    )
    return validate(config)


DECODER = run_of()
# Scanned layers compile faster; those of the decoder are unrolled.
ENCODER = run_of("encoder", "classification", {"num_labels": 3, "norm_place": "after", "scan_layers": True})
PAIRS = run_of("encoder_decoder", "seq2seq", {"scan_layers": True})
families = pytest.mark.parametrize("config", [DECODER, ENCODER, PAIRS], ids=["decoder", "encoder", "pairs"])


def with_adapters(config, **keys):
    return validate(replace(config, model=replace(config.model, lora_rank=4, **keys)))


def adapted(config):
    """A config with adapters and an average, which most tests here share, since each takes long to compile for."""
    return with_adapters(replace(config, train=replace(config.train, ema=0.9)))


def mesh_of(config):
    return make_mesh(config, jax.devices()[: math.prod(mesh_axes(config.mesh).values())])


@functools.cache
def fresh(config) -> State:
    """The state on one device that a run begins with."""
    return init_state(config, make_optimizer(config.optimizer, config.train.steps), mesh_of(config))


@functools.cache
def trained(config, steps=3) -> tuple[State, State, list[float]]:
    """The state before and after some steps, and their losses."""
    mesh, optimizer = mesh_of(config), make_optimizer(config.optimizer, config.train.steps)
    data = SyntheticInput(config, V)
    before = state = fresh(replace(config, mesh=MeshConfig(data=1)))  # on one device: not within the mesh
    with jax.set_mesh(mesh):
        if mesh.size > 1:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
            state = jax.device_put(before, shardings)
        one = jax.jit(train_step.make_train_step(config, optimizer, attention.XLA))
        losses = []
        for n in range(steps):
            state, metrics = one(state, to_global(data.batch(n), mesh))
            losses.append(float(metrics["loss"]))
    return before, state, losses


@functools.cache
def built(config):
    """The model that a run begins with, made without its state."""
    return jax.jit(lambda: build_model(config.model, jax.random.key(config.seed), config.task.objective))()


def moved(before, after) -> set[str]:
    """Names of the parameters that are not what they were."""
    old, new = flatten(before), flatten(after)
    return {name for name in old if not np.array_equal(old[name], new[name])}


@families
def test_with_adapters_all_else_but_the_head_stays_bit_for_bit(config):
    before, after, losses = trained(adapted(config))
    adapters = {name for name in flatten(before.model) if ".lora." in name}
    heads = {name for name in flatten(before.model) if name.startswith("top.")}
    assert moved(before.model, after.model) == adapters | heads
    assert moved(before.ema, after.ema) == adapters | heads
    assert losses[-1] != losses[0]
    moments = [name.partition(".mu.")[2] for name in flatten(after.optimizer) if ".mu." in name]
    assert set(moments) == adapters | heads, "what is not trained has no moments"


@families
def test_adapters_begin_as_nothing_and_merged_they_say_the_same(config):
    before, after, _ = trained(adapted(config))
    plain, base = flatten(built(config)), flatten(before.model)
    base = {name: array for name, array in base.items() if ".lora." not in name}
    assert base.keys() == plain.keys()
    assert all(np.array_equal(array, base[name]) for name, array in plain.items())

    batch = SyntheticInput(config, V).batch(0)
    features = jax.jit(lambda model: model.features(batch, backend=attention.XLA))
    plain_features, after_features = np.asarray(features(built(config))), np.asarray(features(after.model))
    np.testing.assert_array_equal(features(before.model), plain_features)

    model = adapted(config).model
    scale = model.lora_alpha / model.lora_rank
    arrays = flatten(after.model)
    merged = lora.merge({name: scale * a if name.endswith(".lora.b") else a for name, a in arrays.items()})
    merged = unflatten(abstract_model(config, mesh_of(config)), merged)
    assert np.abs(after_features - plain_features).max() > 1e-3
    np.testing.assert_allclose(after_features, features(merged), atol=1e-5)


def test_adapters_stand_where_the_patterns_say():
    config = with_adapters(DECODER, lora_targets=("attention.[qv]", "mlp.down"))
    names = flatten(abstract_model(config, mesh_of(config)))
    with_adapter = {name.removesuffix(".lora.a") for name in names if name.endswith(".lora.a")}
    assert with_adapter == {"blocks.attention.q", "blocks.attention.v", "blocks.mlp.down"}
    with pytest.raises(ConfigError, match=r"model.lora_targets=query names no projection: there are attention.q, "):
        with_adapters(DECODER, lora_targets=("query",))


@pytest.mark.parametrize(
    "config",
    [DECODER, ENCODER, pytest.param(PAIRS, marks=pytest.mark.exhaustive)],
    ids=["decoder", "encoder", "pairs"],
)
def test_adapters_learn_the_same_on_a_mesh(config):
    config = adapted(config)
    split = replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(trained(split)[2], trained(config)[2], atol=1e-5)


def with_frozen(config, *patterns):
    return replace(config, train=replace(config.train, frozen=patterns))


LAST_PATTERN_COUNTS = with_frozen(ENCODER, "*", "!top.*", "top.pooler.*")
LOWER_PARTS = with_frozen(ENCODER, "embed", "blocks.attention.*")
ADAPTERS_AND_MORE = with_frozen(with_adapters(DECODER), "embed", "blocks.*.w")


def names_to_train(config) -> set[str]:
    """Names of the parameters that are trained, and have a gradient."""
    return set(flatten(divide(config, abstract_model(config, mesh_of(config)))[0]))


def test_frozen_patterns_are_read_in_order_and_the_last_one_that_fits_counts():
    before, after, _ = trained(LAST_PATTERN_COUNTS)
    assert moved(before.model, after.model) == {"top.head", "top.bias"} == names_to_train(LAST_PATTERN_COUNTS)
    names = set(flatten(abstract_model(LOWER_PARTS, mesh_of(LOWER_PARTS))))
    still = {name for name in names if name == "embed" or name.startswith("blocks.attention.")}
    assert names_to_train(LOWER_PARTS) == names - still


def test_adapters_are_trained_with_whatever_frozen_says_instead_of_the_default():
    names = names_to_train(ADAPTERS_AND_MORE)
    assert {"norm.scale", "blocks.attention.q.lora.a", "blocks.attention.q.b"} <= names
    assert not {"embed", "blocks.attention.q.w"} & names


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [LOWER_PARTS, ADAPTERS_AND_MORE], ids=["lower parts", "adapters and more"])
def test_what_frozen_leaves_to_train_moves_and_nothing_else(config):
    before, after, _ = trained(config)
    assert moved(before.model, after.model) == names_to_train(config)


@pytest.mark.parametrize(
    ("frozen", "complaint"),
    [
        (("emb",), r"train.frozen=emb names no parameter: there are blocks.attention.k.b, "),
        (("*",), r"train.frozen=\* leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(frozen, complaint):
    config = replace(DECODER, train=replace(DECODER.train, frozen=frozen))
    with pytest.raises(ConfigError, match=complaint):
        divide(config, abstract_model(config, mesh_of(config)))


@families
def test_lower_layers_move_less_by_the_same_factor_each(config):
    """SGD without momentum moves each parameter by its gradient: what the decay makes of it is a ratio."""
    plain = replace(config, optimizer=replace(config.optimizer, name="sgd", b1=0.0, clip=0.0, weight_decay=0.0))
    decayed = replace(plain, optimizer=replace(plain.optimizer, layer_decay=0.5))
    model, batch = built(config), SyntheticInput(config, V).batch(0)

    def model_after(config, gradients):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = State(0, model, optimizer.init(divide(config, model)[0]), None, 0)
        return train_step.apply_gradients(config, optimizer, state, *gradients)[0].model

    @jax.jit
    def both(model):
        key = jax.random.key(0)
        gradients = train_step.accumulate_gradients(plain, attention.XLA, *divide(plain, model), batch, key)
        return model_after(plain, gradients), model_after(decayed, gradients)

    old, full, less = (flatten(model) for model in (model, *both(model)))
    for name in old:
        moves, fewer = full[name] - old[name], less[name] - old[name]
        shares = np.float32([0.25, 0.5]) if "blocks." in name else np.float32([0.125])
        if name.split(".")[-2:-1] == ["norm"] or name.startswith(("top.", "head")):
            shares = np.float32([1.0])
        expected = moves * shares.reshape(-1, *[1] * (moves.ndim - 1))
        np.testing.assert_allclose(fewer, expected, atol=2e-6, err_msg=name)


def test_both_halves_together_are_the_model():
    config = adapted(DECODER)
    model = fresh(config).model
    few, rest = divide(config, model)
    assert num_parameters(few) + num_parameters(rest) == num_parameters(model)
    assert num_parameters(few) == sum(a.size for name, a in flatten(model).items() if ".lora." in name)
