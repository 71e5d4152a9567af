"""A model behind a server: its engines, and how a request becomes texts."""

import copy
import functools
import secrets
from collections.abc import Sequence

from medusa_jax.data.messages import read_messages
from medusa_jax.data.token_bytes import TokenBytes
from medusa_jax.drafting.tree import Tree
from medusa_jax.server.logprobs import LogprobWriter
from medusa_jax.server.metrics import Metrics
from medusa_jax.server.protocol import ChatRequest, Request
from medusa_jax.serving.async_generator import AsyncGenerator
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.worker import Text


class Service:
    """What a server serves.

    Attributes:
      name: of the model.
      medusa: decodes with the model's tree.
      metrics: figures of all engines.
      key: that clients must send, or None.
    """

    def __init__(
        self, name: str, generator: Generator, *, max_waiting: int, key: str | None = None
    ) -> None:
        """Starts the engine's thread.

        Args:
          max_waiting: texts that may wait for a slot of an engine.
        """
        self.name, self.key = name, key
        self.metrics, self._max_waiting = Metrics(name), max_waiting
        self.medusa = self._started(generator)
        self._all = [self.medusa]

    def _started(self, generator: Generator) -> AsyncGenerator:
        return AsyncGenerator(generator, self.metrics, self._max_waiting)

    @functools.cached_property
    def plain(self) -> AsyncGenerator:
        """Decodes plainly, beside the tree; shares the weights, has slots of its own."""
        if self.tree_size == 1:
            return self.medusa
        plain = self._started(self.generator.with_tree(Tree()))
        plain.worker.draining = self.medusa.worker.draining
        self._all.append(plain)
        return plain

    @property
    def generator(self) -> Generator:
        """The model, its tokenizer and its engine."""
        return self.medusa.generator

    @property
    def tree_size(self) -> int:
        """Tokens that a step verifies for each text; 1 for plain decoding."""
        return self.generator.engine.decoder.drafter.size

    @property
    def most_logprobs(self) -> int:
        """Likeliest tokens whose log-probabilities a request may ask for."""
        return self.generator.engine.decoder.most_logprobs or 0

    @property
    def alive(self) -> bool:
        """Whether all engines work."""
        return all(each.worker.alive for each in self._all)

    @property
    def taken(self) -> int:
        """Texts that are open."""
        return sum(each.worker.taken for each in self._all)

    def drain(self) -> None:
        """Takes no further text."""
        for each in self._all:
            each.worker.draining = True

    def stop(self) -> None:
        """Ends all engines, and with them what still runs."""
        for each in self._all:
            each.close()

    def open(self, prompts: Sequence[list[int]], request: Request) -> list[Text]:
        """Texts of all choices of all prompts of a request.

        Raises:
          InputError: a prompt is empty, or does not fit.
          Busy, Closing, EngineFailed: see `serving.worker`.
        """
        engine = self.plain if request.speculative is False else self.medusa
        ends = () if request.ignore_eos else self.generator.stop_ids
        jobs = [
            engine.job(
                prompt,
                max_new_tokens=request.new_tokens,
                sampling=request.sampling,
                seed=secrets.randbits(63) if request.seed is None else request.seed,
                stream=(0, choice),
                stop_ids=tuple({*ends, *(request.stop_token_ids or ())}),
            )
            for prompt in prompts
            for choice in range(request.n or 1)
        ]
        return engine.worker.open(jobs, request.stops)

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation."""
        messages = read_messages({"messages": request.messages}, "messages", "request")
        return self.generator.text.encode(messages)

    def completion_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt: BOS and the text as it is, or the ids as they are."""
        if not isinstance(prompt, str):
            self.generator.text.check_ids(prompt)
            return prompt
        raw = copy.copy(self.generator.text)
        raw.raw = True
        return raw.encode([{"role": "user", "content": prompt}])

    def logprobs(self, request: Request) -> LogprobWriter | None:
        """What writes the log-probabilities that a request asks for."""
        if request.alternatives is None:
            return None
        return LogprobWriter(self._tokens, isinstance(request, ChatRequest), request.alternatives)

    @functools.cached_property
    def _tokens(self) -> TokenBytes:
        return TokenBytes(self.generator.text.tokenizer)
