"""The real step as XLA made it for eight devices: what is gathered where, and that our own arithmetic agrees."""

from dataclasses import replace

import jax
import pytest
from tiny_plans import CONFIG, CPU, LAYERS, compiled

from lslm_jax.models.flops import flops_per_token
from lslm_jax.plan import hlo_parser
from lslm_jax.plan.estimates import figures, local_bytes


def collectives(step, kind):
    """(times a step, bytes of the largest result, name of the operation) of each of a kind."""
    found = []
    for run in hlo_parser.runs(hlo_parser.parse(step.program.as_text())):
        if run.instruction.opcode.removesuffix("-start") == kind:
            largest = max(array.size for array in run.instruction.arrays)
            found.append((run.times, largest, run.instruction.attributes))
    return found


def test_under_fsdp_weights_are_gathered_layer_by_layer_and_never_all_at_once():
    gathers = collectives(compiled(fsdp=8), "all-gather")
    in_layers = [times for times, _, _ in gathers if times == LAYERS]
    assert len(in_layers) == 2 * 6  # q, k, v, o, up and down, forward and backward
    model = compiled(fsdp=8).state.model
    largest = max(leaf.size // (LAYERS if leaf.ndim > 2 else 1) for leaf in jax.tree.leaves(model)) * 4
    assert max(size for _, size, _ in gathers) <= largest
    (gathered,) = [
        each for each in figures(compiled(fsdp=8), CPU, None, None)["collectives"] if each["kind"] == "all-gather"
    ]
    assert gathered["axes"] == ("fsdp",) and gathered["group"] == 8
    assert gathered["count"] == sum(times for times, _, _ in gathers) == LAYERS * 12 + len(gathers) - len(in_layers)


def test_under_fsdp_bytes_gathered_are_those_of_the_weights():
    model = compiled(fsdp=8).state.model
    blocks = sum(leaf.size for leaf in jax.tree.leaves(model.blocks) if leaf.ndim > 2) * 4
    each = {"embed": model.embed.size * 4, "positions": model.positions.size * 4, "head": model.head.size * 4}
    at_least = (2 * blocks + each["embed"] + each["head"]) * 7 / 8
    (found,) = [e for e in figures(compiled(fsdp=8), CPU, None, None)["collectives"] if e["kind"] == "all-gather"]
    assert at_least <= found["bytes"] <= at_least + (each["head"] + each["positions"] + each["embed"]) * 7 / 8


def test_under_tensor_there_are_two_sums_a_layer_forward_and_two_backward():
    sums = [each for each in collectives(compiled(tensor=8), "all-reduce") if "(blocks)" in each[2]]
    forward = [times for times, _, name in sums if "transpose" not in name]
    assert forward == [LAYERS, LAYERS]
    assert [times for times, _, name in sums if "transpose" in name] == [LAYERS, LAYERS]


def test_moments_are_split_over_data_as_well():
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled(fsdp=8).state.optimizer))
    for mesh in ({"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        assert local_bytes(compiled(**mesh).state.optimizer) < 1.1 * whole / 8


def test_axes_are_told_apart_on_a_mesh_of_three():
    found = figures(compiled(data=2, fsdp=2, tensor=2), CPU, None, None)["collectives"]
    groups = {tuple(each["axes"]): each["group"] for each in found}
    assert groups[("fsdp",)] == groups[("tensor",)] == 2 and groups[("data", "fsdp")] == 4
    assert all(size == 2 ** len(axes) for axes, size in groups.items())


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_memory_is_what_the_compiler_reports_and_arguments_are_what_we_count(mesh):
    step = compiled(**mesh)
    memory, said = figures(step, CPU, None, None)["memory"], step.program.memory_analysis()
    assert memory["arguments"] == said.argument_size_in_bytes
    assert memory["temporaries"] == said.temp_size_in_bytes
    assert memory["outputs"] == said.output_size_in_bytes
    assert memory["peak"] == said.peak_memory_in_bytes
    ours = memory["parameters"] + memory["optimizer"] + memory["batch"]
    assert ours == pytest.approx(memory["arguments"], rel=0.05)
    assert memory["aliased"] == pytest.approx(memory["parameters"] + memory["optimizer"], rel=0.05)  # all donated


def test_operations_are_the_compilers_own_and_the_formulas_within_5_percent():
    # Unrolled, so that the compiler counts every layer; wide for its length, as causality is not in its products.
    model = replace(CONFIG.model, scan_layers=False, d_model=256, num_heads=8)
    step = compiled(model=model, fsdp=8)
    config = step.config
    predicted = flops_per_token(config.model, config.data.seq_len) * config.train.batch_size * config.data.seq_len
    said = step.program.cost_analysis()["flops"]
    counted = figures(step, CPU, None, None)["per_device"]["flops"]
    assert counted == pytest.approx(predicted / 8, rel=0.05)
    assert said == pytest.approx(predicted / 8, rel=0.05)


def test_a_scan_counts_as_its_layers_apart():
    rolled, unrolled = (
        figures(compiled(model=replace(CONFIG.model, scan_layers=scan), fsdp=8), CPU, None, None)["per_device"]["flops"]
        for scan in (True, False)
    )
    assert rolled == pytest.approx(unrolled, rel=0.01)
