"""Parameters whose shapes are known at once, and whose numbers are read when they are needed.

Compilers need shapes alone, and much memory. So programs are compiled first, and numbers are read
into the memory that the compiler has given back.
"""

from collections.abc import Callable
from typing import Any

from medusa_jax.drafting.drafter import Params


class Part:
    """A part of a model, such as its backbone.

    Attributes:
      shapes: its pytree of abstract arrays, or of arrays that were in memory at once.
    """

    def __init__(self, shapes: Any, read: Callable[[], Any] | None = None) -> None:
        """A part in files; without `read`, the shapes are the arrays themselves."""
        self.shapes, self._read = shapes, read
        self._arrays = None if read else shapes

    @property
    def arrays(self) -> Any:
        """Its numbers, on their devices."""
        if self._read is not None:
            self._arrays, self._read = self._read(), None  # its files are open no longer
        return self._arrays

    @property
    def unread(self) -> bool:
        """Whether its numbers are still in files."""
        return self._read is not None


class Parameters:
    """A model's parameters: its parts by name, {"backbone": ..., "heads": ...}."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, params: "Params | Parameters") -> "Parameters":
        """Arrays in memory as parameters; parameters stay as they are."""
        if isinstance(params, Parameters):
            return params
        return cls({name: Part(part) for name, part in params.items()})

    @property
    def shapes(self) -> Params:
        """What programs are compiled for, also once the numbers are read: so engines share them."""
        return {name: part.shapes for name, part in self._parts.items()}

    @property
    def arrays(self) -> Params:
        """The numbers, on their devices; the first call reads them, which may take long.

        Raises:
          InputError: a file cannot be read.
        """
        return {name: part.arrays for name, part in self._parts.items()}

    @property
    def unread(self) -> bool:
        """Whether numbers are still in files."""
        return any(part.unread for part in self._parts.values())

    def part(self, name: str) -> Part:
        """One part alone, which other parameters may share."""
        return self._parts[name]

    def having(self, **parts: Part) -> "Parameters":
        """These, with parts that are added or that take the place of their own."""
        return Parameters(self._parts | parts)
