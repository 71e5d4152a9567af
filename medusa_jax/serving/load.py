"""Calls of the device loop: for how many steps, with how many rows, and with which drafter."""

import time
from collections.abc import Sequence

import jax

from medusa_jax.serving.jobs import Job
from medusa_jax.serving.ladder import Chooser, Ladder
from medusa_jax.serving.slots import Slots

# A call of the device loop ends about this soon, so that signals and streams are served.
CALL_SECONDS = 0.1
FIRST_STEPS, MOST_STEPS = 4, 256
# Calls that need fewer rows before a batch shrinks: it copies its cache, and again as it grows.
SHRINK_AFTER = 10
# Processes that share a mesh take the same number of steps, whatever their clocks say.
SHARED_STEPS = 16


class Load:
    """Chooses by load, among the programs that are there; the others are compiled meanwhile."""

    def __init__(self, ladder: Ladder, batch: Slots, slots: int) -> None:
        self._ladder, self._batch, self._slots = ladder, batch, slots
        self._chooser, self._steps = Chooser(ladder), FIRST_STEPS
        self._last, self._fewer = (0, 0, 0.0), 0

    def warm_up(self, job: Job) -> None:
        """Compiles a tree for a single row, and plain decoding in all slots."""
        for rows in (1, self._slots) if self._ladder.rows else (self._slots,):
            self._batch.warm_up(job, job.capacity, rows, self._ladder.drafters[self._first(rows)])
        self._batch.programs.read_parameters()

    def begin(self, jobs: Sequence[Job], more: bool) -> None:
        """A batch for these jobs.

        Parameters that are still in files are read after the first programs are compiled, which
        takes much memory for a time.

        Args:
          more: others may come.
        """
        tokens = max(job.capacity for job in jobs)
        self._batch.fit(tokens)
        rows = self.size(len(jobs), more)
        if self._batch.programs.parameters.unread:
            self._batch.warm_up(jobs[0], tokens, rows, self._ladder.drafters[self._first(rows)])
            self._batch.programs.read_parameters()
        self._batch.begin(rows)

    def _first(self, rows: int) -> int:
        """What decodes first: of several rows plain steps, which no batch is too large for."""
        return 0 if rows > 1 else len(self._ladder.drafters) - 1

    def size(self, needed: int, more: bool) -> int:
        """Rows of a batch for so many jobs. Without a ladder, a batch that runs stays as it is.

        Args:
          more: others may come.
        """
        if not self._ladder.rows:
            fewest = self._slots if more else min(self._slots, 1 << (needed - 1).bit_length())
            return self._batch.rows or fewest

        def ready(rows: int) -> bool:
            return any(self._batch.can_run(rows, drafter) for drafter in self._ladder.drafters)

        rows = self._chooser.rows(needed, ready)
        self._fewer = self._fewer + 1 if rows < self._batch.rows else 0
        return self._batch.rows if 0 < self._fewer < SHRINK_AFTER else rows

    def run(self, least: int, *, begins: bool = False) -> tuple[int, float]:
        """Steps while so many rows run, or for a bounded time: the steps, and their seconds.

        Args:
          begins: a text begins: a single step, so that its first token is not kept back.
        """
        drafters, rows = self._ladder.drafters, self._batch.rows
        ready = [i for i, each in enumerate(drafters) if self._batch.can_run(rows, each)]
        number = self._chooser.step(rows, ready or [self._first(rows)])
        self._batch.wait()  # for prompts that are still being read
        start = time.perf_counter() - self._batch.programs.compile_seconds
        steps = self._steps
        if jax.process_count() == 1 and not self._chooser.timed(rows, number):
            steps = min(steps, FIRST_STEPS)  # a trial, which may be slow
        if jax.process_count() == 1 and begins:
            steps = 1
        passes = self._batch.run(steps, least, drafters[number])
        seconds = time.perf_counter() - self._batch.programs.compile_seconds - start
        self._steps = next_steps(self._steps, passes, seconds)
        wanted = self._chooser.wanted(rows)
        self._batch.prepare([(size, drafters[each]) for size, each in wanted])
        self._last = rows, number, seconds / passes if passes else 0.0
        return passes, seconds

    def saw(self, accepted: Sequence[int]) -> None:
        """Learns from the last call: the tokens of each step of each row."""
        if accepted:
            self._chooser.saw(*self._last, accepted)


def next_steps(steps: int, passes: int, seconds: float) -> int:
    """Steps of the next call, which shall take CALL_SECONDS.

    After 4 passes in 0.01 s, which 40 would fill, 16: at most four times as many as before.
    """
    if jax.process_count() > 1:
        return SHARED_STEPS
    fitting_steps = int(CALL_SECONDS * max(passes, 1) / max(seconds, 1e-6))
    return min(max(fitting_steps, 1), 4 * steps, MOST_STEPS)
