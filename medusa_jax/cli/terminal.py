"""Decoding for a person: text to stdout as it is made, records to a file, figures to stderr."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from medusa_jax.data.prompts import Request, write_record
from medusa_jax.data.tokenizer import Message
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.serving.generator import Answerer, RowName

Row = tuple[Request, RowName]
COMPARE_ROUNDS = 5  # in turns: one short text says little on a machine that others use too


def decode(
    answerer: Answerer,
    requests: Iterable[Request],
    *,
    num_samples: int = 1,
    batch_size: int = 1,
    output: str | Path | None = None,
    show: bool = True,
    compare: bool = False,
    total: int | None = None,
) -> None:
    """Answers all requests, each `num_samples` times.

    Args:
      batch_size: rows decoded together; with 1, shown text is streamed.
      output: JSON Lines file, opened when the first record is ready.
      show: text to stdout; otherwise a progress bar.
      total: requests to come, for the progress bar.
      compare: also times Medusa and plain decoding on the same rows, in turns.

    Raises:
      InputError: a request is malformed or does not fit; all before it have
        been answered and written by then.
    """
    medusa, plain = answerer.with_tree(answerer.tree), answerer.with_tree(Tree())
    samples = None if total is None else total * num_samples
    same = count = 0
    file: IO[str] | None = None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=samples, disable=show, unit=" samples"))
        for batch in _batches(_rows(answerer, requests, num_samples), batch_size):
            batch_requests, names = [row[0] for row in batch], [row[1] for row in batch]
            if show and batch_size == 1:
                records = _stream(answerer, *batch[0])
            else:
                answers = answerer.answer(batch_requests, names, batch_size)
                records = list(itertools.chain(*answers))
                for record in records if show else ():
                    print(record["text"], flush=True)
            if output:
                file = file or stack.enter_context(open(output, "w", encoding="utf-8"))
                for record in records:
                    write_record(file, record)
            if compare:
                both: list[Iterable[dict[str, Any]]] = []
                for _ in range(COMPARE_ROUNDS):
                    both = [
                        itertools.chain(*one.answer(batch_requests, names, batch_size))
                        for one in (medusa, plain)
                    ]
                for ours, theirs in zip(*both, strict=True):
                    same += ours["token_ids"] == theirs["token_ids"]
                    count += 1
            bar.update(len(batch))
    if not compare:
        print(answerer.figures, file=sys.stderr)
        return
    ratio = medusa.figures.tokens_per_second / plain.figures.tokens_per_second
    print(f"medusa: {medusa.figures}\nplain:  {plain.figures}", file=sys.stderr)
    print(f"ratio {ratio:.2f}x; {same} of {count} texts are the same", file=sys.stderr)


def chat(answerer: Answerer) -> None:
    """Answers lines from stdin until it ends; /reset starts over."""
    history: list[Message] = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip() == "/reset":
            history = []
        elif line.strip():
            request = Request(turns=(line.strip(),), history=tuple(history))
            try:
                (record,) = _stream(answerer, request, (len(history), 0))
            except InputError as error:  # too long by now: the chat can go on
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            history += _turn(line.strip(), record["text"])
    print(f"\n{answerer.figures}", file=sys.stderr)


def _rows(answerer: Answerer, requests: Iterable[Request], num_samples: int) -> Iterator[Row]:
    """Every request and sample; what does not fit is refused before its turn comes."""
    for number, request in enumerate(requests):
        answerer.prompt(request, list(request.history), 0)
        for sample in range(num_samples):
            yield request, (number, sample)


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size`; where reading fails, what was read before comes first, then the error."""
    error, more = None, True
    while more and error is None:
        batch: list[Row] = []
        try:
            for row in itertools.islice(rows, size):
                batch.append(row)
        except InputError as raised:
            error = raised
        if more := bool(batch):
            yield batch
    if error is not None:
        raise error


def _stream(answerer: Answerer, request: Request, row: RowName) -> list[dict[str, Any]]:
    """Answers one request, turn after turn, printing its text as it is made."""
    history, records = list(request.history), []
    for turn in range(request.num_turns):
        prompt = answerer.prompt(request, history, turn)
        if prompt is None:
            break
        pieces = answerer.stream(prompt, row)
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as stop:
                output, seconds = stop.value
                break
        print()
        records.append(answerer.record(request, row, turn, output, seconds))
        history.append({"role": "assistant", "content": records[-1]["text"].strip()})
    return records


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
