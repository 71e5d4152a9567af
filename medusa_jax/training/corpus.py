"""Files and hub datasets to documents: conversations, or plain text.

Read with the `datasets` library. A record is one of

    {"conversations": [{"from", "value"}, ...]}     ShareGPT
    {"messages": [{"role", "content"}, ...]}
    {"text": ...}                                   plain text, also the files .txt

and may say `"truncated": true` where its last answer was cut off (as `medusa_jax.distill`
does): the end of that answer is then not learnt.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.records import conversation
from medusa_jax.text import Message

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text to learn from.

    Attributes:
      messages: a conversation; empty for plain text.
      text: plain text.
      truncated: its last answer was cut off.
      origin: file and record, for messages to the user.
      id: the record's own name, or None.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    truncated: bool = False
    origin: str = ""
    id: Any = None


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
          InputError: a source cannot be read, or, with on_bad "refuse", a
            record is none of the known kinds; names source and record.
        """
        for source in self.sources:
            found = 0
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

    def bad(self, error: InputError) -> None:
        """Leaves a record out, and counts it; with on_bad "refuse", raises."""
        if self._on_bad == "refuse":
            raise error
        self.skipped.append(str(error))


def _records(source: str, separator: str) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.is_file():
            kind = _FORMATS.get(Path(source.removesuffix(".gz")).suffix)
            if kind is None:
                raise InputError(f"{source}: expected a file .json, .jsonl, .parquet or .txt")
            if path.stat().st_size == 0:
                raise InputError(f"{source} is empty")
            whole = {"sample_by": "document"} if kind == "text" else {}
            table = datasets.load_dataset(kind, data_files=source, split="train", **whole)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", source) and not source.startswith("."):
            name, _, split = source.partition(":")
            table = datasets.load_dataset(name, split=split or "train")
        else:
            raise InputError(
                f"{source} does not exist (and is not a hub dataset of the form owner/name[:split])"
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(_unreadable(path, error)) from None
    if path.is_file() and kind == "text":
        for whole in table:
            for piece in whole["text"].split(separator):
                if piece.strip():
                    yield {"text": piece.strip()}
    else:
        yield from table


def _unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a source, with the line where a JSON Lines file breaks."""
    if path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line or b"{}")
            except ValueError as reason:
                return f"{path}, line {number}: not JSON: {reason}"
    reason = str(error.__cause__ or error).strip() or type(error).__name__
    return f"{path} could not be read: {reason.splitlines()[0]}"


def _document(record: dict[str, Any], origin: str) -> Document:
    name = record.get("id")
    for key in ("conversations", "messages"):
        if record.get(key) is not None:
            messages = conversation(record, key, origin)
            while messages and messages[0]["role"] == "assistant":
                messages.pop(0)  # an answer to nothing, which no template can write
            if not any(message["role"] == "assistant" for message in messages):
                raise InputError(f"{origin}: {key!r} has no assistant turn after a user's")
            return Document(tuple(messages), "", bool(record.get("truncated")), origin, name)
    if isinstance(record.get("text"), str):
        if not record["text"].strip():
            raise InputError(f"{origin}: 'text' is empty")
        return Document((), record["text"], bool(record.get("truncated")), origin, name)
    raise InputError(
        f"{origin}: expected one of the keys conversations, messages, text; "
        f"got {', '.join(key for key, value in record.items() if value is not None) or 'none'}"
    )
