"""The rows of a running batch on the device, and the compiled programs that change them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medusa_jax.decoding.acceptance import PerRow
from medusa_jax.decoding.decoder import Decoder, check_memory, check_prompt, padded
from medusa_jax.decoding.prefill import PREFILL_BLOCK, SMALL_BLOCK
from medusa_jax.decoding.repetition import penalties
from medusa_jax.decoding.sampling import Sampling, row_keys
from medusa_jax.decoding.state import Output, State, outputs
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.drafter import Params
from medusa_jax.errors import InputError
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.programs import Programs, fitting

# A running batch outgrows its capacity by so much at least, so that it seldom does again.
GROWTH = 1.25
# More tokens that may end a row than those of the engine, where rows have settings of their own.
OWN_STOP_IDS = 8


class Slots:
    """A batch whose rows come and go.

    Attributes:
      rows: slots of the batch; 0 before it begins.
      most_stop_ids: most tokens that may end a row.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        stop_ids: Sequence[int],
        repetition_penalty: float,
        seed: int,
    ) -> None:
        """Args as `Engine`."""
        self._decoder, self._params = decoder, params
        self._stop_ids, self._penalty, self._seed = stop_ids, repetition_penalty, seed
        self._now = decoder  # with the capacity of the state
        self._state: Any = None
        self._per_row = isinstance(decoder.acceptance, PerRow)
        self.most_stop_ids = len(stop_ids) + (OWN_STOP_IDS if self._per_row else 0)
        self._programs = Programs(params)

    @property
    def rows(self) -> int:
        return 0 if self._state is None else self._state.root.shape[0]

    @property
    def compile_seconds(self) -> float:
        """Spent on compilation so far."""
        return self._programs.compile_seconds

    def check(self, job: Job, name: str) -> None:
        """Raises InputError unless the job can be decoded; the message begins with `name`."""
        check_prompt(self._decoder, job.prompt_ids, job.max_new_tokens, name)
        if len(job.stop_ids or ()) > self.most_stop_ids:
            raise InputError(
                f"{name} has {len(job.stop_ids or ())} stop tokens; at most "
                f"{self.most_stop_ids} are possible"
            )

    def begin(self, jobs: list[Job], rows: int, tokens: int) -> None:
        """A batch of so many rows, the first of them with these jobs, for so many tokens each.

        Raises:
          InputError: its cache exceeds the memory.
        """
        self._now = fitting(self._decoder, tokens)
        check_memory(self._now, self._params, rows)
        empty = [Job([0], 0)] * (rows - len(jobs))
        self._state = self._prefill([*jobs, *empty], grows=rows == 1 and jobs[0].room > 0)

    def put(self, job: Job, slot: int) -> None:
        """A job takes the place of a row that has ended; the batch grows where it must."""
        if job.tokens > self._now.capacity:
            roomy = min(int(self._now.capacity * GROWTH), self._decoder.capacity)
            self._now = fitting(self._decoder, max(job.tokens, roomy))
            check_memory(self._now, self._params, self.rows)
            self._state = self._programs.resize(self._now, self._state)(self._state)
        row = self._prefill([job])
        insert = self._programs.insert(self._now, self._state, row)
        self._state = insert(self._state, row, np.int32(0), np.int32(slot))

    def free(self, slot: int) -> None:
        """Ends a row."""
        free = self._programs.free(self._now, self._state)
        self._state = free(self._state, np.int32(slot))

    def clear(self) -> None:
        """Ends the batch, whose cache is given back."""
        self._state = None

    def run(self, max_steps: int, least: int) -> int:
        """Steps while `least` rows run, at most so many times; how many steps it took."""
        run = self._programs.run(self._now, self._params, self._state)
        self._state, steps = run(self._params, self._state, np.int32(max_steps), np.int32(least))
        return int(steps)

    def outputs(self) -> list[Output]:
        """Each row so far."""
        return outputs(self._state)

    def warm_up(self, job: Job, rows: int) -> None:
        """Compiles what jobs of this shape need."""
        decoder = fitting(self._decoder, job.tokens)
        inputs = self._inputs(decoder, [job] * rows)
        state = self._programs.warm_up(decoder, self._params, inputs)
        if rows > 1:
            row = self._programs.warm_up(decoder, self._params, self._inputs(decoder, [job]))
            self._programs.insert(decoder, state, row)

    def _prefill(self, jobs: list[Job], *, grows: bool = False) -> State:
        """The state of these jobs.

        Args:
          grows: longer prompts will follow, which shall share the program.
        """
        width, block = (self._now.cache_slots, SMALL_BLOCK) if grows else (None, PREFILL_BLOCK)
        inputs = self._inputs(self._now, jobs, width)
        return self._programs.prefill(self._now, self._params, inputs, block)(self._params, *inputs)

    def _inputs(
        self, decoder: Decoder, jobs: list[Job], width: int | None = None
    ) -> tuple[Any, ...]:
        """Arguments of `Decoder.run_prefill`."""
        prompts, new = [job.prompt_ids for job in jobs], [job.max_new_tokens for job in jobs]
        stops = [self._stop_ids if job.stop_ids is None else job.stop_ids for job in jobs]
        # As many for each job, so that all share their programs.
        stops = [(*ids, *[-1] * (self.most_stop_ids - len(ids))) for ids in stops]
        arrays = padded(decoder, prompts, new, stops, width)
        seeds = [self._seed if job.seed is None else job.seed for job in jobs]
        keys = row_keys(seeds, [job.stream for job in jobs])
        sampling = Sampling.of([job.sampling for job in jobs]) if self._per_row else None
        inputs = (*arrays, keys, penalties(self._penalty, len(jobs)), sampling)
        return everywhere(inputs, decoder.mesh)
