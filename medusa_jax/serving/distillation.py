"""Self-distillation data: the model itself answers the prompts of a dataset.

Medusa heads learn what their backbone would say, so they are trained on what it
says. Of a conversation the user's turns are asked one after another, with the
model's own answers between them; of a plain text the first words are the
prompt. The answers are written as ShareGPT records, one line a conversation in
the order of the inputs, which `data.corpus` reads:

    {"id", "input": number, "conversations": [{"from", "value"}, ...], "truncated": bool,
     "token_ids": [id, ...], "learnt": [[start, stop], ...], "vocabulary": name}

The token ids are those that the model read and wrote, so that training need not find them again.
A conversation ends with an answer cut off by its length (then `truncated`), or before a turn that
does not fit any more. A run with the same options and data resumes after the last line of its
output. Tool turns of the data are left out, for they answer what this model has not asked.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medusa_jax.data.prompts import Request, record_line
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError
from medusa_jax.files import Lines, check_output, locked
from medusa_jax.progress import progress, say
from medusa_jax.serving.continued_output import resume, settings, written_prompts
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.distill_inputs import Skipped, number_pair, questions, read, unique
from medusa_jax.serving.distill_options import DistillOptions
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import acceptance_of

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def distill(options: DistillOptions) -> None:
    """Reads the inputs, answers those that the output lacks, and reports.

    Raises:
      InputError: an option, a source or the output is wrong; found before the model is loaded.
      FloatingPointError: no answer has logits that are finite.
    """
    acceptance_of(options)
    check_output(options.output, [*options.data, options.chat_template])
    shard = number_pair(options.shard, "N/N")
    if shard is None or shard[0] >= shard[1]:
        raise InputError(f"--shard {options.shard}: expected I/N with 0 <= I < N")
    output = Path(options.output)
    with locked(output.with_name(f"{output.name}.lock"), options.output):
        _distill(options, shard)


def _distill(options: DistillOptions, shard: tuple[int, int]) -> None:
    skipped, early = Skipped(options.on_bad), Skipped("skip")
    first = resume(Path(options.output), settings(options))
    inputs = enumerate(read(options, skipped))
    inputs = list(unique(inputs) if options.unique else inputs)
    generator = _generator(options)
    if options.questions:
        inputs = list(enumerate(questions(generator.text, options.questions)))
    inputs = inputs[shard[0] :: shard[1]]
    to_do = [item for item in inputs if item[0] >= first]
    # Tokens of a stop string are in an answer's ids, but not in its text.
    text = None if options.stop or options.raw else generator.text
    writer = Questions(options.output) if options.questions else Answers(text)
    written, failed, done = 0, None, len(inputs) - len(to_do)
    with (
        progress(
            total=len(inputs),
            done=done,
            unit="inputs",
            average=True,
            side_by_side=max(min(options.batch_size, len(to_do)), 1),
        ) as bar,
        Lines(options.output, append=True) as lines,
    ):

        def ended() -> None:
            bar.set_postfix_str(f"{generator.stats.tokens_per_second:.0f} tokens/s", False)
            bar.start_t = time.time() - generator.stats.seconds  # compilation will not come again
            bar.update()

        for conversation in in_order(generator, until(to_do, options.minutes), writer, ended):
            if isinstance(conversation.problem, FloatingPointError):
                failed = conversation.problem
            if conversation.problem is not None:
                (early if conversation.completions else skipped).add(conversation.problem)
            if conversation.completions:
                try:
                    lines.write(record_line(writer.record(conversation)))
                    written += 1
                except InputError as error:
                    early.add(error)
    print(f"{written} records added to {options.output}; skipped: {skipped}", file=sys.stderr)
    if early.count:
        print(f"{writer.lost}: {early}", file=sys.stderr)
    print(generator.stats, file=sys.stderr)
    if failed and not written:  # no input's fault
        raise failed


def _generator(options: DistillOptions) -> Generator:
    decoding = dataclasses.replace(options, max_new_tokens=None)
    return load_generator(decoding, at_most=options.max_new_tokens or 0, need_heads=False)


def until(
    inputs: Iterable[tuple[int, Request]], minutes: float | None
) -> Iterator[tuple[int, Request]]:
    """The inputs that are taken within so many minutes from the first."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for taken in inputs:
        if end is not None and time.monotonic() > end:
            say(f"{minutes:g} minutes are over: what was begun is finished, the rest another time")
            return
        yield taken


