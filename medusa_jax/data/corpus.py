"""Files and hub datasets to documents: conversations, or plain text.

A record is one of

    {"conversations": [{"from", "value"}, ...]}     ShareGPT; see `messages` for other forms
    {"messages": [{"role", "content"}, ...]}
    {"text": ...}                                   plain text, also the files .txt

and may say `"truncated": true` where its last answer was cut off (as `medusa_jax.distill`
does): the end of that answer is then not learnt. `distill` adds the token ids of a conversation.

Parquet and the hub are read with the `datasets` library; JSON and text are
not, for it takes the types of a whole file from its first megabytes, and
refuses or rewrites the later records that differ.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.messages import (
    CONVERSATIONS,
    Message,
    conversation_key,
    is_answer,
    read_messages,
)
from medusa_jax.data.text_files import MOST_WHOLE, numbered_lines, open_text, read_whole
from medusa_jax.errors import InputError, needs

_FILES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text to learn from.

    Attributes:
      messages: a conversation; empty for plain text.
      text: plain text.
      truncated: its last answer was cut off.
      written: its token ids as some model wrote them, or None.
      origin: file and record, for messages to the user.
      id: the record's own name, or None.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    truncated: bool = False
    origin: str = ""
    id: Any = None
    written: "Written | None" = None


@dataclasses.dataclass(frozen=True)
class Written:
    """A document in the tokens that a model read and wrote.

    Attributes:
      token_ids: of the whole document.
      learnt: spans of them that are learnt, [start, stop).
      vocabulary: `ChatTokenizer.fingerprint` of that model.
    """

    token_ids: tuple[int, ...]
    learnt: tuple[tuple[int, int], ...]
    vocabulary: str


class Corpus:
    """The documents of several sources, in order.

    Attributes:
      skipped: messages about records that were left out, so far.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        separator: str = "<|endoftext|>",
        max_documents: int = 0,
        on_bad: str = "skip",
    ) -> None:
        """Settings as in `settings.Data`; sources are opened when iterated."""
        self.sources = tuple(sources)
        self.skipped: list[str] = []
        self._separator, self._limit, self._on_bad = separator, max_documents, on_bad

    def __iter__(self) -> Iterator[Document]:
        """Yields documents.

        Raises:
          InputError: a source cannot be read, or none of its records, or, with on_bad
            "refuse", one of them; names source and record.
        """
        for source in self.sources:
            found, number, before = 0, 0, len(self.skipped)
            for number, record in enumerate(_records(source, self._separator), start=1):
                if self._limit and found == self._limit:
                    break
                try:
                    document = _document(record, f"{source}, record {number}")
                except InputError as error:
                    self.bad(error)
                    continue
                found += 1
                yield document
            if not number:
                raise InputError(f"{source} holds no records")
            if not found:
                raise InputError(f"{self.skipped[before]}; {source} holds no better record")

    def bad(self, error: InputError) -> None:
        """Leaves a record out, and counts it; with on_bad "refuse", raises."""
        if self._on_bad == "refuse":
            raise error
        self.skipped.append(str(error))


def _records(source: str, separator: str) -> Iterator[Any]:
    path = Path(source)
    if path.is_file() or source.endswith(_FILES):
        if not path.is_file():
            raise InputError(f"{source} does not exist")
        if not source.endswith(_FILES):
            raise InputError(f"{source}: expected a file {', '.join(_FILES)}")
        if source.endswith((".json", ".json.gz")):
            yield from _json(path)
        elif source.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path)
        elif source.endswith((".txt", ".txt.gz")):
            yield from _texts(path, separator)
        else:
            yield from _table(source, "parquet", data_files=source)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", source) and not source.startswith("."):
        name, _, split = source.partition(":")
        yield from _table(source, name, split=split or "train")
    else:
        raise InputError(
            f"{source} does not exist (and is not a hub dataset of the form owner/name[:split])"
        )


def _json(path: Path) -> Iterator[Any]:
    """Records of one JSON array, or of JSON Lines, which many files of this name hold."""
    try:
        value = json_files.parse(read_whole(path) or "[]", str(path))
    except InputError as error:
        if getattr(error.__context__, "msg", None) != "Extra data":
            raise
        yield from _json_lines(path)
    else:
        yield from value if isinstance(value, list) else [value]


def _json_lines(path: Path) -> Iterator[Any]:
    """Records of JSON Lines; for a line that is no JSON, the error."""
    for number, line in numbered_lines(path):
        try:
            yield json_files.parse(line, f"{path}, line {number}")
        except InputError as error:
            yield error


def _texts(path: Path, separator: str) -> Iterator[dict[str, str]]:
    """Documents between separators, without holding the whole file."""
    rest = ""
    with open_text(path) as stream:
        while chunk := stream.read(max(2**20, len(rest))):
            *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
            yield from ({"text": text.strip()} for text in whole if text.strip())
            if len(rest) > MOST_WHOLE:
                raise InputError(
                    f"{path} has a document of more than {MOST_WHOLE:,} characters: "
                    "give the separator of its documents"
                )
    if rest.strip():
        yield {"text": rest.strip()}


def _table(source: str, name: str, split: str = "train", **how: Any) -> Iterator[dict[str, Any]]:
    with needs("train"):
        import datasets

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(name, split=split, trust_remote_code=False, **how)
    except Exception as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise InputError(f"{source} could not be read: {reason.splitlines()[0]}") from None


def _document(record: Any, origin: str) -> Document:
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(record).__name__}")
    name = record.get("id")
    if key := conversation_key(record):
        messages = read_messages(record, key, origin)
        while messages and messages[0]["role"] == "assistant":
            messages.pop(0)  # an answer to nothing, which no template can write
        if not any(map(is_answer, messages)):
            raise InputError(f"{origin}: {key!r} has no assistant turn after a user's")
        cut = bool(record.get("truncated"))
        return Document(tuple(messages), "", cut, origin, name, _written(record, origin))
    if isinstance(record.get("text"), str):
        if not record["text"].strip():
            raise InputError(f"{origin}: 'text' is empty")
        return Document((), record["text"], bool(record.get("truncated")), origin, name)
    raise InputError(
        f"{origin}: expected one of the keys {', '.join(CONVERSATIONS)}, text; "
        f"got {', '.join(key for key, value in record.items() if value is not None) or 'none'}"
    )


def _written(record: dict[str, Any], origin: str) -> Written | None:
    """The token ids of a record of `medusa_jax.distill`."""
    if record.get("token_ids") is None:
        return None
    fields = json_files.Fields(record, origin)
    ids, spans = fields.integers("token_ids"), record.get("learnt")
    if not isinstance(spans, list) or not all(_is_span(span, len(ids)) for span in spans):
        raise InputError(f"{origin}: 'learnt' must be spans [start, stop] of the {len(ids)} tokens")
    return Written(ids, tuple((start, stop) for start, stop in spans), fields.text("vocabulary"))


def _is_span(span: Any, tokens: int) -> bool:
    whole = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
    return whole and 0 <= span[0] <= span[1] <= tokens
