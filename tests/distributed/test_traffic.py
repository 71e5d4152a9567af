"""Bytes of compiled programs: each rule on a few lines of text as XLA writes them."""

import pytest

from medusa_jax.distributed.hlo import Array, Program, instruction
from medusa_jax.distributed.traffic import Traffic, traffic

ADD = """
%add_numbers (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""
LABEL = "metadata={op_name=\"params[\\'backbone\\'][\\'up\\'].data\"}"


def of(text: str, scores: int = 0, filled: float = 1) -> Traffic:
    return traffic(Program.parse(ADD + text), scores, filled)


def test_an_array_knows_its_bytes_and_its_memory():
    line = "  %a = (bf16[3,4]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}, pred[]) fusion(%b), calls=%c"
    on_chip, packed, flag = instruction(line).arrays
    assert on_chip == Array("bf16", (3, 4), space=1)
    assert [array.bytes for array in (on_chip, packed, flag)] == [24, 3, 1]
    assert str(on_chip) == "bf16[3,4]"


def test_an_instruction_is_read():
    line = (
        "  ROOT %a.1 = (f32[2,3]{1,0}, /*index=1*/s32[]) fusion(%b, %c.2), kind=kLoop, calls=%d.4, "
        'metadata={op_name="params[\\\'head\\\'].data"}, backend_config={"estimated_cycles":"42"}'
    )
    one = instruction(line)
    assert (one.name, one.opcode, one.operands) == ("a.1", "fusion", ("b", "c.2"))
    assert [array.size for array in one.arrays] == [6, 1]
    assert one.called("calls") == "d.4"
    assert one.label == "params['head'].data"
    assert one.number("estimated_cycles") == 42
    with pytest.raises(ValueError, match=r"a\.1 names no body"):
        one.called("body")


def test_a_product_reads_its_operands_and_writes_its_result():
    found = of(f"""
ENTRY %main (w: bf16[512,512], x: bf16[8,512]) -> bf16[8,512] {{
  %w = bf16[512,512]{{1,0}} parameter(0), {LABEL}
  %x = bf16[8,512]{{1,0}} parameter(1)
  ROOT %y = bf16[8,512]{{1,0}} dot(%x, %w), backend_config={{"estimated_cycles":"1000"}}
}}""")
    assert found.bytes == {"weights": 512 * 512 * 2, "rest": 2 * 8 * 512 * 2}
    assert (found.kernels, found.cycles, found.moved) == (1, 1000, 512 * 512 * 2 + 16384)


def test_a_prefetch_is_read_once_and_a_copy_of_a_weight_is_told_apart():
    """What lies on chip, S(1), is free; a weight in another order is no prefetch."""
    found = of(f"""
ENTRY %main (w: bf16[512,512], v: bf16[512,512], x: bf16[8,512]) -> bf16[8,512] {{
  %w = bf16[512,512]{{1,0}} parameter(0), {LABEL}
  %v = bf16[512,512]{{1,0}} parameter(1), {LABEL}
  %x = bf16[8,512]{{1,0:S(1)}} parameter(2)
  %start = (bf16[512,512]{{1,0:S(1)}}, bf16[512,512]{{1,0}}, u32[]{{:S(2)}}) copy-start(%w)
  %near = bf16[512,512]{{1,0:S(1)}} copy-done(%start)
  %turned = bf16[512,512]{{0,1}} copy(%v)
  ROOT %y = bf16[8,512]{{1,0:S(1)}} fusion(%x, %near, %turned), kind=kOutput, calls=%product
}}

%product (a: bf16[8,512], b: bf16[512,512], c: bf16[512,512]) -> bf16[8,512] {{
  %a = bf16[8,512] parameter(0)
  %b = bf16[512,512] parameter(1)
  %c = bf16[512,512] parameter(2)
  %first = bf16[8,512] convolution(%a, %b)
  ROOT %second = bf16[8,512] convolution(%first, %c)
}}""")
    weight = 512 * 512 * 2
    assert found.bytes == {"weights": 3 * weight, "weight copies": weight}


LOOP = f"""
%cut (table: bf16[512,512], row: s32[]) -> bf16[1,512] {{
  %table = bf16[512,512] parameter(0)
  %row = s32[] parameter(1)
  %same = bf16[512,512] bitcast(%table)
  ROOT %rows = bf16[1,512] dynamic-slice(%same, %row, %row), dynamic_slice_sizes={{1,512}}
}}

