"""Many requests at once, from asyncio: each its own coroutine, all in the slots of one engine.

    async with AsyncGenerator.load(batch_size=16) as generator:
        async for piece in generator.generate("Once upon a time", max_new_tokens=64):
            print(piece.text, end="")

A text is that of `Generator` for the same prompt, sampling and seed, whatever runs beside it.
"""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from medusa_jax.decoding.acceptance import PerRow
from medusa_jax.decoding.decoder import check_prompt
from medusa_jax.decoding.sampling import RowSampling
from medusa_jax.serving.conversations import Conversation, Prompt
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DEFAULT_NEW_TOKENS, DecodingOptions
from medusa_jax.serving.worker import Nobody, Observer, Piece, Worker

GREEDY = RowSampling()
SHAPE = 64, 64  # tokens of a prompt and of its text, before there is any
WAITING = 1 << 20  # texts that may wait, where nothing else is said: coroutines cost little


class AsyncGenerator:
    """A generator whose engine runs in a thread of its own.

    Attributes:
      generator: the model, its tokenizer and its engine, whose scheme is `PerRow`.
      worker: runs that engine.
    """

    def __init__(
        self,
        generator: Generator,
        observer: Observer | None = None,
        most_waiting: int = WAITING,
    ) -> None:
        """Starts the thread; `close` ends it.

        Args:
          generator: of `load_by_load`; nobody else may use its engine any more.
          observer: counts what is done.
          most_waiting: texts that may wait for a slot.
        """
        self.generator = generator
        how = observer or Nobody(), most_waiting
        self.worker = Worker(generator.engine, generator.text, *how)

    @classmethod
    def load(cls, **options: Any) -> "AsyncGenerator":
        """Loads a model as `Generator.load`; batch size and tree are chosen by load.

        Args:
          options: fields of `DecodingOptions`; `batch_size` is the number of slots. Sampling is
            said with each request.

        Raises:
          InputError: a file or an option is wrong; the message says which.
        """
        return cls(load_by_load(DecodingOptions(**options)))

    async def __aenter__(self) -> "AsyncGenerator":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: RowSampling = GREEDY,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> AsyncIterator[Piece]:
        """Yields an answer piece by piece; the last piece has the whole output.

        Whoever leaves early gives back the slot: `async with contextlib.aclosing(...)` does so at
        once.

        Args:
          prompt: a text, or a conversation whose last message is the user's.
          max_new_tokens: default: that of the options, else what fits.
          sampling: default: greedy.
          seed: of the draws; default: that of the options.
          stop: strings before which the answer ends.

        Raises:
          InputError: the prompt is empty, or does not fit.
          FloatingPointError: the model's numbers are not finite.
          Busy, Closing, EngineFailed: see `serving.worker`.
        """
        wanted: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling,
            "seed": seed,
        }
        job = self.job(Conversation.of(prompt).ask(self.generator.text), **wanted)
        (text,) = self.worker.open([job], stop)
        try:
            async for piece in text.pieces():
                yield piece
        finally:
            text.close()

    async def complete(self, prompt: Prompt, **how: Any) -> str:
        """An answer as a whole; see `generate`."""
        return "".join([piece.text async for piece in self.generate(prompt, **how)])

    def job(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int | None = None,
        sampling: RowSampling = GREEDY,
        seed: int | None = None,
        stream: tuple[int, int] = (0, 0),
        stop_ids: Sequence[int] | None = None,
    ) -> Job:
        """What the engine decodes for a prompt.

        Args:
          stream, stop_ids: see `Job`.

        Raises:
          InputError: the prompt is empty, or does not fit.
        """
        new_tokens = self.generator.new_tokens(len(prompt_ids), max_new_tokens)
        check_prompt(self.generator.engine.decoder, prompt_ids, new_tokens)
        how: dict[str, Any] = {"seed": seed, "sampling": sampling, "stop_ids": stop_ids}
        return Job(prompt_ids, new_tokens, stream, **how)

    def close(self) -> None:
        """Ends the thread, and what still runs."""
        self.worker.stop()


def load_by_load(options: DecodingOptions, at_most: int = DEFAULT_NEW_TOKENS) -> Generator:
    """`load_generator`, whose engine chooses batch size and tree by load, and sampling by request.

    Compiles what the first requests need.

    Args:
      at_most: see `Generator`.
    """
    options = dataclasses.replace(options, by_load=True)
    generator = load_generator(options, at_most=at_most, need_heads=False)
    generator = generator.with_tree(generator.tree, PerRow())
    generator.engine.warm_up(*SHAPE)
    return generator
