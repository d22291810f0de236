"""Compiled programs read back: loops multiplied out, however their length is known, and groups in all spellings."""

import numpy as np
import pytest

from lslm_jax.plan import hlo_parser

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner.cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner.body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0:T(256)}) parameter(0)
  %x = f32[8]{0:T(256)} get-tuple-element(%q), index=1
  %all-reduce-start.1 = f32[8]{0:T(256)} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %all-reduce-done.1 = f32[8]{0:T(256)} all-reduce-done(%all-reduce-start.1)
  %n = s32[] get-tuple-element(%q), index=0
  ROOT %back = (s32[], f32[8]{0}) tuple(%n, %all-reduce-done.1)
}

%outer.body (q.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.1 = (s32[], /*index=1*/f32[8]{0}) while(%q.1), condition=%inner.cond, body=%inner.body
}

%outer.cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%fused (w: f32[4,8], v: f32[8]) -> f32[4] {
  %w = f32[4,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  ROOT %dot.1 = f32[4]{0} dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (s: (s32[], f32[8]), m: f32[4,8]) -> f32[4] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %m = f32[4,8]{1,0:T(8,128)S(1)} parameter(1), metadata={name="a
}} line (that breaks) = {"
}}
  %while.2 = (s32[], f32[8]{0}) while(%s), condition=%outer.cond, body=%outer.body, {"known_trip_count":{"n":"3"}}
  %y = f32[8]{0} get-tuple-element(%while.2), index=1
  ROOT %fusion.1 = f32[4]{0} fusion(%m, %y), kind=kLoop, calls=%fused
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo_parser.parse(PROGRAM)


def test_loops_inside_loops_are_multiplied_out(program):
    times = {run.instruction.name: run.times for run in hlo_parser.runs(program)}
    assert times["while.2"] == 1 and times["while.1"] == 3
    assert times["all-reduce-start.1"] == 15
    assert "sum" not in times  # what a reduction applies is no instruction of a step


@pytest.mark.parametrize(("start", "step", "bound", "times"), [(0, 1, 5, 5), (1, 1, 5, 4), (0, 2, 5, 3), (4, 1, 4, 0)])
def test_a_loop_runs_from_its_start_by_its_step_to_its_bound(start, step, bound, times):
    text = f"""
%cond (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant({bound})
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}
%body (q: (s32[])) -> (s32[]) {{
  %q = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%j, %step)
  ROOT %back = (s32[]) tuple(%next)
}}
ENTRY %main () -> (s32[]) {{
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %begin = (s32[]) tuple(%copied)
  ROOT %loop = (s32[]) while(%begin), condition=%cond, body=%body
}}
"""
    runs = {run.instruction.name: run.times for run in hlo_parser.runs(hlo_parser.parse(text))}
    assert runs["loop"] == 1 and runs["next"] == times


def test_what_is_in_a_fusion_is_told_from_the_fusion(program):
    fused = {run.instruction.name for run in hlo_parser.runs(program) if run.fused}
    assert fused == {"w", "v", "dot.1"}


def test_shapes_operands_and_attributes_are_read(program):
    main = program.computations[program.entry]
    assert main["m"].arrays == (hlo_parser.Array("f32", (4, 8), True),)
    assert "line (that breaks)" in main["m"].attributes
    assert main["fusion.1"].operands == ("m", "y") and main["fusion.1"].root
    assert main["while.2"].arrays == (hlo_parser.Array("s32", (), False), hlo_parser.Array("f32", (8,), False))
    assert main["while.2"].size == 4 + 32


@pytest.mark.parametrize(
    ("shape", "size"),
    [("bf16[3,5]{1,0}", 30), ("pred[7]", 7), ("f8e4m3fn[4]", 4), ("s4[6]{0}", 3), ("token[]", 0), ("f32[]", 4)],
)
def test_bytes_of_a_shape(shape, size):
    assert sum(array.size for array in hlo_parser.arrays(shape)) == size


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}, x=1", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,2},{3,3}}", [[0, 1], [1, 2]]),
    ],
)
def test_groups_of_a_collective(attributes, groups):
    np.testing.assert_array_equal(hlo_parser.groups(attributes, 4), groups)