%append (keys: bf16[4,256], new: bf16[4,1], at: s32[]) -> bf16[4,256] {{
  %keys.1 = bf16[4,256] parameter(0)
  %new = bf16[4,1] parameter(1)
  %at = s32[] parameter(2)
  ROOT %appended = bf16[4,256] dynamic-update-slice(%keys.1, %new, %at, %at)
}}

%body (carried: (bf16[4,256], bf16[512,512], s32[])) -> (bf16[4,256], bf16[512,512], s32[]) {{
  %carried = (bf16[4,256], bf16[512,512], s32[]) parameter(0)
  %keys.2 = bf16[4,256] get-tuple-element(%carried), index=0
  %table.2 = bf16[512,512] get-tuple-element(%carried), index=1
  %row.2 = s32[] get-tuple-element(%carried), index=2
  %hidden = bf16[1,512] fusion(%table.2, %row.2), kind=kLoop, calls=%cut
  %scores = f32[4,256] dot(%hidden, %keys.2)
  %added = bf16[4,1] reduce(%scores, %scores), dimensions={{1}}, to_apply=%add_numbers
  %keys.3 = bf16[4,256] fusion(%keys.2, %added, %row.2), kind=kLoop, calls=%append
  ROOT %next = (bf16[4,256], bf16[512,512], s32[]) tuple(%keys.3, %table.2, %row.2)
}}

