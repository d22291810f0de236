"""What instructions cost: products in every compiler's form, slices of large arrays, rings inside and between hosts."""

import types

import numpy as np
import pytest

from lslm_jax.plan import cost_model, hlo_parser

AXES = ("data", "fsdp", "tensor")


def network(shape=(2, 2, 2), domains=None, link=100.0, slow=10.0):
    """A mesh of eight devices, four in each of two domains unless told otherwise."""
    mesh = types.SimpleNamespace(axis_names=AXES, devices=np.zeros(shape))
    domains = np.repeat([0, 1], 4) if domains is None else domains
    return cost_model.Network(mesh, domains, lambda group: link if len(group) > 1 else 0.0, slow)


def measure(lines, computations="", routed=1.0):
    """Cost of an entry computation of these lines."""
    body = "\n".join(f"  {line.strip()}" for line in lines)
    text = f"{computations}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"
    return cost_model.measure(hlo_parser.parse(text), network(), 0.5, routed)


ATTENTION = "custom-call(%a, %b, %b), custom_call_target="


@pytest.mark.parametrize(
    ("a", "b", "product", "flops"),
    [
        ("f32[3,4,5]", "f32[3,5,6]", "f32[3,4,6] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}", 720),
        ("bf16[4,5]", "bf16[5,6]", "bf16[4,6] convolution(%a, %b), dim_labels=bf_io->bf", 240),
        (  # heads as a spatial dimension of the result: all but one of the window's places fall on padding
            "bf16[4,5,1]",
            "bf16[5,3,6]",
            "bf16[4,3,6] convolution(%a, %b), window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            720,
        ),
        (  # heads summed over: the window covers them all
            "bf16[4,3,5]",
            "bf16[3,5,6]",
            "bf16[4,6,1] convolution(%a, %b), window={size=3}, dim_labels=b0f_0io->bf0",
            720,
        ),
        (
            "bf16[4,5]",
            "bf16[5,6]",
            '(bf16[4,6], s8[64]) custom-call(%a, %b), target="__cublas$gemm", {"lhs_contracting_dimensions":["1"]}',
            240,
        ),
        # Attention kernels: two products forward, five backward, of which causality leaves half.
        ("bf16[2,16,4,8]", "bf16[2,16,4,8]", f'bf16[2,4,16,8] {ATTENTION}"__cudnn$fmhaSoftmax"', 2 * 2 * 1024 * 16 / 2),
        ("bf16[4,16,8]", "bf16[2,32,8]", f'bf16[4,16,8] {ATTENTION}"tpu_custom_call"', 5 * 2 * 512 * 32 / 2),
    ],
    ids=["dot", "convolution", "heads", "sum over heads", "cublas", "cudnn", "splash"],
)
def test_products_are_counted_in_every_form(a, b, product, flops):
    name = "splash_mha_dkv.1" if "tpu" in product else "product"
    lines = [f"%a = {a} parameter(0)", f"%b = {b} parameter(1)", f"ROOT %{name} = {product}"]
    assert measure(lines).flops == flops


@pytest.mark.parametrize(
    ("name", "result", "operands"),
    [
        ("ragged-dot-none.3", "bf16[64,6]", ("s32[4]", "bf16[64,5]", "bf16[4,5,6]")),
        ("tgmm.1", "bf16[4,5,6]", ("s32[4]", "bf16[64,5]", "bf16[64,6]")),
        ("ragged-dot-metadata", "(s32[5], s32[9])", ("s32[4]",)),
    ],
)
def test_of_rows_in_groups_those_count_that_a_device_gets(name, result, operands):
    lines = [f"%p{i} = {operand} parameter({i})" for i, operand in enumerate(operands)]
    read = ", ".join(f"%p{i}" for i in range(len(operands)))
    call = f'ROOT %{name} = {result} custom-call({read}), custom_call_target="tpu_custom_call"'
    found = measure([*lines, call], routed=0.25)
    assert found.flops == found.kernel_flops == (0 if "metadata" in name else 2 * 64 * 5 * 6 / 4)


def test_a_slice_costs_what_is_sliced_and_local_memory_is_free():
    lines = [
        "%stack = f32[10,100]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%slice = f32[1,100]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,100}",
        "%near = f32[1,100]{1,0:T(8,128)S(1)} copy(%slice)",
        "ROOT %all = f32[10,100]{1,0} dynamic-update-slice(%stack, %slice, %i, %i)",
    ]
    assert measure(lines).bytes == 800 + 400 + 800


