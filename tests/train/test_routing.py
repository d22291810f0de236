"""Experts in training: the same on every mesh and in any number of parts, each on its own devices."""

import math

import jax
import numpy as np
import pytest
from test_train_step import B, batch, batch_of, changed, distance, fresh_run, fresh_state, host

from lslm_jax.config.validation import validate
from lslm_jax.models import attention
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train import optimizers, train_step
from lslm_jax.train.train_state import divide, init_state

MIXTRAL = validate(
    changed(
        model={"num_experts": 4, "gated": True, "bias": False, "positions": "rotary", "norm": "rmsnorm", "d_ff": 48},
        train={"steps": 20, "router_z_loss": 1e-2, "balance_loss": 0.1},
    )
)
WITH_BIAS = validate(
    changed(
        MIXTRAL,  # and scanned, to compile faster
        model={"gated": False, "bias": True, "shared_experts": 1, "expert_capacity": 1.0, "scan_layers": True},
    )
)
NAMES = ("balance_loss", "router_z_loss", "expert_load", "dropped")


def test_a_step_tells_how_it_sent_its_tokens():
    run, model, rows = fresh_run(WITH_BIAS), fresh_state(WITH_BIAS).model, batch()
    find = jax.jit(lambda model, rows: model.features_and_routing(rows, backend=attention.XLA)[1])
    routing = host(find(model, rows))
    metrics = run.step(rows)
    row_B = rows.weights_BT.sum(axis=1)
    for name, of_row_LB in [("balance_loss", routing.balance_B), ("router_z_loss", routing.router_z_B)]:
        expected = np.sum(row_B * np.mean(of_row_LB, axis=0)) / row_B.sum()
        assert metrics[name] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["dropped"] == pytest.approx(float(np.sum(routing.dropped)) / (2 * 2 * 13 * B))
    assert 0 < metrics["dropped"] < 0.5 and 1 < metrics["expert_load"] < 4


CONFIGS = {"dropless": MIXTRAL, "shared, with biases and a capacity": WITH_BIAS}
MESHES = [{"expert": 4}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 4}, {"expert": 2, "tensor": 2}]
MESHES += [{"context": 2, "expert": 2, "fsdp": 2}, {"data": 8}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("dropless", [{"data": 2, "expert": 2, "tensor": 2}]),
        ("shared, with biases and a capacity", [{"context": 2, "expert": 2, "fsdp": 2}]),
        *(pytest.param(name, MESHES, marks=pytest.mark.exhaustive) for name in CONFIGS),
    ],
)
def test_twenty_steps_give_the_same_losses_on_every_mesh(name, meshes):
    config = CONFIGS[name]
    found, states = [], []
    print("\nmesh   loss at 1    loss at 20   largest difference of loss   of weights")
    for sizes in [{}, *meshes]:
        run = fresh_run(changed(config, mesh={"data": 1} | sizes), math.prod(sizes.values()))
        found.append([run.step(batch_of(config, i % 5)) for i in range(20)])
        states.append(host(run.state.model))
        losses = np.array([[metrics["loss"] for metrics in each] for each in (found[-1], found[0])])
        apart, weights = np.max(np.abs(losses[0] - losses[1])), distance(states[-1], states[0])
        print(f"{sizes!s:>40} {losses[0, 0]:.6f} {losses[0, -1]:.6f} {apart:.1e} {weights:.1e}")
        assert apart < 1e-5
        for metric in NAMES:
            assert found[-1][0][metric] == pytest.approx(found[0][0][metric], rel=1e-5)
    assert losses[1, -1] < losses[1, 0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        [({"expert": 4, "tensor": 2}, 4)],
        pytest.param(
            [({}, 4), ({"fsdp": 2, "expert": 4}, 1), ({"expert": 2, "tensor": 2}, 2)], marks=pytest.mark.exhaustive
        ),
    ],
)
def test_the_gradient_does_not_depend_on_the_mesh_nor_on_parts(others):
    model, key, rows = host(fresh_state(WITH_BIAS).model), jax.random.key(0), batch()
    results = []
    for sizes, parts in [({}, 1), *others]:
        config = changed(WITH_BIAS, mesh={"data": 1} | sizes, train={"accumulate": parts})
        mesh = make_mesh(config, jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            gradient = jax.jit(lambda *args, c=config: train_step.accumulate_gradients(c, attention.XLA, *args))
            results.append(host(gradient(*divide(config, model), rows, key)))
    for gradient, sums, routing in results[1:]:
        assert distance(gradient, results[0][0]) < 1e-5
        np.testing.assert_allclose(sums, results[0][1], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), routing, results[0][2])


def test_no_device_holds_all_experts_nor_their_moments():
    config = changed(MIXTRAL, mesh={"data": 1, "fsdp": 2, "expert": 4})
    mesh, optimizer = make_mesh(config), optimizers.make_optimizer(config.optimizer, 20)
    state = init_state(config, optimizer, mesh)
    adam = state.optimizer[1][0]
    for tree in (state.model, adam.mu, adam.nu):
        for part in (tree.blocks.mlp.up, tree.blocks.mlp.gate, tree.blocks.mlp.down):
            w_LEDF = part.w.get_value()
            assert w_LEDF.addressable_shards[0].data.shape[:2] == (2, 1)
            assert w_LEDF.addressable_shards[0].data.size * 8 == w_LEDF.size


def test_what_routing_costs_is_in_the_objective_and_in_its_gradient():
    scanned = changed(MIXTRAL, model={"scan_layers": True})
    model, key = fresh_state(scanned).model, jax.random.key(0)

    def found(balance, z):
        config = changed(scanned, train={"balance_loss": balance, "router_z_loss": z})
        gradients = jax.jit(lambda *args: train_step.accumulate_gradients(config, attention.XLA, *args))
        return host(gradients(*divide(config, model), batch(), key))

    plain_gradient, plain, routing = found(0.0, 0.0)
    gradient, sums, _ = found(0.5, 0.25)
    expected = plain.objective + 0.5 * routing.balance + 0.25 * routing.router_z
    assert sums.objective == pytest.approx(float(expected), rel=1e-6) and sums.nll == pytest.approx(float(plain.nll))
    assert distance(gradient.blocks.mlp.router, plain_gradient.blocks.mlp.router) > 0.1
