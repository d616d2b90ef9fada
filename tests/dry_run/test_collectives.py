"""What a program's text says that devices send each other, worked by hand."""

import re

from ragjax.dry_run.collectives import Sent, collectives_of

# As XLA writes it, but for @n, a loop of n rounds: one of 32 gathers, one of 2 is around another of 3, one of two
# branches sends, an addition is no operation of its own, a result has several arrays, operations begin here and end
# elsewhere, and devices that are alone send nothing.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%layer (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-gather.1 = bf16[64,16]{1,0} all-gather(%part), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %tuple.1 = (s32[], bf16[8,16]) tuple(%next, %out), metadata={op_name="all-gather(x)"}
}

%inner (i: s32[]) -> s32[] {
  %permuted = f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%outer (i: s32[]) -> s32[] {
  %while.9 = s32[] while(%i), condition=%more, body=%inner, @3
}

%more (i: s32[]) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%left (x: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[4]{0} all-to-all(%x), dimensions={0}
}

%right (x: f32[4]) -> f32[4] {
  ROOT %copied = f32[4]{0} copy(%x)
}

ENTRY %main.5_spmd (a: f32[8,16], b: s32[]) -> (f32[8,16], f32[]) {
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%t), condition=%more, body=%layer, @32
  %while.2 = s32[] while(%b), condition=%more, body=%outer, @2
  %chosen = f32[4]{0} conditional(%p, %u, %u), branch_computations={%left, %right}
  %all-reduce.1 = (f32[8,16]{1,0}, f32[], /*index=2*/pred[5]{0}) all-reduce(%g, %h, %m), channel_id=2, to_apply=%add
  %ag-start = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%w), dimensions={0}
  %ag-done = bf16[16,4]{1,0} all-gather-done(%ag-start)
  %alone.1 = f32[100]{0} all-reduce(%g), replica_groups={{0},{1}}, to_apply=%add
  %alone.2 = f32[100]{0} all-reduce(%g), replica_groups=[8,1]<=[8], to_apply=%add
  %cp-start = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%v)
  ROOT %result = (f32[8,16], f32[]) tuple(%z, %s)
}
"""


def test_operations_count_as_often_as_they_run():
    found = collectives_of(re.sub(r"@(\d+)", r'backend_config={"known_trip_count":{"n":"\1"}}', PROGRAM))
    assert found == {
        "all-gather": Sent(32 + 1, 32 * 64 * 16 * 2 + 16 * 4 * 2),
        "all-reduce": Sent(1, 8 * 16 * 4 + 4 + 5),
        "collective-permute": Sent(2 * 3 + 1, 2 * 3 * 40 + 28),
        "all-to-all": Sent(1, 16),
    }
    assert list(found) == ["all-gather", "all-reduce", "collective-permute", "all-to-all"]


def test_a_program_of_one_device_sends_nothing():
    assert collectives_of("ENTRY %main (a: f32[2]) -> f32[2] {\n  ROOT %n = f32[2]{0} negate(%a)\n}\n") == {}
