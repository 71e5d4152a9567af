"""Self-distillation data: the model itself answers the prompts of a dataset.

Medusa heads learn what their backbone would say, so they are trained on what it
says. Of a conversation the user's turns are asked one after another, with the
model's own answers between them; of a plain text the first words are the
prompt. The answers are written as ShareGPT records, one line a conversation in
the order of the inputs, which `data.corpus` reads:

    {"id", "input": number, "conversations": [{"from", "value"}, ...], "truncated": bool}

A conversation ends with an answer cut off by its length (then `truncated`), or
before a turn that does not fit any more. A run with the same options and data resumes after the
last line of its output, whose settings are kept beside it. Tool turns of the data are left out, for
they answer what this model has not asked.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medusa_jax import json_files
from medusa_jax.data.corpus import Corpus, Document
from medusa_jax.data.messages import CONVERSATIONS
from medusa_jax.data.prompts import Request, read_requests, record_line
from medusa_jax.data.text_files import numbered_lines
from medusa_jax.errors import InputError
from medusa_jax.files import Lines, check_output, locked, writing
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, acceptance_of

# What may differ between a run and the run that resumes it.
_FREE = ("output", "batch_size", "mesh", "on_bad", "debug")
_WORDS = "a number of words N, or a range N-M"
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


@dataclasses.dataclass(kw_only=True)
class DistillOptions(DecodingOptions):
    """What to ask, and where the answers go."""

    data: list[str] = option(action="append", metavar="SOURCE", help="a file .json, .jsonl, "
        ".parquet or .txt, or a hub dataset owner/name[:split]; may be given again")  # fmt: skip
    output: str = option(metavar="FILE", help="JSON Lines; continued if it is there")
    words: str | None = option(None, metavar="N|N-M", help="plain text: how many first words are "
        "the prompt")  # fmt: skip
    max_documents: int = option(0, least=0, help="of each source; 0 for all")
    separator: str = option("<|endoftext|>", help="between the documents of a .txt file")
    unique: bool = option(False, help="ask the same prompt only once (greedy decoding answers it "
        "alike each time)")  # fmt: skip
    on_bad: str = option("skip", choices=("skip", "refuse"), help="what becomes of inputs that "
        "cannot be read or do not fit")  # fmt: skip
    shard: str = option("0/1", metavar="I/N", help="every N-th input, beginning with the I-th")
    acceptance: Any = option("lossless", help="greedy | typical | lossless")
    max_new_tokens: int | None = option(2048, least=1, help="of an answer, or what fits")
    batch_size: int = option(16, least=1, help="conversations decoded together")

    def __post_init__(self) -> None:
        if self.acceptance == "lossless":
            self.temperature = 0.3 if self.temperature is None else self.temperature  # paper, 3.2
            if self.temperature == 0:
                self.acceptance = "greedy"


def distill(options: DistillOptions) -> None:
    """Reads the inputs, answers those that the output lacks, and reports.

    Raises:
      InputError: an option, a source or the output is wrong; found before the model is loaded.
      FloatingPointError: no answer has logits that are finite.
    """
    acceptance_of(options)
    check_output(options.output, [*options.data, options.chat_template])
    shard = _numbers(options.shard, "N/N")
    if shard is None or shard[0] >= shard[1]:
        raise InputError(f"--shard {options.shard}: expected I/N with 0 <= I < N")
    output = Path(options.output)
    with locked(output.with_name(f"{output.name}.lock"), options.output):
        _distill(options, shard)


def _distill(options: DistillOptions, shard: tuple[int, int]) -> None:
    skipped, early = Skipped(options.on_bad), Skipped("skip")
    first = resume(Path(options.output), settings(options))
    inputs = enumerate(read(options, skipped))
    inputs = list(unique(inputs) if options.unique else inputs)[shard[0] :: shard[1]]
    to_do = [item for item in inputs if item[0] >= first]
    decoding = dataclasses.replace(options, max_new_tokens=None)
    generator = load_generator(decoding, at_most=options.max_new_tokens or 0, need_heads=False)
    written, failed = 0, None
    with (
        progress(total=len(inputs), done=len(inputs) - len(to_do), unit="inputs") as bar,
        Lines(options.output, append=True) as lines,
    ):
        for conversation in in_order(generator, to_do):
            if isinstance(conversation.problem, FloatingPointError):
                failed = conversation.problem
            if conversation.problem is not None:
                (early if conversation.completions else skipped).add(conversation.problem)
            if conversation.completions:
                lines.write(record_line(record(conversation)))
                written += 1
            bar.set_postfix_str(f"{generator.stats.tokens_per_second:.0f} tokens/s", False)
            bar.update()
    print(f"{written} records added to {options.output}; skipped: {skipped}", file=sys.stderr)
    if early.count:
        print(f"conversations ended before their last turn: {early}", file=sys.stderr)
    print(generator.stats, file=sys.stderr)
    if failed and not written:  # no input's fault
        raise failed


def in_order(generator: Generator, inputs: Iterable[tuple[int, Request]]) -> Iterator[Conversation]:
    """Conversations that have ended, in the order of the inputs; slots never wait for the order."""
    pending: collections.deque[Conversation] = collections.deque()

    def conversations() -> Iterator[Conversation]:
        for number, request in inputs:
            conversation = Conversation(request, number, cut_ends=True)
            pending.append(conversation)
            if request.turns:
                yield conversation
            else:
                conversation.ended, conversation.problem = (
                    True,
                    InputError(f"{request.origin}: a prompt of token ids cannot be written down"),
                )

    for _ in generator.converse(conversations()):
        while pending and pending[0].ended:
            yield pending.popleft()
    yield from pending


def record(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a line of the output."""
    said = [
        {"from": message.get("from") or _SPEAKERS[message["role"]], "value": message["content"]}
        for message in conversation.messages
    ]
    return {
        "id": conversation.request.id,
        "input": conversation.number,
        "conversations": said,
        "truncated": conversation.completions[-1].finish_reason == "length",
    }


