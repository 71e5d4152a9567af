"""Rows to global batches: which rows are in step n is a function of (seed, n) alone.

So there is no iterator to save: a run that resumes at step n asks for batch n.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from medusa_jax.data.packing import Rows
from medusa_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of all epochs: each epoch takes all rows once, in an order of its own.

    Attributes:
      rows: what there is.
      batch_size: rows of one step, over all processes.
      accumulation: pieces a step's rows pass through in.
      seed: of the orders.
      sharding: of arrays [A, B, T].
    """

    rows: Rows
    batch_size: int
    accumulation: int
    seed: int
    sharding: NamedSharding

    def __post_init__(self) -> None:
        if len(self.rows) < self.batch_size:
            raise InputError(
                f"the data makes {len(self.rows)} rows of {self.rows.length} tokens, fewer than "
                f"optim.batch_size {self.batch_size}: give more data or a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the rows; the few rows left over sit this epoch out."""
        return len(self.rows) // self.batch_size

    def row_numbers(self, step: int) -> np.ndarray:
        """Rows of a step [B], counted from step 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return order[place * self.batch_size :][: self.batch_size]

    def __call__(self, step: int) -> dict[str, jax.Array]:
        """Arrays [A, B, T] of a step; each process makes the rows of its own devices."""
        numbers = self.row_numbers(step).reshape(self.accumulation, -1)
        return global_arrays(self.rows, numbers, self.sharding)


def global_arrays(rows: Rows, numbers: np.ndarray, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Rows `numbers` [A, B] as arrays [A, B, T, ...], made where they are needed."""
    here: Any = sharding.addressable_devices_indices_map((*numbers.shape, rows.length))
    wanted = sorted({r for index in here.values() for r in numbers[index[:2]].flat})
    place = {r: i for i, r in enumerate(wanted)}
    local = rows.arrays(wanted)

    def part(array: np.ndarray, index: Any) -> np.ndarray:
        mine = numbers[index[:2]]
        return array[[place[r] for r in mine.flat]].reshape(*mine.shape, *array.shape[1:])

    return {
        key: jax.make_array_from_callback(
            (*numbers.shape, *array.shape[1:]), sharding, lambda index, a=array: part(a, index)
        )
        for key, array in local.items()
    }


def in_order(rows: Rows, batch_size: int, limit: int) -> list[np.ndarray]:
    """Row numbers [1, B] of every batch of an evaluation; -1, an empty row, fills the last."""
    count = min(len(rows), limit or len(rows))
    numbers = np.full(-(-count // batch_size) * batch_size, -1)
    numbers[:count] = np.arange(count)
    return list(numbers.reshape(-1, 1, batch_size))
