"""Training in stages: the same as on one device, each stage with its own layers, which never leave it."""

import functools
import re

import jax
import numpy as np
import pytest
from test_step import FAMILIES, Run, batch_of, changed, distance, host

STEPS = 20
EIGHT = {"num_layers": 8, "num_decoder_layers": 8}


@functools.cache
def trained(family, mesh=(), model=()):
    """A run of so many steps with eight layers a stack, and its losses."""
    config = changed(FAMILIES[family], mesh=dict(mesh), model=EIGHT | dict(model))
    run = Run(config, int(np.prod([size for _, size in mesh])))
    return run, [run.step(batch_of(config, i % 5))["loss"] for i in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh", "model"),
    [
        ("decoder", {"stage": 2}, {}),
        ("decoder", {"stage": 4}, {"microbatches": 8, "remat": "full"}),
        ("decoder", {"stage": 2}, {"pipeline_rounds": 2, "remat": "dots"}),
        ("decoder", {"data": 2, "stage": 2}, {}),
        ("decoder", {"fsdp": 2, "stage": 2}, {"pipeline_rounds": 4}),
        ("decoder", {"tensor": 2, "stage": 2}, {}),
        ("encoder", {"stage": 2}, {}),
        ("encoder_decoder", {"stage": 2}, {}),
    ],
)
def test_stages_learn_what_one_device_learns(family, mesh, model):
    alone, losses = trained(family)
    run, staged_losses = trained(family, tuple(mesh.items()), tuple(model.items()))
    assert np.max(np.abs(np.subtract(staged_losses, losses))) < 1e-5
    assert losses[-1] < losses[0] - 0.5
    # What momentum has gathered of all gradients so far.
    for mine, theirs in [(run.state.model, alone.state.model), (run.state.optimizer, alone.state.optimizer)]:
        assert distance(mine, theirs) < 1e-5


@pytest.mark.slow
def test_a_stage_holds_its_own_layers_and_passes_on_nothing_but_a_part_of_the_batch():
    run, _ = trained("decoder", (("stage", 2),))
    adam = run.state.optimizer[1][0]
    for blocks in (run.state.model.blocks, adam.mu.blocks, adam.nu.blocks):
        for leaf in jax.tree.leaves(blocks):
            assert [shard.data.shape for shard in leaf.addressable_shards] == [(4, *leaf.shape[1:])] * 2
    text = run.compiled.as_text()
    moved = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text
    )
    assert {name for _, name in moved} == {"collective-permute", "all-reduce"}
    # A part is 2 rows of 16 tokens, all parts are 8; the losses, and the gradient of what is before, are of all.
    passed = {shape.partition("{")[0] for shape, name in moved if name == "collective-permute"}
    assert passed == {"f32[2,16,32]", "s32[2,16]", "f32[1,8,2,16,32]"}
    summed = " ".join(shape for shape, name in moved if name == "all-reduce")
    assert set(re.findall(r"\w+\[[\d,]*\]", summed)) <= {"f32[]", "f32[8,2,16,32]", "f32[1,8,2,16,32]"}


@pytest.mark.slow
def test_equal_runs_with_dropout_are_equal():
    runs = [Run(changed(mesh={"stage": 2}, model={"dropout": 0.3}), 2) for _ in range(2)]
    losses = [[run.step(batch_of(run.config, i))["loss"] for i in range(3)] for run in runs]
    assert losses[0] == losses[1]
    jax.tree.map(np.testing.assert_array_equal, *(host(run.state.model) for run in runs))
