"""Decoding for a person: text to stdout as it is accepted, records to a file, stats to stderr."""

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from medusa_jax import json_files
from medusa_jax.data.prompts import Request, record_line
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.files import Lines
from medusa_jax.progress import progress, say
from medusa_jax.serving.conversations import Conversation, Update
from medusa_jax.serving.generator import Generator

COMPARE_ROUNDS = 5  # in turns: a short text says little on a machine that others use too


def decode(
    generator: Generator,
    requests: Iterable[Request],
    *,
    num_samples: int = 1,
    output: str | Path | None = None,
    show: bool = True,
    compare: bool = False,
    total: int | None = None,
) -> None:
    """Answers all requests, each `num_samples` times; records are written as rows end.

    Args:
      output: JSON Lines file, opened when the first record is ready; an earlier file is replaced
        once all records are written.
      show: text to stdout, streamed where rows are decoded singly; otherwise a progress bar.
      compare: also times Medusa and plain decoding on the same requests, in turns.
      total: requests to come, for the progress bar.

    Raises:
      InputError: a request is malformed or does not fit; all before it have
        been answered and written by then.
    """
    stream = show and generator.options.batch_size == 1
    samples = None if total is None else total * num_samples
    asked: list[tuple[Request, int, int]] = []

    def conversations() -> Iterator[Conversation]:
        for number, request in enumerate(requests):
            for sample in range(num_samples):
                if compare:
                    asked.append((request, number, sample))
                yield Conversation(request, number, sample)

    records, count = None, 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=samples, shown=not show, unit="samples"))
        try:
            for update in generator.converse(conversations(), stream=stream, refuse=True):
                _show(update, show=show, stream=stream)
                if update.completion is None:
                    continue
                if output:
                    records = records or stack.enter_context(Lines(output))
                    records.write(record_line(update.conversation.record()))
                    count += 1
                bar.update(update.conversation.ended)
        except BaseException:
            if records is not None:
                say(f"{count} records were written to {records.file}")
            raise
    if compare:
        _compare(generator, asked)
    else:
        print(generator.stats, file=sys.stderr)


def _show(update: Update, *, show: bool, stream: bool) -> None:
    """Prints what came, as it comes or as whole texts, and why a turn was not asked."""
    conversation = update.conversation
    if stream:
        print(update.text, end="\n" if update.completion else "", flush=True)
    if problem := conversation.problem:
        turn = len(conversation.completions) + 1
        say(f"WARNING: {problem}; turn {turn} and later are left out")
    if show and not stream and update.completion is not None:
        print(update.completion.text, flush=True)


def _compare(generator: Generator, asked: list[tuple[Request, int, int]]) -> None:
    """Decodes the same requests with Medusa and plainly, in turns, and prints the ratio."""
    medusa, plain = generator.with_tree(generator.tree), generator.with_tree(Tree())
    texts: dict[Generator, dict[tuple[int, int, int], list[int]]] = {}
    for _ in range(COMPARE_ROUNDS):
        for system in (medusa, plain):
            texts[system] = {}
            for update in system.converse([Conversation(*names) for names in asked]):
                if update.completion:
                    one = update.conversation
                    turn = (one.number, one.sample, len(one.completions))
                    texts[system][turn] = update.completion.token_ids
    count = len(texts[medusa])
    same = sum(texts[plain].get(turn) == ids for turn, ids in texts[medusa].items())
    ratio = medusa.stats.tokens_per_second / plain.stats.tokens_per_second
    name = generator.options.drafter or generator.model.heads.architecture
    print(f"{name.partition(':')[0]}: {medusa.stats}\nplain:  {plain.stats}", file=sys.stderr)
    print(f"ratio {ratio:.2f}x; {same} of {count} texts are the same", file=sys.stderr)


def chat(generator: Generator) -> None:
    """Answers lines from stdin until it ends; /reset starts over."""
    talk = generator.chat()
    talk.prepare()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text do not end a chat
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = json_files.whole_text(sys.stdin.readline())
        if not line:
            break
        if line.strip() == "/reset":
            talk = generator.chat()
        elif line.strip():
            try:
                for piece in talk.say(line.strip()):
                    print(piece, end="", flush=True)
                print(flush=True)
            except InputError as error:  # too long by now: the chat can go on
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
    print(f"\n{generator.stats}", file=sys.stderr)
