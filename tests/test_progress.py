"""The time left that a bar tells."""

import heapq

import numpy as np

from medusa_jax.progress import progress


def ends(lengths: np.ndarray, slots: int) -> list[float]:
    """When parts end that run in slots, each begun as an earlier part ends."""
    running = [float(length) for length in lengths[:slots]]
    ended, rest = [], list(lengths[slots:])
    heapq.heapify(running)
    while running:
        ended.append(heapq.heappop(running))
        if rest:
            heapq.heappush(running, ended[-1] + rest.pop(0))
    return ended


def test_the_time_left_counts_parts_that_are_half_done():
    """After a tenth of 1,000 answers in 64 slots, as `distill` writes them."""
    lengths = np.random.default_rng(0).integers(20, 320, 1000)
    when = ends(lengths, 64)
    left = {}
    for side_by_side in (1, 64):
        bar = progress(total=1000, unit="inputs", average=True, side_by_side=side_by_side)
        rate = (100 - bar.initial) / when[99]
        left[side_by_side] = 900 / rate / (when[-1] - when[99])
        bar.close()
    assert 0.75 < left[64] < 1.25
    assert left[1] > left[64]  # whoever does not count them expects too long a time


def test_a_bar_that_is_not_shown_counts_nothing():
    progress(total=2, unit="inputs", side_by_side=8, shown=False).update()
