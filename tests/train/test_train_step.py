"""One step of training: the same on every mesh and in any number of parts, and harmless where the batch is poison."""

import functools
import math
from dataclasses import replace
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention
from lslm_jax.models.layers import Linear
from lslm_jax.parallel.sharding import make_mesh, to_global
from lslm_jax.resilience import deterministic_step
from lslm_jax.train import optimizers
from lslm_jax.train import train_step as step
from lslm_jax.train.train_state import abstract_state, divide, evaluated_model, init_state, num_parameters

B, T, V = 16, 16, 120
CONFIG = validate(
    Config(
        model=ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=V, max_length=T),
        data=DataConfig(source="synthetic", seq_len=T),
        train=TrainConfig(steps=50, batch_size=B, loss_chunk=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        mesh=MeshConfig(data=1),
    )
)


def changed(config=CONFIG, **sections):
    """The config with keys of its sections changed: changed(train={"ema": 0.9})."""
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


FAMILIES = {
    "decoder": CONFIG,
    # Scanned layers compile faster; those of a decoder on one device, or on the data axis alone, are unrolled.
    "encoder": changed(
        model={"family": "encoder", "norm_place": "after", "scan_layers": True}, task={"objective": "masked"}
    ),
    "encoder_decoder": changed(
        model={"family": "encoder_decoder", "positions": "relative", "norm": "rmsnorm", "gated": True, "bias": False}
        | {"scan_layers": True},
        data={"source_len": T},
        task={"objective": "seq2seq"},
    ),
}


def batch_of(config, seed=0):
    """What the family of a config reads: `batch`, with places for its targets, or with a source."""
    rows, rng = batch(seed), np.random.default_rng(100 + seed)
    if config.model.family == "encoder":
        places_BP = rng.permuted(np.arange(13, dtype=np.int32)[None].repeat(B, axis=0), axis=1)[:, :4]
        return rows._replace(targets_BT=rows.targets_BT[:, :4], weights_BT=rows.weights_BT[:, :4], places_BP=places_BP)
    if config.model.family == "encoder_decoder":
        source_BS = rng.integers(0, V, (B, T), np.int32)
        segments_BS = np.where(np.arange(T) < 9, 1, 2)[None].repeat(B, axis=0).astype(np.int32)
        return rows._replace(source_BS=source_BS, source_segments_BS=segments_BS)
    return rows


def batch(seed=0, poison=False):
    """Packed rows of two documents and padding, a few tokens of which weigh little or nothing."""
    rng = np.random.default_rng(seed)
    segments_BT = np.where(np.arange(T) < 7, 1, np.where(np.arange(T) < 13, 2, 0))[None].repeat(B, axis=0)
    weights_BT = rng.choice([0.0, 0.1, 1.0, 1.0], (B, T)) * (segments_BT > 0)
    if poison:
        weights_BT[3, 4] = np.nan
    return Batch(
        tokens_BT=rng.integers(0, V, (B, T), np.int32),
        targets_BT=rng.integers(0, V, (B, T), np.int32),
        weights_BT=weights_BT.astype(np.float32),
        segments_BT=segments_BT.astype(np.int32),
    )


class Run:
    """A state on a mesh, and the compiled step that moves it on."""

    def __init__(self, config=CONFIG, devices=1):
        self.config, self.mesh = config, make_mesh(config, jax.devices()[:devices])
        self.optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
        with jax.set_mesh(self.mesh):
            self.abstract = abstract_state(config, self.optimizer, self.mesh)
            rows = to_global(batch_of(config), self.mesh)
            self.compiled = step.lower(config, self.optimizer, attention.XLA, self.abstract, rows, self.mesh).compile()
        self.restart()

    def restart(self):
        """Puts a copy of the fresh state on the mesh."""
        self.state = placed(self.config, self.abstract)

    def step(self, batch):
        with jax.set_mesh(self.mesh):
            leaves, form = jax.tree.flatten(self.state)
            leaves, metrics = self.compiled(leaves, to_global(batch, self.mesh))
            self.state = form.unflatten(leaves)
        return {name: value.item() for name, value in metrics.items()}


# Keys of the model that change the step but not the fresh weights.
NOT_OF_WEIGHTS = "dropout dtype microbatches pipeline_rounds remat scan_layers".split()


def fresh_arrays(config):
    """The leaves of the fresh state on one device: on a mesh they are the same, but take longer to compile for.

    Configs that begin with the same arrays share them: to make them takes half as long as to compile a step.
    """
    model = replace(config.model, **{name: getattr(CONFIG.model, name) for name in NOT_OF_WEIGHTS})
    optimizer = replace(config.optimizer, offload=False)
    train = replace(CONFIG.train, ema=config.train.ema)
    return _fresh_arrays(replace(CONFIG, model=model, optimizer=optimizer, train=train, task=config.task))


