"""Reads the text of a compiled program, to find what it copies, rewrites and reads twice."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Instructions that name an array without moving it.
PASSED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional"}
# Instructions that change part of an array in place; `copy` precedes them where they cannot.
IN_PLACE = {"scatter", "dynamic-update-slice"}
# Instructions that read a weight as decoding should: a product with all of it, or a few rows.
READS = {"dot", "custom-call", "convolution", "gather", "dynamic-slice"}
MATRIX = 256  # elements from which an argument is a weight, no bias or norm
HOST = ("callback", "outfeed", "infeed", "send(", "recv(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def sizes(self) -> list[int]:
        """Elements of the array, or of each array of the tuple."""
        return [
            math.prod(int(size) for size in dims.split(",") if size)
            for dims in re.findall(r"\w+\[([\d,]*)\]", self.shape)
        ]

    @property
    def label(self) -> str:
        """Name of an argument in the Python function: "params['head']['kernel']"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return (found[1] if found else self.name).replace("\\'", "'")

    def called(self, role: str) -> str:
        """The computation that this instruction calls as `role`, such as "body"."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        assert found, f"{self.name} names no {role}: {self.rest[:200]}"
        return found[1]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and which of them is the entry."""

    text: str
    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def of(cls, compiled: Any) -> "Program":
        """Reads `jax.jit(...).lower(...).compile()`."""
        text = compiled.as_text()
        computations: dict[str, list[Instruction]] = {}
        entry, name = "", ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                name = head[2]
                computations[name] = []
                entry = name if head[1] else entry
            elif name and " = " in line:
                computations[name].append(_instruction(line))
        assert entry, text[:500]
        return cls(text, computations, entry)

    @property
    def arguments(self) -> list[Instruction]:
        """The arguments of the program."""
        return [one for one in self.computations[self.entry] if one.opcode == "parameter"]

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

    def _uses_by(self, computation: str, user: Instruction, position: int) -> Counter[str]:
        if user.opcode == "bitcast":
            return self.uses(computation, user.name)
        if user.opcode in ("fusion", "call"):
            inner = user.called("calls" if user.opcode == "fusion" else "to_apply")
            return self.uses(inner, self._parameter(inner, position))
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
        given = self._parameter(computation, 0)
        found: Counter[str] = Counter()
        for one in self.computations[computation]:
            of_given = one.opcode == "get-tuple-element" and one.operands == (given,)
            if of_given and re.search(rf"\bindex={index}\b", one.rest):
                found += self.uses(computation, one.name)
        return found

    def _parameter(self, computation: str, position: int) -> str:
        wanted = str(position)
        (found,) = (
            one.name
            for one in self.computations[computation]
            if one.opcode == "parameter" and one.operands == (wanted,)
        )
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
        if one.opcode not in harmless and size in one.sizes
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
        if size in argument.sizes and uses.total() != 2:
            found.append(f"more than one read and one write a step: {what}")
        weight = "params[" in argument.label and max(argument.sizes) >= MATRIX
        if weight and (uses.total() != 1 or not uses.keys() <= READS):
            found.append(f"not one read a step: {what}")
    aliased = compiled.memory_analysis().alias_size_in_bytes
    if aliased < total:
        found.append(f"aliases {aliased} bytes of a cache of {total}")
    return found


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    root = left.lstrip().startswith("ROOT ")
    name = left.strip().removeprefix("ROOT ").lstrip("%")
    right = re.sub(r"/\*.*?\*/", "", right)
    cut = _closing(right) if right.startswith("(") else right.index(" ")
    shape, right = right[:cut], right[cut:].lstrip()
    opcode, _, right = right.partition("(")
    cut = _closing("(" + right) - 1
    inside, rest = right[: cut - 1], right[cut:]
    names = re.findall(r"%([\w.\-]+)", inside)
    operands = tuple(names) if names else tuple(filter(None, [inside.strip()]))
    return Instruction(name, shape, opcode, operands, rest, root)


def _closing(text: str) -> int:
    """Length of the parenthesis that `text` begins with: "(a(b)) c" -> 6."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return position + 1
    raise AssertionError(f"no closing parenthesis in {text[:100]}")
