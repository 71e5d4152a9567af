"""What a compiled loop moves through a device's main memory in each pass, by the compiler's text.

An instruction reads its operands and writes its result. Arrays in a TPU's memory on chip cost
nothing here; a fusion that cuts or gathers rows of an operand reads those rows only, and an update
in place writes what is new. An instruction that calls a kernel of ours counts as if it read its
operands whole, but of a cache the filled slots of a single layer.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from medusa_jax.distributed.hlo import Array, Instruction, Program

# Instructions that name arrays, or wait for them, without work on the device.
NO_WORK = {
    "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "optimization-barrier",
    "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
CUTS = {"dynamic-slice", "gather", "slice"}
UPDATES = {"dynamic-update-slice", "scatter"}
# Instructions that give a weight another place, order or type, and do not compute with it.
MOVES = {
    "bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "optimization-barrier",
    "parameter", "reshape", "slice", "transpose",
}  # fmt: skip
MATRIX = 2**16  # elements from which a parameter is a weight, no norm or bias


@dataclasses.dataclass
class Traffic:
    """What one pass of a loop costs a device; bytes are those in its main memory, both ways.

    Attributes:
      bytes: by what moves: "weights", "cache", "scores", "partial sums" and "rest"; "weight
        copies" are those that are written.
      call_bytes: the same, once a call of the program, before its loop and after it.
      kernels: instructions that the device is given.
      cycles: the compiler's estimate; None where it makes none.
    """

    bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    call_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kernels: int = 0
    cycles: int | None = None

    @property
    def moved(self) -> int:
        """All bytes of a pass."""
        return self.bytes.total()


def traffic(program: Program, scores: int = 0, filled: float = 1) -> Traffic:
    """What a pass of the program's loop moves; of a program without a loop, all of it.

    Args:
      program: a function of `params` and of a `state` whose cache it updates.
      scores: elements of an array that holds a score for each query and slot of the cache.
      filled: share of the slots of a cache that kernels of ours read.
    """
    return _Reader(program, scores, filled).read()


class _Sizes:
    """How much of each array the instructions of a program read and write."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lines = {
            name: {one.name: one for one in lines} for name, lines in program.computations.items()
        }

    def _read_of(self, one: Instruction, position: int, array: Array) -> int:
        """Bytes that an instruction reads of an operand."""
        if one.opcode in UPDATES:
            return array.bytes if position else 0
        if one.opcode in CUTS or one.opcode == "slice-start":
            return min(array.bytes, one.arrays[-1 if one.opcode in CUTS else 1].bytes)
        if one.opcode != "fusion":
            return array.bytes
        inner = one.called("calls")
        return min(array.bytes, self._read_in(inner, self._program.parameter(inner, position).name))

    def _read_in(self, computation: str, name: str) -> int:
        """Bytes that a computation reads of an array, where it cuts some rows of it only."""
        total = 0
        for user in self._program.computations[computation]:
            for position in _positions(user, {name}):
                if user.opcode == "bitcast" or self._renames(user):
                    total += self._read_in(computation, user.name)
                elif user.opcode == "pad":  # of which a part is cut, as likely here as there
                    read = self._read_in(computation, user.name)
                    whole = self._lines[computation][name].arrays[0].size
                    total += read * whole // user.arrays[0].size
                elif user.opcode != "tuple":
                    array = self._lines[computation][name].arrays[0]
                    total += self._read_of(user, position, array)
        return total

    def _renames(self, one: Instruction) -> bool:
        """Whether a fusion within a fusion only gives an array another shape."""
        return one.opcode == "fusion" and all(
            inner.opcode in ("parameter", "bitcast")
            for inner in self._program.computations[one.called("calls")]
        )

    def _written(self, one: Instruction, lines: dict[str, Instruction]) -> list[tuple[Array, int]]:
        """Each array of an instruction's result, and the bytes of it that are new."""
        if one.opcode in UPDATES:
            update = lines[one.operands[1 if one.opcode == "dynamic-update-slice" else -1]]
            return [(one.arrays[0], update.arrays[0].bytes)]
        if one.opcode != "fusion":
            return [(array, array.bytes) for array in one.arrays]
        inner = self._lines[one.called("calls")]
        made = _elements(next(line for line in inner.values() if line.root), inner)
        if len(made) != len(one.arrays):
            return [(array, array.bytes) for array in one.arrays]
        return [
            (array, self._written(line, inner)[0][1] if line.opcode in UPDATES else array.bytes)
            for array, line in zip(one.arrays, made, strict=True)
        ]


