"""The engine: token ids to token ids, in slots that waiting jobs refill as rows end.

    engine.submit(job)     a prompt waits for a slot
    engine.advance()       fills free slots, runs a bounded number of steps, reports progress
    engine.cancel(job)     its slot becomes free

A row that ends gives its slot to the next job, so no job waits for the longest text of a
batch. Programs are compiled ahead of time, when a shape is first needed or by `warm_up`;
compilation is no part of the time that `stats` counts. The contract is JetStream's (prefill,
insert, generate, free) with a queue in front.
"""

import collections
import time
from collections.abc import Sequence

import jax

from medusa_jax.decoding.decoder import Decoder, row_bytes
from medusa_jax.decoding.prompt_blocks import longest_block
from medusa_jax.decoding.state import Output
from medusa_jax.decoding.stats import Stats, step_bytes
from medusa_jax.distributed.hardware import memory_bytes
from medusa_jax.drafting.drafter import Params
from medusa_jax.serving.jobs import Job, Progress, Row
from medusa_jax.serving.ladder import Chooser, Ladder
from medusa_jax.serving.programs import fitting
from medusa_jax.serving.slots import Slots

# A call of the device loop ends about this soon, so that signals and streams are served.
CALL_SECONDS = 0.1
FIRST_STEPS, MOST_STEPS = 4, 256
# Processes that share a mesh take the same number of steps, whatever their clocks say.
SHARED_STEPS = 16


