"""Reads the text of a compiled program, to find what it copies, rewrites and reads twice."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from medusa_jax.distributed import hlo

# Instructions that name an array without moving it.
PASSED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional"}
# Instructions that change part of an array in place; `copy` precedes them where they cannot.
IN_PLACE = {"scatter", "dynamic-update-slice"}
# Instructions that read a weight as decoding should: a product with all of it, or a few rows.
READS = {"dot", "custom-call", "convolution", "gather", "dynamic-slice"}
MATRIX = 256  # elements from which an argument is a weight, no bias or norm
HOST = ("callback", "outfeed", "infeed", "send(", "recv(")


class Program(hlo.Program):
    """A compiled program, and what reads its arrays."""

    @classmethod
    def of(cls, compiled: Any) -> "Program":
        """Reads `jax.jit(...).lower(...).compile()`."""
        read = hlo.Program.parse(compiled.as_text())
        return cls(read.text, read.computations, read.entry)

    def uses(self, computation: str, name: str) -> Counter[str]:
        """Opcodes that read an array, followed into loops and fusions.

        A parameter that a loop carries and one product in the loop reads gives {"dot": 1}.
        """
        found: Counter[str] = Counter()
        for user in self.computations[computation]:
            for position, operand in enumerate(user.operands):
                if operand == name:
                    found += self._uses_by(computation, user, position)
        return found

    def _uses_by(self, computation: str, user: hlo.Instruction, position: int) -> Counter[str]:
        if user.opcode == "bitcast":
            return self.uses(computation, user.name)
        if user.opcode in ("fusion", "call"):
            inner = user.called("calls" if user.opcode == "fusion" else "to_apply")
            return self.uses(inner, self.parameter(inner, position).name)
        if user.opcode == "tuple":
            found: Counter[str] = Counter()
            for loop in self.computations[computation]:
                if loop.opcode == "while" and user.name in loop.operands:
                    for role in ("body", "condition"):
                        found += self._of_element(loop.called(role), position)
            return found
        return Counter([user.opcode])

    def _of_element(self, computation: str, index: int) -> Counter[str]:
        """Uses of one element of the tuple that a loop's computation is given."""
        given = self.parameter(computation, 0).name
        found: Counter[str] = Counter()
        for one in self.computations[computation]:
            of_given = one.opcode == "get-tuple-element" and one.operands == (given,)
            if of_given and re.search(rf"\bindex={index}\b", one.rest):
                found += self.uses(computation, one.name)
        return found


def moved(program: Program, size: int) -> list[str]:
    """Instructions that make a whole array of that size anew, as "opcode shape".

    Args:
      size: elements of an array that should stay in place; no other array may have as many.
    """
    # What a fusion computes is among the instructions of the computation that it calls.
    harmless = PASSED_ON | IN_PLACE | {"fusion"}
    return [
        f"{one.opcode} {one.shape}"
        for instructions in program.computations.values()
        for one in instructions
        if one.opcode not in harmless and size in [array.size for array in one.arrays]
    ]


def faults(compiled: Any, cache: Sequence[Any]) -> list[str]:
    """What keeps a decoding loop from running at the speed of memory; empty if nothing does.

    Args:
      compiled: a program of two arguments, `params` and a donated state.
      cache: keys and values in that state, all as large as each other. Of sharded arrays and
        weights, the part that one device holds is meant.
    """
    program = Program.of(compiled)
    parts = [array.addressable_shards[0].data for array in cache]
    size, total = parts[0].size, sum(part.nbytes for part in parts)
    found = [f"exchanges data with the host: {word}" for word in HOST if word in program.text]
    found += [f"moves the cache: {what}" for what in moved(program, size)]
    for argument in program.arguments:
        uses = program.uses(program.entry, argument.name)
        what = f"{argument.label} {dict(uses)}"
        sizes = [array.size for array in argument.arrays]
        if size in sizes and uses.total() != 2:
            found.append(f"more than one read and one write a step: {what}")
        weight = "params[" in argument.label and max(sizes) >= MATRIX
        if weight and (uses.total() != 1 or not uses.keys() <= READS):
            found.append(f"not one read a step: {what}")
    aliased = compiled.memory_analysis().alias_size_in_bytes
    if aliased < total:
        found.append(f"aliases {aliased} bytes of a cache of {total}")
    return found