@dataclasses.dataclass
class Skipped:
    """What was left out, and why the first of it.

    Attributes:
      policy: "skip", or "refuse" to raise instead.
    """

    policy: str
    count: int = 0
    reason: str = ""

    def add(self, error: Exception) -> None:
        """Counts one; with policy "refuse", raises it."""
        if self.policy == "refuse":
            raise error
        self.count += 1
        self.reason = self.reason or f" (the first: {error})"

    def __str__(self) -> str:
        return f"{self.count}{self.reason}"


# --- what is asked ----------------------------------------------------------------------------


def read(options: DistillOptions, skipped: Skipped) -> Iterator[Request]:
    """The inputs of all sources, in order.

    Raises:
      InputError: a source cannot be read, or plain text comes without --words.
    """
    words, numbers = word_range(options.words), itertools.count()
    for source in options.data:
        if _holds_prompts(Path(source)):
            found = read_requests(source, skipped.add)
            found = itertools.islice(found, options.max_documents or None)
        else:
            corpus = Corpus(
                [source],
                separator=options.separator,
                max_documents=options.max_documents,
                on_bad=options.on_bad,
            )
            found = corpus
        for document in found:
            number = next(numbers)
            if isinstance(document, Document):
                request = _request(document, words, (options.seed, number))
            else:
                request = document
            name = f"{Path(source).name}-{number}" if request.id is None else str(request.id)
            yield dataclasses.replace(request, id=name)
        if isinstance(found, Corpus):
            for reason in found.skipped:
                skipped.add(InputError(reason))


def unique(inputs: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Request]]:
    """Leaves out what asks the same as an earlier input."""
    seen = set()
    for number, request in inputs:
        key = json.dumps([request.history, request.turns])
        if key not in seen:
            seen.add(key)
            yield number, request


def word_range(flag: str | None) -> tuple[int, int] | None:
    """ "7" -> (7, 7), "4-12" -> (4, 12); raises InputError for what is neither."""
    if flag is None:
        return None
    found = _numbers(flag, "N-N") or _numbers(f"{flag}-{flag}", "N-N")
    if found is None or not 1 <= found[0] <= found[1]:
        raise InputError(f"--words {flag[:40]}: expected {_WORDS}")
    return found