class _Reader(_Sizes):
    """A program while it is read."""

    def __init__(self, program: Program, scores: int, filled: float) -> None:
        super().__init__(program)
        self._scores, self._filled = scores, filled
        loops = [one for one in program.computations[program.entry] if one.opcode == "while"]
        self._loop = loops[0] if len(loops) == 1 else None
        self._pass = self._loop.called("body") if self._loop else program.entry

    def read(self) -> Traffic:
        """The program's traffic."""
        found = Traffic()
        for place, one, times in self._executed(self._pass):
            found.kernels += times
            if (cycles := one.number("estimated_cycles")) is not None:
                found.cycles = (found.cycles or 0) + times * cycles
            for kind, size in self._moves(place, one):
                found.bytes[kind] += times * size
        if self._loop:
            for one in self._program.computations[self._program.entry]:
                if one.opcode not in NO_WORK and not one.callees:
                    for kind, size in self._moves(self._program.entry, one):
                        found.call_bytes[kind] += size
        return found

    def _executed(self, computation: str) -> Iterator[tuple[str, Instruction, int]]:
        """Instructions that do work, with their computation and how often they run."""
        for one in self._program.computations[computation]:
            if callees := one.callees:
                times = one.number("known_trip_count") or 1
                for inner in callees:
                    for place, line, repeated in self._executed(inner):
                        yield place, line, times * repeated
            elif one.opcode not in NO_WORK and "AllocateBuffer" not in one.rest:
                yield computation, one, 1

    def _moves(self, place: str, one: Instruction) -> Iterator[tuple[str, int]]:
        """Kind and bytes of all that an instruction reads and writes in main memory."""
        lines = self._lines[place]
        weights = [0]
        if not one.opcode.endswith("-done"):
            for position, operand in enumerate(one.operands):
                if operand not in lines or operand in one.operands[:position]:
                    continue
                origin = self._origin(place, operand)
                for array in lines[operand].arrays[:1]:
                    if "params[" in origin and array.size >= MATRIX:
                        weights.append(array.size)
                    if array.space == 0:
                        kind = self._kind(place, operand, origin, array)
                        size = self._read_of(one, position, array)
                        if kind == "cache" and one.opcode == "custom-call":
                            # Our kernels read a layer of the cache of all layers [B, L, ...].
                            size = round(size * self._filled)
                            size //= array.dims[1] if array.dims[4:] else 1
                        yield kind, size
        if one.opcode.endswith("-start"):
            return  # written when it is done
        for array, size in self._written(one, lines):
            if array.space:
                continue
            updated = self._origin(place, one.operands[0]) if one.operands else ""
            copied = array.size >= max(weights) > 0 and one.opcode != "custom-call"
            if copied:
                yield "weight copies", size
            elif size < array.bytes and "cache" in updated:
                yield "cache", size
            else:
                yield self._kind(place, one.name, "", array), size

    def _kind(self, place: str, name: str, origin: str, array: Array) -> str:
        if "params[" in origin:
            return "weights"
        if re.search(r"cache\.(keys|values)", origin):
            return "cache"
        if array.size == self._scores:
            return "scores"
        return "partial sums" if self._is_partial(place, name) else "rest"

    def _is_partial(self, place: str, name: str) -> bool:
        """Whether a product made it for a sum: XLA splits long products of few rows on a GPU."""
        made = self._lines[place].get(name)
        if made is None or made.opcode != "fusion" or not self._holds(made, {"dot"}):
            return False
        users = [one for one in self._program.computations[place] if name in one.operands]
        return bool(users) and all(self._sums(user, user.operands.index(name)) for user in users)

    def _holds(self, fusion: Instruction, opcodes: set[str]) -> bool:
        """Whether a fusion, or a fusion in it, computes one of these."""
        return any(
            one.opcode in opcodes or (one.opcode == "fusion" and self._holds(one, opcodes))
            for one in self._program.computations[fusion.called("calls")]
        )

    def _sums(self, user: Instruction, position: int) -> bool:
        """Whether an instruction reads an operand to sum it."""
        if user.opcode == "reduce":
            return any(
                one.root and one.opcode == "add"
                for one in self._program.computations[user.called("to_apply")]
            )
        if user.opcode != "fusion":
            return False
        inner = user.called("calls")
        names = {self._program.parameter(inner, position).name}
        for one in self._program.computations[inner]:
            if names & {*one.operands}:
                if one.opcode in MOVES:
                    names.add(one.name)
                elif not self._sums(one, next(iter(_positions(one, names)))):
                    return False
        return True

    def _origin(self, place: str, name: str) -> str:
        """Label of the argument that an array is a copy or a part of; "" for what is computed."""
        one = self._lines[place].get(name)
        if one is None:
            return ""
        if one.opcode == "parameter":
            return one.label if place == self._program.entry else ""
        if one.opcode == "get-tuple-element":
            source = self._lines[place].get(one.operands[0])
            index = int(re.search(r"\bindex=(\d+)", one.rest)[1])  # pyrefly: ignore
            if source is None:
                return ""
            if source.opcode == "tuple":
                return self._origin(place, source.operands[index])
            if source.opcode == "parameter" and self._loop and place == self._pass:
                given = self._lines[self._program.entry][self._loop.operands[0]]
                return self._origin(self._program.entry, given.operands[index])
            return self._origin(place, source.name)
        only_moved = one.opcode in MOVES or (
            one.opcode == "fusion"
            and len(one.operands) == 1
            and {inner.opcode for inner in self._program.computations[one.called("calls")]} <= MOVES
        )
        return self._origin(place, one.operands[0]) if only_moved and one.operands else ""


def _elements(one: Instruction, lines: dict[str, Instruction]) -> list[Instruction]:
    """What makes an array, or each array of a tuple."""
    if one.opcode == "bitcast":
        return _elements(lines[one.operands[0]], lines)
    if one.opcode == "tuple":
        return [made for name in one.operands for made in _elements(lines[name], lines)]
    return [one]


def _positions(user: Instruction, names: set[str]) -> list[int]:
    return [place for place, operand in enumerate(user.operands) if operand in names]
