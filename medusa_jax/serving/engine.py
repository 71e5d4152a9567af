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
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from medusa_jax.decoding.decoder import Decoder, check_prompt, padded
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import FINISH_REASONS, RUNNING, Output, State, outputs
from medusa_jax.decoding.stats import Stats, step_bytes
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.drafter import Params
from medusa_jax.serving.programs import Programs, fitting

# A running batch outgrows its capacity by so much at least, so that it seldom does again.
GROWTH = 1.25
# A call of the device loop ends about this soon, so that signals and streams are served.
CALL_SECONDS = 0.1
FIRST_STEPS, MOST_STEPS = 4, 256
# Processes that share a mesh take the same number of steps, whatever their clocks say.
SHARED_STEPS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prompt to continue.

    Attributes:
      prompt_ids: token ids of the prompt.
      max_new_tokens: most tokens to add.
      stream: the random stream that its row draws from: (prompt number, sample number).
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    stream: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Most tokens of prompt and text together."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a call of `advance` did for a job.

    Attributes:
      token_ids: tokens that are new since the last report.
      output: all of the text, once it has ended.
      seconds: time of the engine since its prefill began, compilation excluded.
    """

    job: Job
    token_ids: list[int]
    output: Output | None
    seconds: float


@dataclasses.dataclass
class _Row:
    """A job in a slot, the engine's time when it began, and the tokens reported so far."""

    job: Job
    start: float
    reported: int = 0

    def progress(self, output: Output, now: float) -> Progress:
        """What is new in the row's output, which has ended or not."""
        new = output.token_ids[self.reported :]
        self.reported += len(new)
        ended = output.finish_reason != FINISH_REASONS[RUNNING]
        return Progress(self.job, new, output if ended else None, now - self.start)


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
        seed: int = 0,
    ) -> None:
        self.decoder, self.slots, self.stats = decoder, slots, Stats()
        self._params, self._stop_ids, self._seed = params, tuple(stop_ids), seed
        self._now = decoder  # with the capacity of the state
        self._state: Any = None
        self._waiting: collections.deque[Job] = collections.deque()
        self._rows: dict[int, _Row] = {}
        self._programs, self._steps = Programs(params), FIRST_STEPS
        self._step_bytes = step_bytes(decoder, params, 0.0)
        self._token_bytes = step_bytes(decoder, params, 1.0) - self._step_bytes

    @property
    def idle(self) -> bool:
        """Whether no job runs or waits."""
        return not self._rows and not self._waiting

    @property
    def hungry(self) -> bool:
        """Whether another job should be submitted: fewer wait than there are slots."""
        return len(self._waiting) < self.slots

    def submit(self, job: Job, name: str = "the prompt", *, next: bool = False) -> None:
        """Lets a job wait for a slot; with `next`, before all others.

        Raises:
          InputError: its prompt is empty, holds ids beyond the vocabulary, or does not fit;
            the message begins with `name`.
        """
        check_prompt(self.decoder, job.prompt_ids, job.max_new_tokens, name)
        (self._waiting.appendleft if next else self._waiting.append)(job)

    def cancel(self, job: Job) -> None:
        """Forgets a job; its slot is free at once."""
        if job in self._waiting:
            self._waiting.remove(job)
        for slot in [slot for slot, row in self._rows.items() if row.job is job]:
            del self._rows[slot]
            free = self._programs.free(self._now, self._state)
            self._state = free(self._state, np.int32(slot))

    def reset(self) -> None:
        """Forgets all jobs: after an error in the middle of a call, the state may be gone."""
        self._waiting.clear()
        self._rows.clear()
        self._state = None

    def warm_up(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Compiles what jobs of this shape need, before the first of them arrives."""
        decoder = fitting(self.decoder, prompt_tokens + max_new_tokens)
        job = Job([0] * prompt_tokens, max_new_tokens)
        inputs = self._inputs(decoder, [job] * self.slots)
        state = self._programs.warm_up(decoder, self._params, inputs)
        if self.slots > 1:
            row = self._programs.warm_up(decoder, self._params, self._inputs(decoder, [job]))
            self._programs.insert(decoder, state, row)

    def advance(self) -> list[Progress]:
        """Fills free slots, steps until a row ends or for a bounded time, and reports."""
        begun = time.perf_counter() - self._programs.compile_seconds
        self._fill()
        if not self._rows:
            return []
        run = self._programs.run(self._now, self._params, self._state)
        limits = np.int32(self._steps), np.int32(len(self._rows))
        start = time.perf_counter()
        self._state, passes = run(self._params, self._state, *limits)
        passes = int(passes)
        seconds = time.perf_counter() - start
        self._steps = next_steps(self._steps, passes, seconds)
        done = outputs(self._state)
        self.stats.compile_seconds = self._programs.compile_seconds
        self.stats.add_passes(passes, seconds)
        self.stats.seconds += time.perf_counter() - self._programs.compile_seconds - begun
        return self._report(passes, done)

    def run(self, jobs: Sequence[Job]) -> list[Output]:
        """Decodes all jobs; their outputs in the order of the jobs."""
        done: dict[Job, Output] = {}
        for job in jobs:
            self.submit(job)
        while not self.idle:
            done |= {p.job: p.output for p in self.advance() if p.output is not None}
        return [done[job] for job in jobs]

    def _fill(self) -> None:
        """Prefills waiting jobs: many at once into an idle engine, else each into a free slot."""
        if not self._rows and self._waiting:
            need = max(job.tokens for job in self._waiting)
            jobs = [self._waiting.popleft() for _ in range(min(self.slots, len(self._waiting)))]
            self._now = fitting(self.decoder, need)
            self._state = self._prefill(dict(enumerate(jobs)), self.slots)
        while self._waiting and len(self._rows) < self.slots:
            job = self._waiting.popleft()
            if job.tokens > self._now.capacity:
                self._grow(job.tokens)
            slot = next(slot for slot in range(self.slots) if slot not in self._rows)
            rows = self._prefill({slot: job}, 1)
            insert = self._programs.insert(self._now, self._state, rows)
            self._state = insert(self._state, rows, np.int32(0), np.int32(slot))

    def _prefill(self, jobs: dict[int, Job], rows: int) -> State:
        """The state of these jobs by slot, with empty rows up to `rows`."""
        empty = [Job([0], 0)] * (rows - len(jobs))
        inputs = self._inputs(self._now, [*jobs.values(), *empty])
        prefill = self._programs.prefill(self._now, self._params, inputs)
        self._rows |= {slot: _Row(job, self.stats.seconds) for slot, job in jobs.items()}
        self.stats.prompts += len(jobs)
        return prefill(self._params, *inputs)

    def _inputs(self, decoder: Decoder, jobs: list[Job]) -> tuple[Any, ...]:
        prompts, new = [job.prompt_ids for job in jobs], [job.max_new_tokens for job in jobs]
        keys = row_keys(self._seed, [job.stream for job in jobs])
        return everywhere((*padded(decoder, prompts, new, self._stop_ids), keys), decoder.mesh)

    def _grow(self, tokens: int) -> None:
        """More cache slots for all rows."""
        roomy = min(int(self._now.capacity * GROWTH), self.decoder.capacity)
        self._now = fitting(self.decoder, max(tokens, roomy))
        self._state = self._programs.resize(self._now, self._state)(self._state)

    def _report(self, passes: int, done: list[Output]) -> list[Progress]:
        """What is new in each row; rows that have ended leave their slots."""
        progress, cached = [], 0
        for slot, row in list(self._rows.items()):
            cached += len(done[slot].prompt_ids) + len(done[slot].token_ids)
            progress.append(row.progress(done[slot], self.stats.seconds))
            if progress[-1].output is not None:
                del self._rows[slot]
                self.stats.add_output(done[slot])
        if self.idle:
            self._state = None  # its cache: nobody knows when the next job comes
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
