"""Batch sizes and trees by load: few rows and a wide tree for a single user, plain steps for many.

A step costs what its batch costs, whether its rows write or not; a tree pays where its tokens are
nearly free. How long steps take is seen as they run. How much a tree accepts is known from its
tuning, and scaled by what is accepted now. No text depends on either choice, but by typical
acceptance, whose texts depend on the tree.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.hydra_drafter import HydraDrafter
from medusa_jax.drafting.medusa_drafter import MedusaDrafter
from medusa_jax.drafting.medusa_ngram_drafter import MedusaNgramDrafter
from medusa_jax.drafting.tree import Tree

ROW_FACTOR = 4  # between one batch size and the next
SMALLER = (0.5, 0.25)  # sizes of grown trees, as parts of the tuned size
SMOOTHING = 0.2  # weight of the newest call in the mean of what is accepted
FIRST_CALLS, CALLS = 3, 9  # in which a step is timed before it is judged, and judged by
LEAST_SHARE = 0.8  # of plain decoding's tokens per second, that a tree has to promise
PROBE_CALLS = 100  # so often another than the best is tried again, in turn


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What an engine chooses from.

    Attributes:
      rows: batch sizes, rising; the last has all slots. None: all slots, always.
      drafters: plain decoding first, then trees by size. All draft alike, so that a state fits.
      lengths: mean accepted length of each, as it was tuned.
    """

    rows: tuple[int, ...]
    drafters: tuple[Drafter, ...]
    lengths: tuple[float, ...]


def row_sizes(slots: int) -> tuple[int, ...]:
    """Batch sizes up to all slots: 16 -> (1, 4, 16), 6 -> (1, 4, 6)."""
    sizes, size = [], 1
    while size < slots:
        sizes.append(size)
        size *= ROW_FACTOR
    return (*sizes, slots)


def ladder_of(
    drafter: Drafter, slots: int, tuned: Sequence[tuple[Tree | DynamicTree, float]]
) -> Ladder:
    """The ladder below a drafter's tree.

    A grown tree of heads has smaller trees below it, which read the same drafts.

    Args:
      tuned: trees, and the mean accepted length of each; may be empty.
    """
    drafters: list[Drafter] = [NoDraft()]
    of_heads = MedusaDrafter | MedusaNgramDrafter | HydraDrafter
    if isinstance(drafter, of_heads) and isinstance(drafter.tree, DynamicTree):
        tree = drafter.tree
        sizes = sorted({max(2, int(tree.size * part)) for part in SMALLER} - {tree.size})
        drafters += [drafter.smaller(dataclasses.replace(tree, size=size)) for size in sizes]
    if drafter.size > 1:
        drafters.append(drafter)
    lengths = tuple(accepted_length(each.size, tuned) for each in drafters)
    return Ladder(row_sizes(slots), tuple(drafters), lengths)


def accepted_length(size: int, tuned: Sequence[tuple[Tree | DynamicTree, float]]) -> float:
    """What a tree of this size is expected to accept, between those that were tuned.

    Where none was, each doubling is expected to add 0.4 tokens, as it does at first for most.
    """
    best = {1: 1.0}
    for tree, length in tuned:
        best[tree.size] = max(length, best.get(tree.size, 1.0))
    if len(best) == 1:
        return 1 + 0.4 * float(np.log2(size))
    sizes = sorted(best)
    return float(np.interp(size, sizes, [best[each] for each in sizes]))


class Chooser:
    """Chooses a step of the ladder for each call of the device loop.

    Attributes:
      gain: tokens beyond the root that are accepted now, over those of the tuning.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.ladder, self.gain, self._calls = ladder, 1.0, 0
        # Of the latest calls: a first call, or one beside other work, tells little by itself.
        self._seconds = collections.defaultdict[tuple[int, int], collections.deque[float]](
            lambda: collections.deque(maxlen=CALLS)
        )
        self._line = self._fitted()

    def rows(self, needed: int, ready: Callable[[int], bool]) -> int:
        """The smallest batch for so many rows whose programs are ready; else that of all slots."""
        for rows in self.ladder.rows:
            if rows >= needed and ready(rows):
                return rows
        return self.ladder.rows[-1]

    def step(self, rows: int, ready: Sequence[int]) -> int:
        """Which step promises most tokens per second, of those whose programs are ready.

        A step that was hardly timed is tried first. A step that promises less than half as much
        as the best is not tried again.
        """
        for number in ready:
            if not self.timed(rows, number):
                return number
        ranked = sorted(ready, key=lambda number: -self.promise(rows, number))
        self._calls += 1
        turn, rest = divmod(self._calls, PROBE_CALLS)
        most = self.promise(rows, ranked[0])
        others = [number for number in ranked[1:] if 2 * self.promise(rows, number) >= most]
        return others[turn % len(others)] if not rest and others else ranked[0]

    def timed(self, rows: int, number: int) -> bool:
        """Whether calls enough tell how long a step takes."""
        return len(self._seconds[rows, number]) >= FIRST_CALLS

    def wanted(self, rows: int) -> list[tuple[int, int]]:
        """Batch sizes and steps that are worth their compilation, which takes time from the users.

        Those of the present batch come first, then plain steps, then what promises most.

        Args:
          rows: of the present batch.
        """
        steps = [
            (size, each) for size in self.ladder.rows for each in range(len(self.ladder.drafters))
        ]
        worth = {step: self.worth(*step) for step in steps}
        worthwhile = [step for step in steps if not step[1] or worth[step] >= LEAST_SHARE]
        return sorted(worthwhile, key=lambda step: (step[0] != rows, step[1] > 0, -worth[step]))

    def worth(self, rows: int, number: int) -> float:
        """Tokens per second of a step over those of plain decoding; 0 while nobody can know.

        A step that was never timed costs what its tokens would, on a line through those timed.
        """
        if self._line is None:
            return 0.0
        slope, first, least = self._line

        def promise(number: int) -> float:
            if self.timed(rows, number):
                return self.promise(rows, number)
            size = rows * self.ladder.drafters[number].size
            return self._length(number) / max(first + slope * size, least)

        return promise(number) / promise(0)

    def _fitted(self) -> tuple[float, float, float] | None:
        """Seconds of a token more, of none, and of the fastest step; None before two were timed."""
        timed = [key for key, calls in self._seconds.items() if len(calls) >= FIRST_CALLS]
        tokens = [rows * self.ladder.drafters[number].size for rows, number in timed]
        if len({*tokens}) < 2:
            return None
        seconds = [statistics.median(self._seconds[key]) for key in timed]
        slope, first = np.polyfit(tokens, seconds, 1)
        return float(slope), float(first), min(seconds)

    def promise(self, rows: int, number: int) -> float:
        """Tokens per second of a row that writes."""
        return self._length(number) / statistics.median(self._seconds[rows, number])

    def _length(self, number: int) -> float:
        """Tokens that a row is expected to accept in a step."""
        return 1 + self.gain * (self.ladder.lengths[number] - 1)

    def saw(self, rows: int, number: int, seconds: float, accepted: Sequence[int]) -> None:
        """Learns from a call.

        Args:
          seconds: of each step.
          accepted: tokens of each step of each row.
        """
        self._seconds[rows, number].append(seconds)
        self._line = self._fitted()  # once a call, not once for each choice
        expected = self.ladder.lengths[number] - 1
        if accepted and expected > 0:
            gain = (float(np.mean(accepted)) - 1) / expected
            self.gain += SMOOTHING * (gain - self.gain)
