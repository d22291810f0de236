"""Training in stages: the same as on one device, each stage with its own layers, which never leave it."""

import functools
import re

import jax
import numpy as np
import pytest
from test_train_step import FAMILIES, Run, batch_of, changed, distance, host, moments

STEPS = 8
LAYERS = {
    "decoder": {"num_layers": 4},
    "encoder": {"num_layers": 4},
    "encoder_decoder": {"num_layers": 2, "num_decoder_layers": 2},
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "num_layers": 2}


@functools.cache
def trained(family, mesh, model):
    """A run of so many steps with several layers a stage, and its losses."""
    # Layers are scanned: several of them unrolled, on one device, take four times as long to compile for.
    model = LAYERS[family] | {"scan_layers": True} | dict(model)
    # So many layers that learn faster than this magnify the last bits of what they learn from, on any mesh.
    config = changed(FAMILIES[family], optimizer={"learning_rate": 3e-3}, mesh=dict(mesh), model=model)
    run = Run(config, int(np.prod([size for _, size in mesh])))
    return run, [run.step(batch_of(config, i % 2))["loss"] for i in range(STEPS)]


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh", "model"),
    [
        ("decoder", {"stage": 2}, {}),
        ("decoder", {"data": 2, "stage": 4}, {"microbatches": 8, "remat": "full"}),
        ("decoder", {"fsdp": 2, "tensor": 2, "stage": 2}, {"pipeline_rounds": 2, "remat": "dots"}),
        ("decoder", {"expert": 2, "stage": 2}, EXPERTS),
        ("encoder_decoder", {"stage": 2}, {}),
        exhaustive("decoder", {"stage": 2}, {"pipeline_rounds": 2, "remat": "dots"}),
        exhaustive("decoder", {"stage": 4}, {"microbatches": 8, "remat": "full"}),
        exhaustive("decoder", {"data": 2, "stage": 2}, {}),
        exhaustive("decoder", {"fsdp": 2, "stage": 2}, {"pipeline_rounds": 2}),
        exhaustive("decoder", {"tensor": 2, "stage": 2}, {}),
        exhaustive("decoder", {"context": 2, "stage": 2}, {}),
        exhaustive("encoder", {"stage": 2}, {}),
    ],
)
def test_stages_learn_what_one_device_learns(family, mesh, model):
    alone, losses = trained(family, (), tuple(EXPERTS.items()) if model is EXPERTS else ())
    run, staged_losses = trained(family, tuple(mesh.items()), tuple(model.items()))
    apart = np.max(np.abs(np.subtract(staged_losses, losses)))
    of_weights = distance(run.state.model, alone.state.model)
    of_moments = distance(moments(run.state), moments(alone.state))
    print(f"{family} on {mesh}: losses differ by {apart:.1e}, weights by {of_weights:.1e}, moments by {of_moments:.1e}")
    assert max(apart, of_weights, of_moments) < 1e-5
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_a_stage_holds_its_own_layers_and_passes_on_nothing_but_a_part_of_the_batch():
    run, _ = trained("decoder", (("stage", 2),), ())
    adam = run.state.optimizer[1][0]
    for blocks in (run.state.model.blocks, adam.mu.blocks, adam.nu.blocks):
        for leaf in jax.tree.leaves(blocks):
            assert [shard.data.shape for shard in leaf.addressable_shards] == [(2, *leaf.shape[1:])] * 2
    names = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    moved = re.findall(rf"= (.*?) ({names})(?:-start)?\(", run.compiled.as_text())
    of = lambda names: " ".join(what for what, name in moved if name in names)
    shapes = lambda *names: set(re.findall(r"[a-z]\d+\[[\d,]*\]", of(names)))
    # One part of 2 rows with its segments is passed on; all 8 go to where the loss is, and their gradient back.
    assert shapes("collective-permute") == {"f32[2,16,32]", "s32[2,16]", "f32[1,8,2,16,32]"}
    of_blocks = jax.tree.leaves(adam.mu.blocks)
    weights = {f"f32[{n},{','.join(map(str, leaf.shape[1:]))}]" for leaf in of_blocks for n in (2, 4)}
    assert not weights & shapes(*names.split("|"))


@pytest.mark.slow
def test_equal_runs_with_dropout_are_equal():
    model = {"dropout": 0.3, "dtype": "bfloat16"}
    run, losses, models = Run(changed(mesh={"stage": 2}, model=model), 2), [], []
    for _ in range(2):
        run.restart()
        losses.append([run.step(batch_of(run.config, i))["loss"] for i in range(3)])
        models.append(host(run.state.model))
    assert losses[0] == losses[1]
    jax.tree.map(np.testing.assert_array_equal, *models)
