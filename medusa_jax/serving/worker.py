"""The engine's thread: jobs come from event loops, pieces of texts go back to them.

Only this thread touches the engine and the device. So an event loop never blocks a step, and a
step never blocks an event loop.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.logprobs import TextLogprobs
from medusa_jax.decoding.state import Output
from medusa_jax.errors import InputError
from medusa_jax.serving.engine import Engine
from medusa_jax.serving.growing_text import GrowingText
from medusa_jax.serving.jobs import Job, Progress

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """Too many texts wait already; the message says so."""


class Closing(RuntimeError):
    """No further text is taken."""


class EngineFailed(RuntimeError):
    """The engine failed, or has ended; the text has no end."""


class Observer(Protocol):
    """Who counts what a worker does; called in its thread, and in those of event loops."""

    def observe(self, engine: Engine, texts: int) -> None:
        """Looks at an engine between two calls, which has so many texts to write."""
        ...

    def add(self, output: Output) -> None:
        """A text has ended."""
        ...

    def ended(self, reason: str) -> None:
        """A text has ended without its output: "abort" or "error"."""
        ...

    def refuse(self) -> None:
        """Texts were refused: too many wait."""
        ...


class Nobody:
    """An observer that counts nothing."""

    def observe(self, engine: Engine, texts: int) -> None:
        pass

    def add(self, output: Output) -> None:
        pass

    def ended(self, reason: str) -> None:
        pass

    def refuse(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a text gained.

    Attributes:
      texts: of each token; empty while a character or a stop string is not complete.
      steps: tokens that each step accepted.
      token_ids: the tokens.
      seconds: time of the engine since its prefill began, compilation excluded.
      logprobs: of the tokens, where the request asks for them.
      output: the whole row, once it has ended.
    """

    texts: list[str]
    steps: list[int]
    token_ids: list[int]
    seconds: float
    logprobs: TextLogprobs | None = None
    output: Output | None = None

    @property
    def text(self) -> str:
        """What can be read of it."""
        return "".join(self.texts)


class Text:
    """A text that somebody waits for, as its pieces come; made by `Worker.open`.

    Whoever has opened it closes it. A text that has not ended gives back its slot then.
    """

    def __init__(self, worker: "Worker", job: Job, text: GrowingText) -> None:
        self.job, self.growing = job, text
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._pieces = asyncio.Queue[Piece | Exception]()
        self._closed = self._ended = False

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces up to the last, which has the output.

        Raises:
          InputError: it does not fit.
          FloatingPointError: the model's numbers are not finite.
          EngineFailed: see there.
        """
        while not self._ended:
            piece = await self._pieces.get()
            self._ended = isinstance(piece, Exception) or piece.output is not None
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def close(self) -> None:
        """Nobody waits any more."""
        if not self._closed:
            self._closed = True
            self._worker.closed(self, self._ended)

    def tell(self, piece: Piece | Exception) -> None:
        """Takes a piece, or the error that ends the text, from the engine's thread."""
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # the event loop has ended in between
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Worker:
    """An engine that runs in a thread of its own.

    Attributes:
      taken: texts that are open.
      draining: no further text is taken.
    """

    def __init__(
        self, engine: Engine, text: ChatTokenizer, observer: Observer, most_waiting: int
    ) -> None:
        """Begins to work.

        Args:
          observer: counts what is done.
          most_waiting: texts that may wait for a slot.
        """
        self.taken, self.draining, self._most_waiting = 0, False, most_waiting
        self._engine, self._text, self._observer = engine, text, observer
        observer.observe(engine, 0)
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake, self._over = threading.Event(), False
        self._texts: dict[Job, Text] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and with it what still runs."""
        self._over = True
        self._wake.set()
        self._engine.close()
        self._thread.join()  # however long: Python cannot end beside a thread that compiles

    @property
    def alive(self) -> bool:
        """Whether the engine still works."""
        return self._thread.is_alive()

    def open(self, jobs: Sequence[Job], stop: Sequence[str]) -> list[Text]:
        """Texts for jobs, which wait for slots from now on.

        Raises:
          Busy, Closing, EngineFailed: see there.
        """
        self._check_room(len(jobs))
        texts = []
        for job in jobs:
            growing = GrowingText(self._text, job.prompt_ids, stop)
            texts.append(Text(self, dataclasses.replace(job, read=growing.read), growing))
        self.taken += len(texts)
        for text in texts:
            self._do(functools.partial(self._submit, text))
        return texts

    def closed(self, text: Text, ended: bool) -> None:
        """A text that nobody waits for any more."""
        self.taken -= 1
        if not ended:
            self._do(functools.partial(self._cancel, text))

    def _check_room(self, count: int) -> None:
        if self.draining:
            raise Closing("no further text is taken: this is being shut down")
        if not self.alive:
            raise EngineFailed("the engine has stopped")
        if self.taken + count > self._engine.slots + self._most_waiting:
            self._observer.refuse()
            raise Busy(f"{self.taken} texts run or wait already; try again later")

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _work(self) -> None:
        while True:
            self._wake.clear()
            if self._over:
                return
            try:
                while self._commands:
                    self._commands.popleft()()
                if self._engine.idle:
                    self._wake.wait()
                    continue
                for progress in self._engine.advance():
                    self._report(progress)
            except Exception as error:
                log.exception("the engine failed")
                self._fail(error)
            self._observer.observe(self._engine, len(self._texts))

    def _submit(self, text: Text) -> None:
        try:
            self._engine.submit(text.job)
        except InputError as error:
            text.tell(error)
            return
        except Exception as error:  # the other texts go on
            log.exception("a text was not taken")
            text.tell(_failure(error))
            return
        self._texts[text.job] = text

    def _cancel(self, text: Text) -> None:
        if self._texts.pop(text.job, None) is not None:
            self._engine.cancel(text.job)
            self._observer.ended("abort")
            self._observer.observe(self._engine, len(self._texts))

    def _report(self, progress: Progress) -> None:
        text = self._texts.get(progress.job)
        if text is None:
            return
        output = progress.output
        gained = progress.steps, progress.token_ids, progress.seconds, progress.logprobs
        if output is None:
            text.tell(Piece(text.growing.take(), *gained))
            return
        del self._texts[progress.job]
        try:
            output.check("the answer")
        except FloatingPointError as error:
            self._observer.ended("error")
            text.tell(error)
            return
        text.growing.finish()
        self._observer.add(output)
        text.tell(Piece(text.growing.take(), *gained, output))

    def _fail(self, error: Exception) -> None:
        """Ends all texts: the state of the device may be gone."""
        for text in self._texts.values():
            self._observer.ended("error")
            text.tell(_failure(error))
        self._texts.clear()
        self._engine.reset()


def _failure(error: Exception) -> EngineFailed:
    return EngineFailed(f"the engine failed: {type(error).__name__}")
