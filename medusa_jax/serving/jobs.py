"""Jobs of the engine: what to continue, and how far each has come."""

import dataclasses
from collections.abc import Callable, Sequence

from medusa_jax.decoding.logprobs import TextLogprobs
from medusa_jax.decoding.sampling import RowSampling
from medusa_jax.decoding.state import Output


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prompt to continue.

    Attributes:
      prompt_ids: token ids of the prompt.
      max_new_tokens: most tokens to add.
      stream: the random stream that its row draws from: (prompt number, sample number).
      seed: of its random draws; None for that of the engine.
      sampling: how its row is sampled, where the engine's scheme is `PerRow`.
      stop_ids: tokens that end it; None for those of the engine.
      room: tokens that its conversation may grow to, where longer prompts will follow it.
      read: is told new tokens; says how many of them to keep where the text ends among them,
        or None where it goes on. It may end a text that the decoder would continue.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    stream: tuple[int, int] = (0, 0)
    seed: int | None = None
    sampling: RowSampling = RowSampling()
    stop_ids: Sequence[int] | None = None
    room: int = 0
    read: Callable[[list[int]], int | None] = lambda token_ids: None

    @property
    def tokens(self) -> int:
        """Most tokens of prompt and text together."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def capacity(self) -> int:
        """Tokens that its row shall hold, those of later turns included."""
        return max(self.tokens, self.room)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a call of `advance` did for a job.

    Attributes:
      token_ids: tokens that are new since the last report.
      steps: tokens that each step accepted since then, before any cut at a stop.
      output: all of the text, once it has ended.
      seconds: time of the engine since its prefill began, compilation excluded.
      logprobs: of `token_ids`, where the job has asked for them.
    """

    job: Job
    token_ids: list[int]
    steps: list[int]
    output: Output | None
    seconds: float
    logprobs: TextLogprobs | None = None


@dataclasses.dataclass
class Row:
    """A job in a slot.

    Attributes:
      start: the engine's time when it began.
      read: tokens of its prompt that were read.
      reported, steps: new tokens and steps that were reported.
    """

    job: Job
    start: float
    read: int = 0
    reported: int = 0
    steps: int = 0

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are still to be read; it writes once there are none."""
        return len(self.job.prompt_ids) - self.read

    @property
    def begins(self) -> bool:
        """Whether it writes, and nobody has seen a token yet."""
        return not self.unread and not self.reported

    def progress(self, output: Output, now: float) -> Progress:
        """What is new in the row's output, which has ended or not."""
        new = output.token_ids[self.reported :]
        kept = self.job.read(new)
        if kept is not None:
            new, output = new[:kept], output.stopped(self.reported + kept)
        steps = output.tokens_per_step[self.steps :]
        logprobs = output.logprobs and output.logprobs[self.reported : self.reported + len(new)]
        self.reported += len(new)
        self.steps += len(steps)
        ended = None if output.running else output
        return Progress(self.job, new, steps, ended, now - self.start, logprobs)
