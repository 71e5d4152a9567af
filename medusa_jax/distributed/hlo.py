"""Reads the text of a compiled program: its computations, and the arrays that each line makes.

    %f.1 = bf16[64,4096]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%g

is an instruction with opcode "fusion", operands ("a", "b") and a result in memory space 1.
"""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0}  # of types whose name does not end in their width
_RUNS = {"while": "body", "call": "to_apply"}  # what an instruction calls the computation it runs
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a compiled program.

    Attributes:
      space: 0 is the device's main memory (HBM); a TPU's 1 is its memory on chip (VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles: bf16[2,3] has 12."""
        width = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(width[0]) if width else 8)
        return math.ceil(self.size * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `%name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        """The array, or each array of the tuple."""
        return [
            Array(dtype, tuple(int(size) for size in dims.split(",") if size), _space(layout))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        ]

    @property
    def label(self) -> str:
        """Name in the Python function: `params['head']['kernel']` of an argument."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return (found[1] if found else self.name).replace("\\'", "'")

    def called(self, role: str) -> str:
        """The computation that this instruction calls as `role`, such as "body"."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"{self.name} names no {role}: {self.rest[:200]}")
        return found[1]

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if found:
            return re.findall(r"%?([\w.\-]+)", found[1])
        return [self.called("true_computation"), self.called("false_computation")]

    @property
    def callees(self) -> list[str]:
        """The computations that a loop, a call or a conditional runs, of a loop its body."""
        if self.opcode == "conditional":
            return self.branches
        role = _RUNS.get(self.opcode)
        return [self.called(role)] if role else []

    def number(self, key: str) -> int | None:
        """A number among what the compiler notes, such as "estimated_cycles"."""
        found = re.search(rf'"{key}":\{{?(?:"n":)?"?(\d+)', self.rest)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and which of them is the entry."""

    text: str
    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads what `as_text()` of `jax.jit(...).lower(...).compile()` says.

        Raises:
          ValueError: there is no entry computation.
        """
        computations: dict[str, list[Instruction]] = {}
        entry, name = "", ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                name = head[2]
                computations[name] = []
                entry = name if head[1] else entry
            elif name and " = " in line:
                computations[name].append(instruction(line))
        if not entry:
            raise ValueError(f"no entry computation in {text[:200]!r}")
        return cls(text, computations, entry)

    @property
    def arguments(self) -> list[Instruction]:
        """The arguments of the program."""
        return [one for one in self.computations[self.entry] if one.opcode == "parameter"]

    def parameter(self, computation: str, position: int) -> Instruction:
        """The parameter of a computation at a position."""
        (found,) = (
            one
            for one in self.computations[computation]
            if one.opcode == "parameter" and one.operands == (str(position),)
        )
        return found


def instruction(line: str) -> Instruction:
    """One line of a computation."""
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


def _space(layout: str) -> int:
    """Memory space in a layout: "1,0:T(8,128)S(1)" -> 1, "1,0" -> 0."""
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _closing(text: str) -> int:
    """Length of the parenthesis that `text` begins with: "(a(b)) c" -> 6."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return position + 1
    raise ValueError(f"no closing parenthesis in {text[:100]}")
