"""Many conversations at once: user turns in, the model's answers between them, in batches."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from medusa_jax.data.prompts import Request
from medusa_jax.data.tokenizer import Message
from medusa_jax.decoding.decoder import Output
from medusa_jax.errors import InputError
from medusa_jax.serving.generator import Answerer

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@dataclasses.dataclass
class Talk:
    """A conversation as it grows.

    Attributes:
      number: which input it is; it names the random stream, with sample 0.
      messages: the conversation so far; an unanswered turn is the last.
      prompt: token ids of the turn to answer.
      answers: how many there are.
      truncated: the last one was cut off by its length.
      problem: why a turn could not be asked, or None.
      ended: nothing more is to be asked.
    """

    number: int
    request: Request
    messages: list[Message]
    prompt: list[int] = dataclasses.field(default_factory=list)
    answers: int = 0
    truncated: bool = False
    problem: InputError | None = None
    ended: bool = False

    def ask(self, answerer: Answerer) -> None:
        """Asks the next turn; one that does not fit ends the conversation before it."""
        request = self.request
        try:
            if not request.turns:
                raise InputError(f"{request.origin}: a prompt of token ids cannot be written down")
            turn = {"role": "user", "content": request.turns[self.answers]}
            self.prompt = answerer.encode([*self.messages, turn], request.origin)
            self.messages.append(turn)
        except InputError as error:
            self.problem, self.ended = error, True

    def hear(self, answerer: Answerer, output: Output) -> None:
        """Takes an answer, and asks the next turn.

        A chat template puts answers between marks of its own and they are
        stripped; a base model's continue the prompt and are kept as they are.
        """
        answer = answerer.text.decode(output.prompt_ids, output.token_ids)
        if answerer.text.template is not None:
            answer = answer.strip()
        self.messages.append({"role": "assistant", "content": answer})
        self.answers += 1
        self.truncated = output.finish_reason == "length"
        self.ended = self.truncated or self.answers == self.request.num_turns
        if not self.ended:
            self.ask(answerer)

    def record(self) -> dict[str, Any]:
        """The line of the output."""
        said = [{"from": _SPEAKERS[one["role"]], "value": one["content"]} for one in self.messages]
        return {
            "id": self.request.id,
            "input": self.number,
            "conversations": said,
            "truncated": self.truncated,
        }


def converse(
    answerer: Answerer, inputs: Iterable[tuple[int, Request]], batch_size: int
) -> Iterator[Talk]:
    """Yields conversations that have ended, in the order of the inputs.

    A conversation that ends makes room in the batch for the next one, so
    different turns of different conversations are decoded together.
    """
    coming = iter(inputs)
    waiting: collections.deque[Talk] = collections.deque()
    while True:
        live = [talk for talk in waiting if not talk.ended]
        while len(live) < batch_size and (one := next(coming, None)) is not None:
            waiting.append(talk := Talk(*one, list(one[1].history)))
            talk.ask(answerer)
            live += [] if talk.ended else [talk]
        while waiting and waiting[0].ended:
            yield waiting.popleft()
        if not live:
            return
        rows = [(talk.number, 0) for talk in live]
        outputs, _ = answerer.run([talk.prompt for talk in live], rows, batch_size)
        for talk, output in zip(live, outputs, strict=True):
            talk.hear(answerer, output)