%going (carried: (bf16[4,256], bf16[512,512], s32[])) -> pred[] {{
  %carried.4 = (bf16[4,256], bf16[512,512], s32[]) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (table: bf16[512,512], keys: bf16[4,256], row: s32[]) -> bf16[4,256] {{
  %table.5 = bf16[512,512]{{1,0}} parameter(0), {LABEL}
  %keys.5 = bf16[4,256]{{1,0}} parameter(1), metadata={{op_name="state.cache.keys[0]"}}
  %row.5 = s32[] parameter(2)
  %turned = bf16[512,512]{{0,1}} copy(%table.5)
  %given = (bf16[4,256], bf16[512,512], s32[]) tuple(%keys.5, %turned, %row.5)
  %loop = (bf16[4,256], bf16[512,512], s32[]) while(%given), condition=%going, body=%body
  ROOT %last = bf16[4,256] get-tuple-element(%loop), index=0
}}"""


def test_a_pass_of_a_loop_reads_rows_scores_and_cache_and_appends_in_place():
    """A row of the table is read, not the table; an appended cell is written, not the cache."""
    found = of(LOOP, scores=4 * 256)
    weight, cache, scores, cell, row = 512 * 512 * 2, 4 * 256 * 2, 4 * 256 * 4, 8, 1024
    assert found.bytes == {
        "weights": row,
        "cache": cache + cell,
        "scores": 2 * scores,
        "rest": 2 * row + 2 * cell + 2 * 4,  # of each array, written and read; the row's number
    }
    assert found.call_bytes == {"weights": weight, "weight copies": weight}
    assert (found.kernels, found.cycles) == (4, None)


def test_a_kernel_reads_the_filled_slots_of_a_layer():
    """Of 3 layers with 128 slots, 96 of them filled; an instruction of XLA's reads all."""
    text = """
ENTRY %main (keys: bf16[2,3,4,8,128], x: bf16[2,4,8]) -> bf16[2,4,8] {{
  %keys = bf16[2,3,4,8,128]{{4,3,2,1,0}} parameter(0), metadata={{op_name="state.cache.keys"}}
  %x = bf16[2,4,8]{{2,1,0}} parameter(1)
  ROOT %y = bf16[2,4,8]{{2,1,0}} {}(%x, %keys)
}}"""
    layer = 2 * 4 * 8 * 128 * 2
    assert of(text.format("custom-call"), filled=0.75).bytes["cache"] == layer * 3 // 4
    assert of(text.format("custom-call")).bytes["cache"] == layer
    assert of(text.format("dot"), filled=0.75).bytes["cache"] == 3 * layer


def test_a_part_of_a_padded_array_is_read_in_proportion():
    """Parts of a sharded product that a TPU overlaps with its exchange: half of the padding."""
    found = of(f"""
%part (w: bf16[1,512,512], row: s32[]) -> bf16[2,128,512] {{
  %w.1 = bf16[1,512,512] parameter(0)
  %row = s32[] parameter(1)
  %none = bf16[] constant(0)
  %padded = bf16[2,512,512] pad(%w.1, %none), padding=0_1x0_0x0_0
  ROOT %cut = bf16[2,128,512] dynamic-slice(%padded, %row, %row), dynamic_slice_sizes={{2,128,512}}
}}

ENTRY %main (w: bf16[1,512,512], row: s32[]) -> bf16[2,128,512] {{
  %w = bf16[1,512,512]{{2,1,0}} parameter(0), {LABEL}
  %row.1 = s32[] parameter(1)
  ROOT %part.1 = bf16[2,128,512]{{2,1,0:S(1)}} fusion(%w, %row.1), kind=kLoop, calls=%part
}}""")
    assert found.bytes["weights"] == 128 * 512 * 2


def test_what_a_product_leaves_to_a_sum():
    """Two halves of a long product, each [8, 512], that the next fusion adds."""
    text = f"""
%halves (a: bf16[8,512], b: bf16[512,512]) -> f32[2,8,512] {{
  %a = bf16[8,512] parameter(0)
  %b = bf16[512,512] parameter(1)
  ROOT %two = f32[2,8,512] dot(%a, %b)
}}

%whole (parts: f32[2,8,512]) -> f32[8,512] {{
  %parts = f32[2,8,512] parameter(0)
  %zero = f32[] constant(0)
  ROOT %one = f32[8,512] reduce(%parts, %zero), dimensions={{0}}, to_apply=%add_numbers
}}

ENTRY %main (w: bf16[512,512], x: bf16[8,512]) -> f32[8,512] {{
  %w = bf16[512,512]{{1,0}} parameter(0), {LABEL}
  %x = bf16[8,512]{{1,0}} parameter(1)
  %y = f32[2,8,512] fusion(%x, %w), kind=kCustom, calls=%halves
  ROOT %z = f32[8,512] fusion(%y), kind=kLoop, calls=%whole
}}"""
    assert of(text).bytes["partial sums"] == 2 * 2 * 8 * 512 * 4
    elsewhere = text.replace("to_apply=%add_numbers", "to_apply=%largest")
    elsewhere += ADD.replace("add_numbers", "largest").replace("add(", "maximum(")
    assert of(elsewhere).bytes["partial sums"] == 0


def test_a_loop_of_known_length_and_a_call_count_as_often_as_they_run():
    found = of("""
%twice (x: f32[2]) -> f32[2] {
  %x.1 = f32[2] parameter(0)
  ROOT %y.1 = f32[2] add(%x.1, %x.1), backend_config={"estimated_cycles":"10"}
}

%pass (x: f32[2]) -> f32[2] {
  %x.2 = f32[2] parameter(0)
  ROOT %y.2 = f32[2] call(%x.2), to_apply=%twice
}

%again (x: f32[2]) -> f32[2] {
  %x.3 = f32[2] parameter(0)
  %y.3 = f32[2] while(%x.3), condition=%c, body=%pass, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %z.3 = f32[2] call(%y.3), to_apply=%twice
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x.4 = f32[2] parameter(0)
  ROOT %y.4 = f32[2] call(%x.4), to_apply=%again
}""")
    assert (found.kernels, found.cycles, found.moved) == (6, 60, 6 * 2 * 8)


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        Program.parse("HloModule nothing")
