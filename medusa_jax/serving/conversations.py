"""Conversations: user turns asked after each other, the model's answers between them.

`converse` is the loop over turns of each command: a prompt is a conversation of a single turn.
Different turns of different conversations are decoded together, in the slots of an engine.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from medusa_jax.data.messages import read_messages
from medusa_jax.data.prompts import Request
from medusa_jax.data.tokenizer import ChatTokenizer, Message
from medusa_jax.decoding.state import Output
from medusa_jax.errors import InputError
from medusa_jax.serving.engine import Engine
from medusa_jax.serving.growing_text import GrowingText
from medusa_jax.serving.jobs import Job

Prompt = str | Sequence[Message]

# Tokens that a conversation of many turns may grow to without another compilation.
ROOM = 2048


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      prompt: the user's text, or the text of the prompt's token ids.
      prompt_ids, token_ids: the whole prompt, and the answer's tokens after it, up to and
        including a stop token or the token that completes a stop string.
      text: the answer without special tokens, up to a stop string.
      tokens_per_step: tokens that each step accepted, before any cut at a stop.
      finish_reason: "stop" or "length".
      seconds: time of the engine from its prefill to its end; other rows ran beside it.
    """

    prompt: str
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    tokens_per_step: list[int]
    mean_accepted_length: float
    finish_reason: str
    seconds: float


