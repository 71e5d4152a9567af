"""What `distill` asks: the user's turns of conversations, first words of texts, or nothing at all.

An aligned model that is given only what its template writes before a user's words says what users
would ask (Magpie, Xu et al., arXiv 2406.08464).
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from medusa_jax import json_files
from medusa_jax.data.corpus import Corpus, Document
from medusa_jax.data.messages import CONVERSATIONS
from medusa_jax.data.prompts import Request, read_requests
from medusa_jax.data.text_files import numbered_lines
from medusa_jax.data.tokenizer import MARK, ChatTokenizer
from medusa_jax.errors import InputError
from medusa_jax.serving.distill_options import DistillOptions

_WORDS = "a number of words N, or a range N-M"


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


def questions(text: ChatTokenizer, count: int) -> Iterator[Request]:
    """Beginnings of a user's turn, which the model goes on with.

    Raises:
      InputError: the model has no chat template.
    """
    if text.template is None:
        raise InputError("--questions needs a model with a chat template, which says who speaks")
    before = text.render([{"role": "user", "content": MARK}], answer=False).partition(MARK)[0]
    ids = tuple(text.tokenizer.encode(before, add_special_tokens=False))
    for number in range(count):
        yield Request(prompt_ids=ids, id=f"question-{number}", origin=f"question {number}")


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
    found = number_pair(flag, "N-N") or number_pair(f"{flag}-{flag}", "N-N")
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


def number_pair(flag: str, form: str) -> tuple[int, int] | None:
    """The two numbers of a flag: ("3/8", "N/N") -> (3, 8), ("3", "N/N") -> None."""
    found = re.fullmatch(form.replace("N", r"(\d{1,9})"), flag, re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))