@functools.cache
def _fresh_arrays(config):
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(one_device(config)):  # whatever mesh the first caller is in
        return [np.array(leaf) for leaf in jax.tree.leaves(init_state(config, optimizer, one_device(config)))]


def placed(config, abstract):
    """The fresh state with the shardings of the abstract one. Its arrays are copies, which may be donated."""
    leaves, structure = jax.tree.flatten(abstract)
    arrays = [array.copy() for array in fresh_arrays(config)]
    return structure.unflatten(jax.device_put(arrays, [leaf.sharding for leaf in leaves]))


@functools.cache
def fresh_state(config=CONFIG):
    """The fresh state on one device, not to be donated."""
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    return placed(config, abstract_state(config, optimizer, one_device(config)))


def one_device(config):
    return make_mesh(replace(config, mesh=MeshConfig(data=1)), jax.devices()[:1])


compiled_run = functools.cache(Run)


def fresh_run(config=CONFIG, devices=1):
    """A run from its beginning, compiled once for this file."""
    run = compiled_run(config, devices)
    run.restart()
    return run


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def distance(a, b):
    """Norm of the difference of two trees, relative to the second."""
    pairs = list(zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True))
    total = lambda values: math.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in values))
    return total(x - y for x, y in pairs) / total(y for _, y in pairs)


def moments(state):
    """What Adam has gathered of all gradients, and of their squares, so far."""
    return [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("decoder", (1, 8)),
        ("encoder", (1, 2)),
        ("encoder_decoder", (1, 4)),
        *(pytest.param(family, (1, 2, 4, 8), marks=pytest.mark.exhaustive) for family in FAMILIES),
    ],
)
def test_parts_add_up_to_the_gradient_of_the_whole_however_uneven(family, parts):
    config, key = FAMILIES[family], jax.random.key(0)
    model = fresh_state(config).model
    even = batch_of(config)
    uneven = even._replace(weights_BT=np.float32(np.geomspace(1e-3, 1e3, B)[:, None] * np.ones_like(even.weights_BT)))
    results = []
    for number in parts:
        parted = changed(config, train={"accumulate": number})
        accumulate = jax.jit(functools.partial(step.accumulate_gradients, parted, attention.XLA))
        results.append([accumulate(*divide(parted, model), rows, key) for rows in (even, uneven)])
    for other in results[1:]:
        for (gradient, sums, _), (whole_gradient, whole_sums, _) in zip(other, results[0], strict=True):
            assert distance(gradient, whole_gradient) < 1e-6
            np.testing.assert_allclose(sums, whole_sums, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("decoder", (1, 2)),
        *(pytest.param(family, (1, 2, 8), marks=pytest.mark.exhaustive) for family in FAMILIES),
    ],
)
def test_reproducible_steps_are_the_same_bits_on_any_number_of_devices(family, sizes):
    config = changed(FAMILIES[family], model={"dropout": 0.1, "scan_layers": True})
    config = validate(changed(config, train={"reproducible": True}, mesh={"data": -1}))
    optimizer, curves, weights = optimizers.make_optimizer(config.optimizer, config.train.steps), [], set()
    for devices in sizes:
        mesh = make_mesh(config, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = placed(config, abstract_state(config, optimizer, mesh))
            train_step = deterministic_step.make_step(config, optimizer, attention.XLA, mesh)
            curve = []
            for n in range(4):
                state, metrics = train_step(state, to_global(batch_of(config, n), mesh))
                curve.append({name: value.item() for name, value in metrics.items()})
        curves.append(curve)
        weights.add(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(host(state))))
    assert all(curve == curves[0] for curve in curves) and len(weights) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "steps", "meshes"),
    [
        ("decoder", 50, [(1, 1, 1), (2, 1, 1), (2, 2, 2)]),
        ("encoder", 30, [(1, 1, 1), (1, 2, 2)]),
        ("encoder_decoder", 30, [(1, 1, 1), (1, 2, 2)]),
        pytest.param("decoder", 50, [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 4)], marks=pytest.mark.exhaustive),
        pytest.param("encoder", 50, [(1, 1, 1), (2, 2, 2)], marks=pytest.mark.exhaustive),
        pytest.param("encoder_decoder", 50, [(1, 1, 1), (2, 2, 2)], marks=pytest.mark.exhaustive),
    ],
)
def test_many_steps_give_the_same_losses_on_every_mesh(family, steps, meshes):
    config = FAMILIES[family]
    losses, states = {}, {}
    for sizes in meshes:
        data, fsdp, tensor = sizes
        run = fresh_run(changed(config, mesh={"data": data, "fsdp": fsdp, "tensor": tensor}), math.prod(sizes))
        losses[sizes] = [run.step(batch_of(config, i % 5))["loss"] for i in range(steps)]
        states[sizes] = host(run.state.model)
    print("\ndata x fsdp x tensor   loss at 1    loss at the end   largest difference of loss   of weights")
    for sizes in meshes:
        apart = np.max(np.abs(np.subtract(losses[sizes], losses[1, 1, 1])))
        weights = distance(states[sizes], states[1, 1, 1])
        print(f"{sizes!s:>20} {losses[sizes][0]:11.6f} {losses[sizes][-1]:13.6f} {apart:28.1e} {weights:12.1e}")
        assert apart < 1e-5
    assert losses[1, 1, 1][-1] < losses[1, 1, 1][0] - 1.0