def test_a_fusion_reads_of_a_stack_what_it_slices_and_writes_in_place():
    fused = """
%fused (p0: f32[10,100], p1: f32[100], p2: s32[]) -> f32[10,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = f32[100]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,100]{1,0} bitcast(%p1)
  ROOT %new = f32[10,100]{1,0} dynamic-update-slice(%p0, %row, %p2, %p2)
}
"""
    lines = ["%a = f32[10,100]{1,0} parameter(0)", "%b = f32[100]{0} parameter(1)", "%c = s32[] parameter(2)"]
    lines += ["ROOT %f = f32[10,100]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%fused"]
    assert measure(lines, fused).bytes == 400 + 4 + 400


ALONG = {  # one group along each axis of a mesh of 2 x 2 x 2
    "data": "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
    "tensor": "replica_groups=[4,2]<=[8]",
    "data+fsdp": "replica_groups=[2,4]<=[4,2]T(1,0)",
    "data+fsdp+tensor": "replica_groups={{0,1,2,3,4,5,6,7}}",
}


@pytest.mark.parametrize("axes", ALONG)
def test_a_group_is_told_by_the_axes_along_which_it_lies(axes):
    assert "+".join(network().send("all-reduce", 8, ALONG[axes]).axes) == axes


def test_a_permutation_is_told_by_the_axes_along_which_it_moves():
    sent = network().send("collective-permute", 64, "source_target_pairs={{0,2},{2,0},{1,3},{3,1}}")
    assert sent.axes == ("fsdp",) and sent.bytes == 64 and not sent.network


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [  # of 8 devices in two domains of 4, each of which puts in 80 bytes
        ("all-gather", 640 * 3 / 4, 640 / 2 / 4),
        ("reduce-scatter", 80 * 3 / 4, 80 / 2 / 4),
        ("all-reduce", 160 * 3 / 4, 160 / 2 / 4),
        ("all-to-all", 80 * 3 / 8, 80 / 2),
    ],
)
def test_a_ring_inside_a_domain_and_one_between_domains(kind, inside, outside):
    sent = network().send(kind, 80, ALONG["data+fsdp+tensor"])
    assert sent.bytes == inside + outside and sent.network
    assert sent.seconds == max(inside / 100, outside / 10)


def test_inside_one_domain_nothing_leaves_it():
    sent = network(domains=np.zeros(8, int)).send("all-gather", 80, ALONG["tensor"])
    assert sent == (("tensor",), 2, 80, 0.8, False)


def test_a_collective_in_a_loop_counts_each_time_and_one_that_ends_later_does_not_block():
    lines = ["%p = f32[20]{0} parameter(0)"]
    groups = ALONG["tensor"]
    lines += [f"%a = (f32[20]{{0}}, f32[40]{{0}}) all-gather-start(%p), {groups}, dimensions={{0}}"]
    lines += ["%b = f32[40]{0} all-gather-done(%a)", f"ROOT %c = f32[20]{{0}} reduce-scatter(%b), {groups}"]
    gather, scatter = measure(lines).collectives
    assert (gather.kind, gather.count, gather.bytes, gather.blocking) == ("all-gather", 1, 80, 0.0)
    assert (scatter.kind, scatter.count, scatter.bytes) == ("reduce-scatter", 1, 80)
    assert scatter.blocking == scatter.seconds > 0


def test_a_torus_has_two_ways_along_each_ring_and_one_along_a_line():
    places = np.stack(np.unravel_index(np.arange(32), (4, 4, 2)), axis=1)
    speed = cost_model.tori(places, (True, True, False), 100.0)
    along = lambda fixed: np.flatnonzero(np.all([places[:, d] == 0 for d in fixed], axis=0))
    assert speed(along((1, 2))) == 200  # a ring of four
    assert speed(along((0, 1))) == 100  # two neighbours
    assert speed(along((2,))) == 400  # a plane of rings
    assert speed(along((1,))) == 300
    assert speed(np.array([0])) == 0


@pytest.mark.parametrize(
    ("kind", "target", "sent"),
    [("ALL_REDUCE", "1,2", 4096), ("ALL_GATHER", "1:2", 4096), ("REDUCE_SCATTER", "1,2", 2048)],
)
def test_what_the_tpu_compiler_hands_to_the_network_between_slices_counts_too(kind, target, sent):
    handed = f'_xla_megascale_target="{{{target}}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"'
    lines = [
        "%a = f32[1024] parameter(0)",
        "%t = token[] after-all()",
        f"%s = (f32[1024], u32[], token[]) send(%a, %t), is_host_transfer=true, frontend_attributes={{{handed}}}",
        "%d = token[] send-done(%s), is_host_transfer=true",
    ]
    (found,) = measure(lines).collectives
    assert (found.kind, found.axes, found.group) == (kind.lower().replace("_", "-"), ("data",), 2)
    assert found.network and found.bytes == sent and found.seconds == sent / 10.0 and found.blocking == 0.0