def first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word: ("a  b c", 2) -> "a  b"."""
    words = list(itertools.islice(re.finditer(r"\S+", text), count))
    return text[: words[-1].end()]


def _request(document: Document, words: tuple[int, int] | None, name: tuple[int, int]) -> Request:
    """What to ask; the number of words depends on `name`, (seed, number of the input), alone."""
    messages = document.messages
    if messages:
        history = messages[:1] if messages[0]["role"] == "system" else ()
        turns = tuple(one["content"] for one in messages if one["role"] == "user")
        return Request(turns, history, id=document.id, origin=document.origin)
    if words is None:
        raise InputError(f"{document.origin} is plain text: give --words, {_WORDS}")
    seed, number = name
    noise = int(np.random.SeedSequence([abs(seed), number]).generate_state(1)[0])
    prompt = first_words(document.text, words[0] + noise % (words[1] - words[0] + 1))
    return Request((prompt,), id=document.id, origin=document.origin)


def _holds_prompts(path: Path) -> bool:
    """Whether a file's first record is a prompt of `records`, not a document of `corpus`."""
    if not path.is_file() or not re.search(r"\.jsonl(\.gz)?$", path.name):
        return False
    try:
        line = next((line for _, line in numbered_lines(path)), "0")
        record = json_files.parse(line, str(path))
    except InputError:
        return False  # the corpus says what is wrong
    keys = set(record) if isinstance(record, dict) else set()
    return bool(keys & {"prompt", "turns", "prompt_ids"}) and not keys & {*CONVERSATIONS, "text"}


def _numbers(flag: str, form: str) -> tuple[int, int] | None:
    found = re.fullmatch(form.replace("N", r"(\d{1,9})"), flag, re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))


# --- an output that is continued --------------------------------------------------------------


def settings(options: DistillOptions) -> dict[str, Any]:
    """What records depend on: the options, and the contents of the data's files."""
    chosen = {name: value for name, value in vars(options).items() if name not in _FREE}
    files = [path for path in map(Path, options.data) if path.is_file()]
    contents = {str(path): fingerprint(path) for path in files}
    return chosen | {"dtype": options.precision, "contents": contents}


def fingerprint(path: Path) -> str:
    """A name for the content of a file, such as "sha256:2cf24dba5fb0a30e"; reads 1 GB a second."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def resume(output: Path, now: dict[str, Any]) -> int:
    """Prepares the output: the number of the first input that it lacks.

    A half-written last line is cut off.

    Raises:
      InputError: the output is no such file, or was made with other settings.
    """
    beside = output.with_name(output.name + ".settings.json")
    if not output.exists() or not output.stat().st_size:
        json_files.write(beside, now)
        return 0
    try:
        before = json_files.read_object(beside)
    except InputError as error:
        raise InputError(f"{output} is there, but {error}: not continued") from None
    # What an earlier release did not write was as it is by default, or is taken on trust.
    defaults = vars(DistillOptions(data=[], output=""))
    before = defaults | {"contents": now["contents"]} | before
    other = [
        f"--{name} was {json_files.short(before.get(name))}, is {json_files.short(now[name])}"
        for name in sorted(now.keys() - {"contents"})
        if before.get(name) != now[name]
    ]
    if other:
        raise InputError(f"{output} was made with other settings: {'; '.join(other)}")
    if before["contents"] != now["contents"]:
        files = ", ".join(now["contents"])
        raise InputError(f"{output} was made with other contents of {files}: not continued")
    return _last_input(output) + 1


def _last_input(output: Path) -> int:
    """The number of the last input that was answered, or -1; cuts off half a line after it."""
    whole, last = 0, b'{"input": -1}'
    with writing(output), open(output, "rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                whole, last = whole + len(line), line
        file.truncate(whole)
    try:
        record = json_files.parse(last.decode("utf-8"), str(output))
        return json_files.Fields(record, str(output)).integer("input", least=-1)
    except (ValueError, AttributeError):
        raise InputError(f"{output}: its last line is no record of distillation") from None
