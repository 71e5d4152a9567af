"""The time left that a bar tells."""

import heapq
import io

import numpy as np

from medusa_jax.progress import progress, seconds_left


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
    for done in (100, 300):
        actual = when[-1] - when[done - 1]
        assert 0.75 < seconds_left(done, 1000, 64, when[done - 1]) / actual < 1.25
    # Whoever does not count them expects too long a time.
    assert seconds_left(100, 1000, 0, when[99]) > 1.3 * seconds_left(100, 1000, 64, when[99])


def test_the_example_of_seconds_left(monkeypatch):
    assert seconds_left(40, 100, 20, 10.0) == 10.0
    assert seconds_left(90, 100, 20, 95.0) == 5.0  # ten run, not twenty
    assert seconds_left(0, 0, 20, 1.0) is None
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with progress(total=110, done=10, unit="inputs", average=True, side_by_side=20) as bar:
        bar.start_t = bar._time() - 10.0
        bar.update(40)
        bar.refresh()
        assert "50/110 [00:10<00:10" in str(bar)


def test_a_bar_that_is_not_shown_counts_nothing():
    progress(total=2, unit="inputs", side_by_side=8, shown=False).update()
