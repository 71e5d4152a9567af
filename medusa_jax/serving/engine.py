"""The engine: token ids to token ids, in slots that waiting jobs refill as rows end.

    engine.submit(job)     a prompt waits for a slot
    engine.advance()       fills free slots, runs a bounded number of steps, reports progress
    engine.cancel(job)     its slot becomes free

A row that ends gives its slot to the next job, so no job waits for the longest text of a
batch. Programs are compiled ahead of time, when a shape is first needed or by `warm_up`;
compilation is no part of the time that `stats` counts. The contract is JetStream's (prefill,
insert, generate, free) with a queue in front; here prompts are read into their rows.
"""

import collections
import functools
import time
from collections.abc import Sequence

import jax

from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.decoding.decoder import Decoder, row_bytes
from medusa_jax.decoding.state import Output
from medusa_jax.decoding.stats import Stats, step_bytes
from medusa_jax.distributed.hardware import memory_bytes
from medusa_jax.drafting.drafter import Params
from medusa_jax.serving.jobs import Job, Progress, Row
from medusa_jax.serving.ladder import Ladder
from medusa_jax.serving.load import Load
from medusa_jax.serving.programs import fitting
from medusa_jax.serving.reader import Reader
from medusa_jax.serving.slots import Slots


class Engine:
    """Slots of one decoder, filled from a queue.

    Attributes:
      decoder: what decodes; its capacity is the most that a job may ask for.
      slots: rows decoded together.
      stats: what was decoded so far, and its cost.
      stop_ids, repetition_penalty, seed: of jobs that have none of their own.
      ladder: batch sizes and trees to choose from by load; default: those of the decoder alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params | Parameters,
        *,
        slots: int = 1,
        stop_ids: Sequence[int] = (),
        repetition_penalty: float = 1.0,
        seed: int = 0,
        ladder: Ladder | None = None,
    ) -> None:
        self.decoder, self.slots, self.stats = decoder, slots, Stats()
        parameters = Parameters.of(params)
        self._batch = Slots(decoder, parameters, tuple(stop_ids), repetition_penalty, seed)
        self._waiting: collections.deque[Job] = collections.deque()
        self._rows: dict[int, Row] = {}
        if ladder is None or jax.process_count() > 1:  # whose clocks would choose differently
            ladder = Ladder((), (decoder.drafter,), (1.0,))
        self._reader, self._load = Reader(self._batch), Load(ladder, self._batch, slots)
        self._most_waiting = min(slots, most_rows(decoder, parameters.shapes) + 1)
        bytes_of = functools.partial(step_bytes, decoder, parameters.shapes)
        self._step_bytes, self._token_bytes = bytes_of(0.0), bytes_of(1.0) - bytes_of(0.0)

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
          InputError: its prompt is empty, holds ids beyond the vocabulary, or does not fit, it has
            too many stop tokens, or no memory holds its cache; the message begins with `name`.
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

    def warm_up(self, prompt_tokens: int, max_new_tokens: int, room: int = 0) -> None:
        """Compiles what jobs like this need, before they arrive, and reads the parameters."""
        self._load.warm_up(Job([0] * prompt_tokens, max_new_tokens, room=room))

    def close(self) -> None:
        """Compiles no further program in the background."""
        self._batch.close()

    def advance(self, *, more: bool = True) -> list[Progress]:
        """Fills free slots, reads prompts, and steps until a row ends or for a bounded time.

        Args:
          more: other jobs may come. Without them, an idle engine begins with no more rows than
            jobs, rounded up to a power of two so that few programs are compiled.
        """
        begun = time.perf_counter() - self._batch.programs.compile_seconds
        self._fill(more)
        if not self._rows:
            return []
        writing = self._reader.read(self._rows)
        begins = any(row.begins for row in self._rows.values())
        passes, seconds = self._load.run(writing, begins=begins) if writing else (0, 0.0)
        done = self._batch.outputs() if writing else []
        self.stats.compile_seconds = self._batch.programs.compile_seconds
        self.stats.add_passes(passes, seconds)
        self.stats.seconds += time.perf_counter() - self._batch.programs.compile_seconds - begun
        report = self._report(passes, done)
        self._load.saw([made for progress in report for made in progress.steps])
        return report

    def _fill(self, more: bool) -> None:
        """Gives free slots to waiting jobs."""
        needed = min(len(self._rows) + len(self._waiting), self.slots)
        if not self._rows and self._waiting:
            self._load.begin([*self._waiting][:needed], more)
        elif self._rows:
            self._regroup(self._load.size(needed, more))
        while self._waiting and len(self._rows) < self._batch.rows:
            if self._rows and not self._batch.fits(self._batch.rows, self._waiting[0].tokens):
                break  # until rows have ended
            slot = next(slot for slot in range(self._batch.rows) if slot not in self._rows)
            job = self._waiting.popleft()
            self._batch.grow(job.tokens)
            self._rows[slot] = Row(job, self.stats.seconds)
            self.stats.prompts += 1

    def _regroup(self, size: int) -> None:
        """A batch of this size with the same rows."""
        if size != self._batch.rows and self._batch.fits(size):
            self._batch.regroup([*self._rows, *[-1] * (size - len(self._rows))])
            self._rows = dict(enumerate(self._rows.values()))

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


def most_rows(decoder: Decoder, params: Params) -> int:
    """Rows that the memory holds at most: more jobs need not wait for them."""
    return memory_bytes() // row_bytes(fitting(decoder, 1), params)


def run_jobs(engine: Engine, jobs: Sequence[Job]) -> list[Output]:
    """Decodes all jobs; their outputs in the order of the jobs.

    Raises:
      InputError: a job cannot be decoded.
      FloatingPointError: a row has failed.
    """
    done: dict[Job, Output] = {}
    for job in jobs:
        engine.submit(job)
    while not engine.idle:
        done |= {p.job: p.output for p in engine.advance() if p.output is not None}
    for number, job in enumerate(jobs):
        done[job].check(f"prompt {number}")
    return [done[job] for job in jobs]