def in_order(
    generator: Generator,
    inputs: Iterable[tuple[int, Request]],
    writer: "Answers | Questions",
    ended: Callable[[], None] = lambda: None,
) -> Iterator[Conversation]:
    """Conversations that have ended, in the order of the inputs; slots never wait for the order.

    Args:
      ended: called as each ends, which may be long before its turn comes.
    """
    pending: collections.deque[Conversation] = collections.deque()

    def conversations() -> Iterator[Conversation]:
        for number, request in inputs:
            conversation = Conversation(request, number, cut_ends=True)
            pending.append(conversation)
            if problem := writer.refuses(request):
                conversation.ended, conversation.problem = True, problem
                ended()
            else:
                yield conversation

    for update in generator.converse(conversations()):
        if update.conversation.ended:
            ended()
        while pending and pending[0].ended:
            yield pending.popleft()
    yield from pending


class Answers:
    """Writes conversations as lines of the output.

    Attributes:
      lost: what a conversation that ends early is called.
    """

    lost = "conversations ended before their last turn"

    def __init__(self, text: ChatTokenizer | None = None) -> None:
        """Args: text: whose token ids are written too; None writes none."""
        self._text = text

    def refuses(self, request: Request) -> InputError | None:
        """Why a request cannot be asked, or None."""
        if request.turns:
            return None
        return InputError(f"{request.origin}: a prompt of token ids cannot be written down")

    def record(self, conversation: Conversation) -> dict[str, Any]:
        """A conversation as a line of the output."""
        said = [
            {"from": message.get("from") or _SPEAKERS[message["role"]], "value": message["content"]}
            for message in conversation.messages
        ]
        line = {
            "id": conversation.request.id,
            "input": conversation.number,
            "conversations": said,
            "truncated": conversation.completions[-1].finish_reason == "length",
        }
        return line if self._text is None else line | token_record(conversation, self._text)


def token_record(conversation: Conversation, text: ChatTokenizer) -> dict[str, Any]:
    """The tokens of a conversation, and which spans of them are answers.

    Nothing, where the prompt of a later turn writes an earlier answer with other tokens.
    """
    last = conversation.completions[-1]
    whole, spans = last.prompt_ids + last.token_ids, []
    for completion in conversation.completions:
        start = len(completion.prompt_ids)
        stop = start + len(completion.token_ids)
        if whole[:stop] != completion.prompt_ids + completion.token_ids:
            return {}
        spans.append([start, stop])
    return {"token_ids": whole, "learnt": spans, "vocabulary": text.fingerprint}


class Questions:
    """Writes what the model made up as prompt records, each only once.

    Attributes:
      lost: what a question that is not written is called.
    """

    lost = "questions left out"

    def __init__(self, output: str) -> None:
        self._written = written_prompts(Path(output))

    def refuses(self, request: Request) -> InputError | None:
        """Why a request cannot be asked: never."""
        return None

    def record(self, conversation: Conversation) -> dict[str, Any]:
        """A question as a line of the output.

        Raises:
          InputError: it is empty, was cut off, or was written before.
        """
        (made,) = conversation.completions
        question, origin = made.text.strip(), conversation.request.origin
        if not question:
            raise InputError(f"{origin} is empty")
        if made.finish_reason == "length":
            raise InputError(f"{origin} is longer than {len(made.token_ids)} tokens")
        if question in self._written:
            raise InputError(f"{origin} was made up before")
        self._written.add(question)
        name = conversation.request.id
        return {"id": name, "input": conversation.number, "prompt": question}
