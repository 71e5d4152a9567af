"""A model behind a server: the engines that decode its requests, and how a request becomes jobs."""

import copy
import functools
import secrets

from medusa_jax.data.messages import read_messages
from medusa_jax.data.token_bytes import TokenBytes
from medusa_jax.drafting.tree import Tree
from medusa_jax.server.logprobs import LogprobWriter
from medusa_jax.server.metrics import Metrics
from medusa_jax.server.protocol import ChatRequest, Request
from medusa_jax.server.worker import Worker
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.jobs import Job


class Service:
    """What a server serves.

    Attributes:
      name: of the model.
      generator: the model, its tokenizer and its engine.
      worker: runs that engine.
      metrics: figures of all engines.
      key: that clients must send, or None.
    """

    def __init__(
        self, name: str, generator: Generator, *, max_waiting: int, key: str | None = None
    ) -> None:
        """Starts the worker.

        Args:
          max_waiting: texts that may wait for a slot of an engine.
        """
        self.name, self.generator, self.key = name, generator, key
        self.metrics, self._max_waiting = Metrics(name), max_waiting
        self.worker = self._worker(generator)
        self._workers = [self.worker]

    def _worker(self, generator: Generator) -> Worker:
        worker = Worker(generator.engine, generator.text, self.metrics, self._max_waiting)
        worker.start()
        return worker

    @functools.cached_property
    def plain(self) -> Worker:
        """Decodes plainly, beside the tree; shares the weights, has slots of its own."""
        if self.tree_size == 1:
            return self.worker
        worker = self._worker(self.generator.with_tree(Tree()))
        worker.draining = self.worker.draining
        self._workers.append(worker)
        return worker

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
        return all(worker.alive for worker in self._workers)

    @property
    def taken(self) -> int:
        """Texts that are open."""
        return sum(worker.taken for worker in self._workers)

    def drain(self) -> None:
        """Takes no further text."""
        for worker in self._workers:
            worker.draining = True

    def stop(self) -> None:
        """Ends all workers, and with them what still runs."""
        for worker in self._workers:
            worker.stop()

    def job(self, prompt_ids: list[int], request: Request, choice: int) -> Job:
        """What the engine decodes for a choice of a request."""
        ends = () if request.ignore_eos else self.generator.stop_ids
        seed = secrets.randbits(63) if request.seed is None else request.seed
        new_tokens = self.generator.new_tokens(len(prompt_ids), request.new_tokens)
        return Job(
            prompt_ids,
            new_tokens,
            stream=(0, choice),
            seed=seed,
            sampling=request.sampling,
            stop_ids=tuple({*ends, *(request.stop_token_ids or ())}),
        )

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
