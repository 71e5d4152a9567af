"""Estimated cycles of compiled programs, on text as XLA writes it."""

from medusa_jax.distributed.cycles import cycles
from medusa_jax.distributed.hlo import Program

LOOPS = """
%body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %inner = s32[] while(%p), condition=%data, body=%small
  ROOT %next = s32[] add(%inner, %p), backend_config={"estimated_cycles":"100"}
}
%small (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  ROOT %more = s32[] add(%s, %s), backend_config={"estimated_cycles":"7"}
}
%large (l: s32[]) -> s32[] {
  %l = s32[] parameter(0)
  ROOT %most = s32[] add(%l, %l), backend_config={"estimated_cycles":"9000"}
}
%counted (p.1: s32[]) -> pred[] {
  %p.1 = s32[] parameter(0)
  %end = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%p.1, %end), direction=LT
}
%data (p.2: s32[]) -> pred[] {
  %p.2 = s32[] parameter(0)
  %last = s32[] get-tuple-element(%p.2), index=1
  ROOT %lt.1 = pred[] compare(%p.2, %last), direction=LT
}
"""


def of(entry: str, passes: int = 1) -> int | None:
    return cycles(
        Program.parse(f"{LOOPS}\nENTRY %main (x: s32[]) -> s32[] {{\n{entry}\n}}"), passes
    )


def test_loops_count_as_often_as_they_pass():
    """32 passes by the condition's constant, of which each has a loop that the data ends."""
    loop = "  %x = s32[] parameter(0)\n  ROOT %w = s32[] while(%x), condition=%counted, body=%body"
    assert of(loop) == 32 * (100 + 7)
    assert of(loop, passes=8) == 32 * (100 + 8 * 7)
    noted = loop + ', backend_config={"known_trip_count":{"n":"4"}}'
    assert of(noted) == 4 * (100 + 7)


def test_of_branches_the_least_counts_and_a_call_counts_once():
    choice = "  %x = s32[] parameter(0)\n  ROOT %c = s32[] "
    both = "conditional(%x, %x, %x), branch_computations={%large, %small}"
    assert of(choice + both) == 7
    assert of(choice + "call(%x), to_apply=%large") == 9000


def test_a_compiler_that_estimates_nothing():
    assert of("  ROOT %x = s32[] parameter(0)") is None
