"""A compiler's own estimate of the cycles that a program takes, its loops included.

A proxy that compares programs of a chip. Collectives that run alone have no estimate.
"""

from medusa_jax.distributed.hlo import Instruction, Program


def cycles(program: Program, passes: int = 1) -> int | None:
    """Estimated cycles of a program; None where its compiler estimates none.

    Of branches the least counts, as in `training.flops`.

    Args:
      passes: of a loop whose number the data decides.
    """
    return _of(program, program.entry, passes)


def _of(program: Program, computation: str, passes: int) -> int | None:
    found = []
    for one in program.computations[computation]:
        estimate = one.number("estimated_cycles")
        if one.opcode == "while":
            body = _of(program, one.called("body"), passes)
            estimate = body and body * trips(program, one, passes)
        elif one.opcode == "call":
            estimate = _of(program, one.called("to_apply"), passes)
        elif one.opcode == "conditional":
            estimate = min(_of(program, name, passes) or 0 for name in one.branches)
        if estimate is not None:
            found.append(estimate)
    return sum(found) if found else None


def trips(program: Program, loop: Instruction, passes: int = 1) -> int:
    """Passes of a loop: what its compiler notes, or the constant that its condition compares with.

    %lt = compare(%number, %most), direction=LT with %most = constant(32) -> 32.

    Args:
      passes: where neither says.
    """
    noted = loop.number("known_trip_count")
    if noted is not None:
        return noted
    lines = {one.name: one for one in program.computations[loop.called("condition")]}
    end = next(one for one in lines.values() if one.root)
    for operand in end.operands:
        made = lines.get(operand)
        if made is not None and made.opcode == "constant" and "direction=LT" in end.rest:
            return int(made.operands[0])
    return passes
