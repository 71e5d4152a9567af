"""Jobs as the device reads them: blocks of their prompts, with the settings of their rows."""

from collections.abc import Sequence

import numpy as np

from medusa_jax.decoding.acceptance import PerRow
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prompt_blocks import PromptBlock, RowSettings, prompt_block
from medusa_jax.decoding.repetition import penalties
from medusa_jax.decoding.sampling import Sampling, row_keys
from medusa_jax.distributed.rules import everywhere
from medusa_jax.errors import InputError
from medusa_jax.serving.jobs import Job

# More tokens that may end a row than those of the engine, where rows have settings of their own.
OWN_STOP_IDS = 8


class JobBlocks:
    """Makes blocks of prompts.

    Attributes:
      settings: what the rows of its batches may have settings of.
    """

    def __init__(
        self, decoder: Decoder, stop_ids: Sequence[int], repetition_penalty: float, seed: int
    ) -> None:
        """Args as `Engine`."""
        self._stop_ids, self._penalty, self._seed = stop_ids, repetition_penalty, seed
        self._mesh, per_row = decoder.mesh, isinstance(decoder.acceptance, PerRow)
        self._most = len(stop_ids) + (OWN_STOP_IDS if per_row else 0)
        penalized = penalties(repetition_penalty, 1) is not None
        self.settings = RowSettings(max(self._most, 1), penalized, per_row)

    def check(self, job: Job, name: str) -> None:
        """Raises InputError where a job has too many stop tokens; it begins with `name`."""
        if len(job.stop_ids or ()) > self._most:
            raise InputError(
                f"{name} has {len(job.stop_ids or ())} stop tokens; at most {self._most} are "
                "possible"
            )

    def block(self, job: Job, start: int, most: int, size: int) -> PromptBlock:
        """At most so many tokens of a job's prompt from `start` on, padded to `size`."""
        stops = self._stop_ids if job.stop_ids is None else job.stop_ids
        # As many for each job, so that all share their programs.
        stops = [*stops, *[-1] * (self.settings.stop_ids - len(stops))]
        keys = row_keys(self._seed if job.seed is None else job.seed, [job.stream])
        sampling = Sampling.of([job.sampling]) if self.settings.sampled else None
        how = np.array([stops], np.int32), keys, penalties(self._penalty, 1), sampling
        block = prompt_block(job.prompt_ids, job.tokens, start, most, size, *how)
        return everywhere(block, self._mesh)