def test_a_poisoned_batch_changes_nothing_but_the_counts():
    run = fresh_run()
    run.step(batch(0))
    before = host(run.state)
    first, second = run.step(batch(1, poison=True)), run.step(batch(2, poison=True))
    assert_same((run.state.model, run.state.optimizer), (before.model, before.optimizer))
    assert (run.state.step, run.state.skipped) == (3, 2)
    assert (first["skipped"], second["skipped"]) == (1, 2)
    assert first["learning_rate"] == second["learning_rate"]
    after = run.step(batch(3))
    assert after["skipped"] == run.state.skipped == 0
    assert after["learning_rate"] == first["learning_rate"]
    assert run.step(batch(4))["learning_rate"] > after["learning_rate"]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(host(run.state)))


@pytest.mark.parametrize(("mesh", "devices"), [({"data": 1}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)])
def test_the_whole_state_is_donated(mesh, devices):
    run = fresh_run(changed(mesh=mesh), devices)
    on_one_device = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    size = sum(on_one_device(leaf) for leaf in jax.tree.leaves(run.state))
    assert run.compiled.memory_analysis().alias_size_in_bytes == size


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        pytest.param({"data": 1}, 1, marks=pytest.mark.exhaustive),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    ],
)
def test_moments_that_wait_in_the_hosts_memory_change_nothing(mesh, devices):
    here, there = (fresh_run(changed(mesh=mesh, optimizer={"offload": offload}), devices) for offload in (False, True))
    for i in range(3):
        assert here.step(batch(i)) == there.step(batch(i))
    assert_same(here.state, there.state)
    places = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert places(there.state.optimizer) == {"pinned_host"} and places(there.state.model) == {"device"}
    assert places(here.state) == {"device"}