class Engine:
    """Slots of one decoder, filled from a queue.

    Attributes:
      decoder: what decodes; its capacity is the most that a job may ask for.
      slots: rows decoded together.
      stats: what was decoded so far, and its cost.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        *,
        slots: int = 1,
        stop_ids: Sequence[int] = (),
        repetition_penalty: float = 1.0,
        seed: int = 0,
        ladder: Ladder | None = None,
    ) -> None:
        """Args:
        stop_ids, repetition_penalty, seed: of jobs that have none of their own.
        ladder: batch sizes and trees to choose from by load; default: those of the decoder alone.
        """
        self.decoder, self.slots, self.stats = decoder, slots, Stats()
        self._batch = Slots(decoder, params, tuple(stop_ids), repetition_penalty, seed)
        self._waiting: collections.deque[Job] = collections.deque()
        self._rows: dict[int, Row] = {}
        self._steps = FIRST_STEPS
        if ladder is None or jax.process_count() > 1:  # whose clocks would choose differently
            ladder = Ladder((), (decoder.drafter,), (1.0,))
        self._chooser, self._ladder = Chooser(ladder), ladder
        # More rows than that cannot be decoded, so that no more jobs need to wait for them.
        most_rows = memory_bytes() // row_bytes(fitting(decoder, 1), params)
        self._most_waiting = min(slots, most_rows + 1)
        self._step_bytes = step_bytes(decoder, params, 0.0)
        self._token_bytes = step_bytes(decoder, params, 1.0) - self._step_bytes

    @property
    def idle(self) -> bool:
        """Whether no job runs or waits."""
        return not self._rows and not self._waiting

    @property
    def running(self) -> int:
        """Jobs in a slot."""
        return len(self._rows)

    @property
    def hungry(self) -> bool:
        """Whether another job should be submitted: fewer wait than there are slots."""
        return len(self._waiting) < self._most_waiting

    def submit(self, job: Job, name: str = "the prompt", *, next: bool = False) -> None:
        """Lets a job wait for a slot; with `next`, before all others.

        Raises:
          InputError: its prompt is empty, holds ids beyond the vocabulary, or does not fit, or it
            has too many stop tokens; the message begins with `name`.
        """
        self._batch.check(job, name)
        (self._waiting.appendleft if next else self._waiting.append)(job)

    def cancel(self, job: Job) -> None:
        """Forgets a job; its slot is free at once."""
        if job in self._waiting:
            self._waiting.remove(job)
        for slot in [slot for slot, row in self._rows.items() if row.job is job]:
            self._free(slot)
        if self.idle:
            self._batch.clear()

    def reset(self) -> None:
        """Forgets all jobs: after an error in the middle of a call, the state may be gone."""
        self._waiting.clear()
        self._rows.clear()
        self._batch.clear()

    def warm_up(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Compiles what jobs of this shape need, before the first of them arrives.

        Of a ladder, a tree for a single row and plain decoding in all slots: others follow while
        those are used.
        """
        job = Job([0] * prompt_tokens, max_new_tokens)
        if self._ladder.rows:
            self._batch.warm_up(job, 1, self._ladder.drafters[-1])
        self._batch.warm_up(job, self.slots, self._ladder.drafters[0])

    def close(self) -> None:
        """Compiles no further program in the background."""
        self._batch.close()

    def advance(self, *, more: bool = True) -> list[Progress]:
        """Fills free slots, reads prompts, and steps until a row ends or for a bounded time.

        Args:
          more: other jobs may come. Without them, an idle engine begins with no more rows than
            jobs, rounded up to a power of two so that few programs are compiled.
        """
        begun = time.perf_counter() - self._batch.compile_seconds
        self._fill(more)
        if not self._rows:
            return []
        writing = self._read()
        start = time.perf_counter() - self._batch.compile_seconds
        choice = self._choice()
        passes = self._batch.run(self._steps, writing, self._ladder.drafters[choice])
        seconds = time.perf_counter() - self._batch.compile_seconds - start
        self._steps = next_steps(self._steps, passes, seconds)
        done = self._batch.outputs()
        self.stats.compile_seconds = self._batch.compile_seconds
        self.stats.add_passes(passes, seconds)
        self.stats.seconds += time.perf_counter() - self._batch.compile_seconds - begun
        rows, report = self._batch.rows, self._report(passes, done)
        if passes:
            accepted = [tokens for progress in report for tokens in progress.steps]
            self._chooser.saw(rows, choice, seconds / passes, accepted)
        return report

    def run(self, jobs: Sequence[Job]) -> list[Output]:
        """Decodes all jobs; their outputs in the order of the jobs."""
        done: dict[Job, Output] = {}
        for job in jobs:
            self.submit(job)
        while not self.idle:
            done |= {p.job: p.output for p in self.advance() if p.output is not None}
        for number, job in enumerate(jobs):
            done[job].check(f"prompt {number}")
        return [done[job] for job in jobs]

    def _fill(self, more: bool) -> None:
        """Gives free slots to waiting jobs."""
        if not self._rows and self._waiting:
            waiting = list(self._waiting)[: self.slots]
            self._batch.fit(max(max(job.tokens, job.room) for job in waiting))
            self._batch.begin(self._size(len(waiting), more))
        elif self._rows and self._ladder.rows:
            self._regroup(min(len(self._rows) + len(self._waiting), self.slots))
        while self._waiting and len(self._rows) < self._batch.rows:
            slot = next(slot for slot in range(self._batch.rows) if slot not in self._rows)
            job = self._waiting.popleft()
            self._batch.grow(job.tokens)
            self._rows[slot] = self._row(job)

    def _size(self, needed: int, more: bool) -> int:
        """Rows of a batch for so many jobs."""
        if not self._ladder.rows:
            return self.slots if more else min(self.slots, 1 << (needed - 1).bit_length())

        def ready(rows: int) -> bool:
            return any(self._batch.can_run(rows, drafter) for drafter in self._ladder.drafters)

        return self._chooser.rows(needed, ready)

    def _regroup(self, needed: int) -> None:
        """Lets the batch have as many rows as are needed."""
        size = self._size(needed, True)
        if size != self._batch.rows:
            self._batch.regroup([*self._rows, *[-1] * (size - len(self._rows))])
            self._rows = dict(enumerate(self._rows.values()))

    def _choice(self) -> int:
        """The step of the ladder for the next call; others are compiled meanwhile."""
        drafters, rows = self._ladder.drafters, self._batch.rows
        trees_first = drafters[::-1]
        self._batch.prepare([(size, each) for size in self._ladder.rows for each in trees_first])
        ready = [i for i, each in enumerate(drafters) if self._batch.can_run(rows, each)]
        return self._chooser.step(rows, ready or [0 if rows > 1 else len(drafters) - 1])

    def _read(self) -> int:
        """Reads blocks of prompts; how many rows write then.

        A call reads about a block, so that rows that write go on soon. It takes the oldest prompt
        and the shortest in turn: short prompts overtake long ones, and none waits for ever.
        """
        unread = {slot: row for slot, row in self._rows.items() if row.unread}
        tokens, oldest = 0, False
        while unread and (len(unread) == len(self._rows) or tokens < longest_block()):
            oldest = not oldest
            slots = iter(unread) if oldest else sorted(unread, key=lambda slot: unread[slot].unread)
            slot = next(iter(slots))
            row = unread[slot]
            count = self._batch.read(row.job, slot, row.read)
            row.read, tokens = row.read + count, tokens + count
            if not row.unread:
                del unread[slot]
        return len(self._rows) - len(unread)

    def _row(self, job: Job) -> Row:
        """A job that begins now."""
        self.stats.prompts += 1
        return Row(job, self.stats.seconds)

    def _free(self, slot: int) -> None:
        """Gives up a row that may still run on the device."""
        del self._rows[slot]
        if self._rows:
            self._batch.free(slot)

    def _report(self, passes: int, done: list[Output]) -> list[Progress]:
        """What is new in each row; rows that have ended leave their slots."""
        progress, cached = [], 0
        for slot, row in list(self._rows.items()):
            if row.unread:
                continue
            cached += len(done[slot].prompt_ids) + len(done[slot].token_ids)
            progress.append(row.progress(done[slot], self.stats.seconds))
            if (output := progress[-1].output) is not None:
                self.stats.add_output(output)
                if done[slot].running:  # its reader has ended it
                    self._free(slot)
                else:
                    del self._rows[slot]
        if self.idle:
            self._batch.clear()  # its cache: nobody knows when the next job comes
        self.stats.bytes += passes * (self._step_bytes + cached * self._token_bytes)
        return progress


def next_steps(steps: int, passes: int, seconds: float) -> int:
    """Steps of the next call, which shall take CALL_SECONDS.

    After 4 passes in 0.01 s, which 40 would fill, 16: at most four times as many as before.
    """
    if jax.process_count() > 1:
        return SHARED_STEPS
    fitting_steps = int(CALL_SECONDS * max(passes, 1) / max(seconds, 1e-6))
    return min(max(fitting_steps, 1), 4 * steps, MOST_STEPS)
