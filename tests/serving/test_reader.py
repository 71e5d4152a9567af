"""Which prompt is read next: short prompts soon, and long prompts all the same."""

from types import SimpleNamespace
from typing import Any

import pytest

from medusa_jax.serving.jobs import Job, Row
from medusa_jax.serving.reader import OVERTAKE, Reader

BLOCK, SMALL = 16, 4


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The slots that were read, in order."""
    monkeypatch.setattr("medusa_jax.decoding.prompt_blocks.CPU_BLOCK", BLOCK)
    return []


def reader(read: list[int]) -> Reader:
    def block(job: Job, slot: int, start: int, *, waited_for: bool) -> int:
        read.append(slot)
        return min(SMALL if waited_for else BLOCK, len(job.prompt_ids) - start)

    batch: Any = SimpleNamespace(read=block)
    return Reader(batch)


def rows(*lengths: int) -> dict[int, Row]:
    return {slot: Row(Job([1] * length, 4), slot) for slot, length in enumerate(lengths)}


def test_a_short_prompt_goes_before_a_long_one(read: list[int]):
    reading, waiting = reader(read), rows(100, 10, 100)
    assert reading.read(waiting) == 1
    assert read == [1]  # which begins before the long ones are read on
    for _ in range(50):
        reading.read(waiting)
    assert all(not row.unread for row in waiting.values())


def test_most_of_a_batch_is_filled_before_it_steps(read: list[int]):
    assert reader(read).read(rows(*[16] * 8)) == 4
    assert reader([]).read(rows(*[100] * 8)) == 0  # long prompts are not: a block a call


def test_blocks_of_long_prompts_are_small_beside_rows_that_write(read: list[int]):
    reading, waiting = reader(read), rows(100, 10)
    reading.read(waiting)
    assert not waiting[1].unread and waiting[0].read == 0
    for blocks in (1, 2):
        reading.read(waiting)
        assert waiting[0].read == blocks * SMALL
    del waiting[1]
    while waiting[0].unread:
        before = waiting[0].read
        reading.read(waiting)
    assert waiting[0].read == 100 and before == 100 - BLOCK


def test_a_long_prompt_does_not_wait_for_ever(read: list[int]):
    reading, waiting = reader(read), rows(100)
    for number in range(1, 80):
        waiting[number] = rows(16)[0]
        reading.read(waiting)
    assert not waiting[0].unread
    assert read.index(0) <= OVERTAKE