def test_weights_moments_and_average_are_born_in_parts():
    config = changed(mesh={"data": 1, "fsdp": 4, "tensor": 2}, train={"ema": 0.9})
    mesh = make_mesh(config)
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    abstract = abstract_state(config, optimizer, mesh)
    state = init_state(config, optimizer, mesh)
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    adam = state.optimizer[1][0]
    for moments in (adam.mu, adam.nu, state.ema):
        for moment, weight in zip(jax.tree.leaves(moments), jax.tree.leaves(state.model), strict=True):
            assert moment.sharding == weight.sharding
    matrices = [leaf for leaf in jax.tree.leaves(adam.mu) if leaf.ndim > 2 or leaf.shape[0] >= V]
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in matrices if 128 in leaf.shape)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_initial_weights_do_not_depend_on_the_mesh():
    alone, optimizer = fresh_state(), optimizers.make_optimizer(CONFIG.optimizer, CONFIG.train.steps)
    config = changed(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert_same(alone, init_state(config, optimizer, make_mesh(config)))
    other = init_state(replace(CONFIG, seed=1), optimizer, make_mesh(CONFIG, jax.devices()[:1]))
    assert distance(other.model, alone.model) > 0.1


def test_the_average_follows_the_weights():
    run = Run(changed(train={"ema": 0.75}, model={"scan_layers": True}))
    assert_same(run.state.ema, run.state.model)
    expected = host(run.state.model)
    for i in range(3):
        run.step(batch(i))
        decay = min(0.75, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, host(run.state.model))
    assert distance(run.state.ema, expected) < 1e-6
    before = host(run.state.ema)
    run.step(batch(3, poison=True))
    assert_same(run.state.ema, before)
    assert evaluated_model(run.state) is run.state.ema
    plain = fresh_state()
    assert evaluated_model(plain) is plain.model


def test_dropout_is_a_function_of_seed_and_step():
    config = changed(model={"dropout": 0.3})
    state, optimizer = fresh_state(config), optimizers.make_optimizer(config.optimizer, 50)

    def loss(seed, at):
        train_step = step.make_train_step(replace(config, seed=seed), optimizer, attention.XLA)
        loss_of = jax.jit(lambda state: train_step(state, batch())[1]["loss"])  # what else a step does is not compiled
        return [loss_of(state._replace(step=np.int32(n))).item() for n in at]

    first, again, later = loss(0, [4, 4, 5])
    assert first == again != later
    assert loss(1, [4])[0] not in (first, later)


def test_metrics_are_sums_over_tokens_divided_once():
    run = fresh_run()
    model, rows = host(run.state.model), batch()
    metrics = run.step(rows)
    evaluate = jax.jit(step.make_eval_step(CONFIG, attention.XLA))
    sums = evaluate(model, rows)
    assert metrics["loss"] == pytest.approx(float(sums.nll / sums.weight), rel=1e-6)
    assert metrics["tokens"] == pytest.approx(float(rows.weights_BT.sum()))
    halves = [evaluate(model, jax.tree.map(lambda a, i=i: a[i::2], rows)) for i in range(2)]
    jax.tree.map(lambda whole, *parts: np.testing.assert_allclose(whole, sum(parts), rtol=1e-6), sums, *halves)
    assert metrics["learning_rate"] == 0.0 and metrics["grad_norm"] > 0.0 and metrics["skipped"] == 0


def test_evaluation_has_neither_dropout_nor_smoothing_nor_z_loss():
    model, rows = fresh_state().model, batch()
    noisy = changed(train={"z_loss": 0.1, "label_smoothing": 0.2}, model={"dropout": 0.5})
    plain, other = (jax.jit(step.make_eval_step(config, attention.XLA))(model, rows) for config in (CONFIG, noisy))
    assert_same(plain, other)
    np.testing.assert_allclose(plain.objective, plain.nll, rtol=1e-6)


def test_a_batch_without_tokens_does_no_harm():
    run = fresh_run()
    metrics = run.step(batch()._replace(weights_BT=np.zeros((B, T), np.float32)))
    assert metrics["loss"] == metrics["tokens"] == metrics["grad_norm"] == metrics["skipped"] == 0.0


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimizerConfig)["name"]))
def test_every_optimizer_counts_the_updates_that_the_schedule_follows(name):
    optimizer = optimizers.make_optimizer(OptimizerConfig(name=name), steps=50)
    params = Linear(jax.random.key(0), {"embed": 6}, {"mlp": 4}, bias=True)
    state = optimizer.init(params)
    assert optimizers.updates_done(state) == 0
    _, state = jax.jit(optimizer.update)(params, state, params)
    assert optimizers.updates_done(state) == 1


def test_the_program_of_scanned_layers_does_not_grow_with_depth():
    lines = {}
    for num_layers in (4, 24):
        config = changed(model={"num_layers": num_layers, "scan_layers": True})
        mesh, optimizer = make_mesh(config, jax.devices()[:1]), optimizers.make_optimizer(config.optimizer, 50)
        train_step = jax.jit(step.make_train_step(config, optimizer, attention.XLA), donate_argnums=0)
        lowered = train_step.lower(abstract_state(config, optimizer, mesh), batch())
        lines[num_layers] = len(lowered.as_text().splitlines())
    assert lines[4] == lines[24]


def test_parameters_are_counted_once_each():
    model = fresh_state().model
    attention_size, mlp_size, norms = 4 * (32 * 32 + 32), 2 * 32 * 128 + 128 + 32, 4 * 32
    assert num_parameters(model) == 128 * 32 + T * 32 + 2 * (attention_size + mlp_size + norms) + 2 * 32


def test_what_the_compiler_is_told_of_a_device_is_left_out_where_it_is_not_known_or_told_otherwise(monkeypatch):
    mesh, lowered = make_mesh(CONFIG, jax.devices()[:1]), jax.jit(lambda x: x + 1).lower(1.0)
    monkeypatch.setattr(step, "_OPTIONS", {"cpu": {"xla_of_another_year": "1"}})
    assert step.compile_for(mesh, lowered)(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_of_mine'"):
        step.compile_for(mesh, lowered, {"xla_of_mine": "1"})
    monkeypatch.setattr(step, "_OPTIONS", {"cpu": {"xla_cpu_enable_fast_math": "maybe"}})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_enable_fast_math"):
        step.compile_for(mesh, lowered)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_cpu_enable_fast_math=false")
    assert step.compile_for(mesh, lowered)(1.0) == 2