@dataclasses.dataclass(eq=False)
class Conversation:
    """A request, and its answers as they come.

    Attributes:
      number, sample: which request it is, and which of its samples: they name the random stream.
      messages: the conversation so far; an unanswered turn is the last message.
      completions: the answers.
      problem: why the next turn could not be asked or answered, or None.
      ended: nothing more is to be asked.
      cut_ends: whether an answer that is cut off by its length ends the conversation.
      open_ended: whether a person may go on with it.
      first_tokens: most tokens of the first turn and its answer, once it was asked.
    """

    request: Request
    number: int = 0
    sample: int = 0
    messages: list[Message] = dataclasses.field(default_factory=list)
    completions: list[Completion] = dataclasses.field(default_factory=list)
    problem: InputError | FloatingPointError | None = None
    ended: bool = False
    cut_ends: bool = False
    open_ended: bool = False
    first_tokens: int = 0

    def __post_init__(self) -> None:
        self.messages = list(self.request.history)

    @classmethod
    def of(cls, prompt: "Prompt", number: int = 0) -> "Conversation":
        """A conversation of a single turn: a text, or messages whose last is the user's."""
        if isinstance(prompt, str):
            return cls(Request.of_text(prompt), number)
        origin = f"prompt {number}"
        *history, last = read_messages({"messages": list(prompt)}, "messages", origin)
        if last["role"] != "user":
            raise InputError(f"{origin}: the last message must be the user's")
        return cls(Request((last["content"],), tuple(history), origin=origin), number)

    def ask(self, text: ChatTokenizer) -> list[int]:
        """Prompt ids of the next turn, which becomes the last message.

        Raises:
          InputError: the turn is empty, or the template refuses it.
        """
        if self.request.prompt_ids:
            return list(self.request.prompt_ids)
        turn = self.request.turns[len(self.completions)]
        messages = [*self.messages, {"role": "user", "content": turn}]
        if not any(one["content"] for one in messages if one["role"] == "user"):
            raise InputError(f"{self.request.origin} is empty")
        try:
            prompt = text.encode(messages)
        except InputError as error:
            raise InputError(f"{self.request.origin}: {error}") from None
        self.messages = messages
        return prompt

    def room(self, tokens: int) -> int:
        """Tokens to make room for, where the next turn needs so many; 0: for those alone.

        The room stays the same, so that the turns share programs. Two turns do without: a cache
        of the right size is faster.
        """
        self.first_tokens = self.first_tokens or tokens
        if self.open_ended:
            return ROOM
        turns = self.request.num_turns
        return min(turns * self.first_tokens, ROOM) if turns > 2 else 0

    def fail(self, problem: InputError | FloatingPointError, before: list[Message]) -> None:
        """Ends with the messages before a turn that has no answer."""
        self.problem, self.ended, self.messages = problem, True, before

    def hear(self, text: ChatTokenizer, answer: str, output: Output, seconds: float) -> Completion:
        """Takes an answer, which is the text of the output's tokens.

        A chat template puts answers between marks of its own, so they are stripped in the
        history. A base model's answer continues the prompt and stays as it is.
        """
        turns = self.request.turns
        prompt = turns[len(self.completions)] if turns else text.decode([], output.prompt_ids)
        completion = Completion(
            prompt=prompt,
            prompt_ids=output.prompt_ids,
            text=answer,
            token_ids=output.token_ids,
            tokens_per_step=output.tokens_per_step,
            mean_accepted_length=output.mean_accepted_length,
            finish_reason=output.finish_reason,
            seconds=seconds,
        )
        self.completions.append(completion)
        content = answer.strip() if text.raw or text.template is not None else answer
        self.messages.append({"role": "assistant", "content": content})
        cut = self.cut_ends and output.finish_reason == "length"
        self.ended = cut or len(self.completions) == self.request.num_turns
        return completion

    def record(self) -> dict[str, Any]:
        """The last answer as a line of JSON Lines."""
        named = {} if self.request.id is None else {"id": self.request.id}
        return named | dataclasses.asdict(self.completions[-1]) | {
            "turn": len(self.completions) - 1,
            "sample": self.sample,
            "input": self.number,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Update:
    """How a conversation has moved.

    Attributes:
      text: what its answer gained, where texts are streamed.
      completion: the answer, once it is whole; None in between, or where a turn could not
        be asked or answered (`conversation.problem`).
    """

    conversation: Conversation
    text: str
    completion: Completion | None


@dataclasses.dataclass
class _Turn:
    """A turn that is being answered.

    Attributes:
      before: the conversation's messages without it.
      text: the answer so far.
    """

    conversation: Conversation
    before: list[Message]
    text: GrowingText


class _Batch:
    """Conversations in the slots of an engine."""

    def __init__(
        self,
        engine: Engine,
        text: ChatTokenizer,
        new_tokens: Callable[[int], int],
        stop: Sequence[str],
        stream: bool,
    ) -> None:
        """Args as `converse`."""
        self._engine, self._text, self._new_tokens = engine, text, new_tokens
        self._stop, self._stream = stop, stream
        self._live: dict[Job, _Turn] = {}

    def ask(self, conversation: Conversation) -> bool:
        """Submits the next turn; a turn that cannot be asked ends the conversation: False."""
        before = conversation.messages
        try:
            prompt = conversation.ask(self._text)
            text = GrowingText(self._text, prompt, self._stop)
            stream = (conversation.number, conversation.sample)
            job = Job(prompt, self._new_tokens(len(prompt)), stream, read=text.read)
            job = dataclasses.replace(job, room=conversation.room(job.tokens))
            begun = bool(conversation.completions)  # then it goes on before others begin
            self._engine.submit(job, conversation.request.origin, next=begun)
        except InputError as error:
            conversation.fail(error, before)
            return False
        self._live[job] = _Turn(conversation, before, text)
        return True

    def advance(self, *, more: bool) -> Iterator[Update]:
        """Lets the engine advance; asks the next turn of a conversation whose answer is whole."""
        for progress in self._engine.advance(more=more):
            turn, completion = self._live[progress.job], None
            conversation, output = turn.conversation, progress.output
            if output is not None:
                del self._live[progress.job]
                answer = turn.text.finish()
                try:
                    output.check(conversation.request.origin)
                    seconds = progress.seconds
                    completion = conversation.hear(self._text, answer, output, seconds)
                except FloatingPointError as error:
                    conversation.fail(error, turn.before)
            piece = "".join(turn.text.take()) if self._stream else ""
            if piece or output is not None:
                yield Update(conversation, piece, completion)
            if completion and not conversation.ended and not self.ask(conversation):
                yield Update(conversation, "", None)

    def close(self) -> None:
        """Frees the slots of conversations that nobody waits for any more."""
        for job in self._live:
            self._engine.cancel(job)


def converse(
    engine: Engine,
    text: ChatTokenizer,
    conversations: Iterable[Conversation],
    new_tokens: Callable[[int], int],
    *,
    stop: Sequence[str] = (),
    stream: bool = False,
    refuse: bool = False,
) -> Iterator[Update]:
    """Holds conversations, as many at once as the engine has slots; updates as they come.

    A conversation that ends makes room for the next one. A turn that cannot be asked is an
    update too.

    Args:
      conversations: taken as slots become free. Where reading them fails, those taken before
        are held to their end, then the error is raised.
      new_tokens: most new tokens for a prompt of so many.
      stop: strings before which an answer ends.
      stream: report texts as they grow.
      refuse: a first turn that cannot be asked is an error of reading, and so is an answer
        that failed.

    Raises:
      InputError: reading failed.
      FloatingPointError: an answer failed, as `Output.check` says.
    """
    coming = iter(conversations)
    error: Exception | None = None
    batch, more = _Batch(engine, text, new_tokens, stop, stream), True
    try:
        while more or not engine.idle:
            while more and engine.hungry:
                try:
                    conversation = next(coming, None)
                except InputError as raised:
                    conversation, error = None, raised
                more = conversation is not None
                if conversation is None or batch.ask(conversation):
                    continue
                if refuse:
                    error, more = conversation.problem, False
                else:
                    yield Update(conversation, "", None)
            for update in batch.advance(more=more):
                problem = update.conversation.problem
                if refuse and isinstance(problem, FloatingPointError):
                    error, more = problem, False
                else:
                    yield update
        if error is not None:
            raise error
    except GeneratorExit:  # the caller has left
        batch.close()
        raise
    except BaseException:  # such as KeyboardInterrupt, in the middle of a call
        engine.reset()
        raise
