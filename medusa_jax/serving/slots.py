"""The rows of a running batch on the device, and the compiled programs that change them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.decoding.decoder import Decoder, check_memory, check_prompt
from medusa_jax.decoding.prefill import SMALL_BLOCK
from medusa_jax.decoding.prompt_blocks import longest_block, next_block
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.drafter import Drafter, Params
from medusa_jax.errors import InputError
from medusa_jax.model.weight import leaves_out_zeros
from medusa_jax.serving.background import Background
from medusa_jax.serving.job_blocks import JobBlocks
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.programs import Programs, fitting


class Slots:
    """A batch whose rows come and go.

    Attributes:
      rows: slots of the batch; 0 before it begins.
      programs: that change it.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameters: Parameters,
        stop_ids: Sequence[int],
        repetition_penalty: float,
        seed: int,
    ) -> None:
        """Args as `Engine`."""
        self._decoder, self._shapes = decoder, parameters.shapes
        self._now = decoder  # with the capacity of the state
        self._state: Any = None
        self._blocks = JobBlocks(decoder, stop_ids, repetition_penalty, seed)
        self.programs, self._background = Programs(parameters, decoder.drafter), Background()
        self._padding_is_free = leaves_out_zeros(self._shapes)

    @property
    def rows(self) -> int:
        return 0 if self._state is None else self._state.root.shape[0]

    @property
    def _params(self) -> Params:
        return self.programs.parameters.arrays

    def check(self, job: Job, name: str) -> None:
        """Raises InputError unless the job can be decoded; the message begins with `name`."""
        check_prompt(self._decoder, job.prompt_ids, job.max_new_tokens, name)
        check_memory(fitting(self._decoder, job.tokens), self._shapes, 1)
        self._blocks.check(job, name)

    def fit(self, tokens: int) -> None:
        """Says, before it begins, how many tokens a row of the batch must hold."""
        self._now = fitting(self._decoder, tokens)

    def begin(self, rows: int) -> None:
        """A batch of so many ended rows.

        Raises:
          InputError: its cache exceeds the memory.
        """
        check_memory(self._now, self._shapes, rows)
        empty = self.programs.empty(self._now, rows, self._blocks.settings)
        self._state = empty(self._params)

    def fits(self, rows: int, tokens: int = 0) -> bool:
        """Whether the memory holds so many rows, of so many tokens or the present capacity."""
        decoder = fitting(self._decoder, max(tokens, self._now.capacity))
        try:
            check_memory(decoder, self._shapes, rows)
        except InputError:
            return False
        return True

    def grow(self, tokens: int) -> None:
        """Makes room for so many tokens a row, where there is less."""
        if tokens > self._now.capacity:
            self._regroup(np.arange(self.rows), fitting(self._decoder, tokens))

    def regroup(self, rows: Sequence[int]) -> None:
        """A batch of other rows: row i becomes what row rows[i] was, -1 an ended row."""
        self._regroup(np.array(rows), self._now)

    def read(self, job: Job, slot: int, start: int, *, waited_for: bool = False) -> int:
        """Reads a block of a prompt into a row, after so many tokens; how many it read.

        Where longer prompts will follow, all blocks are small: a single program serves them. A
        block that others wait for has few tokens, where padding is free.
        """
        size = self._block(job, start, self._now)
        most = SMALL_BLOCK if waited_for and self._padding_is_free else size
        block = self._blocks.block(job, start, most, size)
        read = self.programs.read(self._now, self._state, block)
        self._state = read(self._params, self._state, np.int32(slot), block)
        return min(len(job.prompt_ids) - start, most, size)

    def free(self, slot: int) -> None:
        """Ends a row."""
        free = self.programs.free(self._now, self._state)
        self._state = free(self._state, np.int32(slot))

    def clear(self) -> None:
        """Ends the batch, whose cache is given back."""
        self._state = None

    def run(self, max_steps: int, least: int, drafter: Drafter) -> int:
        """Steps while `least` rows run, at most so many times; how many steps it took.

        Args:
          drafter: the decoder's, or another of the same drafts.
        """
        decoder = dataclasses.replace(self._now, drafter=drafter)
        run = self.programs.run(decoder, self._state)
        self._state, steps = run(self._params, self._state, np.int32(max_steps), np.int32(least))
        return int(steps)

    def wait(self) -> None:
        """Waits until the device has done what it was asked for."""
        jax.block_until_ready(self._state.finish)

    def can_run(self, rows: int, drafter: Drafter) -> bool:
        """Whether batches of so many rows, of the present capacity, have their program already."""
        decoder = dataclasses.replace(self._now, drafter=drafter)
        return self.programs.can_run(decoder, self._now.cache_slots, rows, self._blocks.settings)

    def prepare(self, choices: Sequence[tuple[int, Drafter]]) -> None:
        """Compiles in the background what these batches, of the present capacity, lack."""
        missing = [choice for choice in choices if not self.can_run(*choice)]
        if missing:
            self._background.compile_runs(self.programs, self._now, missing, self._blocks.settings)

    def close(self) -> None:
        """Compiles no further program."""
        self._background.close()

    def outputs(self) -> list[Output]:
        """Each row so far."""
        return outputs(self._state)

    def warm_up(self, job: Job, tokens: int, rows: int, drafter: Drafter) -> None:
        """Compiles what a job of this shape needs, in a batch of rows that hold so many tokens."""
        decoder = fitting(self._decoder, tokens)
        self.programs.empty(decoder, rows, self._blocks.settings)
        state = self.programs.abstract_state(decoder, rows, self._blocks.settings)
        size = self._block(job, 0, decoder)
        self.programs.read(decoder, state, self._blocks.block(job, 0, size, size))
        self.programs.run(dataclasses.replace(decoder, drafter=drafter), state)

    def _block(self, job: Job, start: int, decoder: Decoder) -> int:
        """Tokens of the next block of a prompt, padding included."""
        if job.room:
            return SMALL_BLOCK
        left, room = len(job.prompt_ids) - start, decoder.cache_slots - start
        return next_block(left, room, longest_block(), padding_is_free=self._padding_is_free)

    def _regroup(self, rows: np.ndarray, decoder: Decoder) -> None:
        check_memory(decoder, self._shapes, len(rows))
        regroup = self.programs.regroup(decoder, self._state, rows)
        rows = everywhere(rows, decoder.mesh)
        self._now, self._state = decoder, regroup(self._params, self._state, rows)
