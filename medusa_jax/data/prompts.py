"""Prompt files and answer files: JSON Lines in, JSON Lines out.

A prompt record is one of
    {"prompt": text}                                    one user turn
    {"turns": [text, ...]}                              each answered in turn (MT-bench)
    {"messages": [{"role", "content"}, ...]}            the last user turn is answered
    {"conversations": [{"from", "value"}, ...]}         the same, ShareGPT's names
    {"prompt_ids": [id, ...]}                           token ids as they are
Other keys are left alone; `question_id` or `id` is carried to the answer, and
`category` tells `bench` which prompts belong together.
"""

import contextlib
import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from medusa_jax import json_files
from medusa_jax.data.tokenizer import Message
from medusa_jax.errors import InputError

# Keys that hold a conversation, and what its messages call speaker and text.
CONVERSATIONS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer.

    Attributes:
      turns: user texts, each answered before the next is asked.
      history: the conversation before the first of them.
      prompt_ids: token ids instead of texts.
      id: the record's own name, or None.
      category: which prompts it belongs to, or "".
      origin: where it stands, for messages to the user.
    """

    turns: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    id: Any = None
    category: str = ""
    origin: str = "the prompt"

    @property
    def num_turns(self) -> int:
        """Answers it asks for."""
        return max(len(self.turns), 1)

    @classmethod
    def of_text(cls, text: str) -> "Request":
        """A single user turn."""
        return cls(turns=(text,), origin=f"the prompt {text!r}" if text else "the prompt")


def read_requests(
    path: str | Path, bad: Callable[[InputError], None] | None = None
) -> Iterator[Request]:
    """Reads a `.jsonl` or `.jsonl.gz` file lazily, skipping blank lines.

    Args:
      bad: told of lines that are no prompt records, which are then left out.

    Raises:
      InputError: the file cannot be read, or, without `bad`, a line is no
        prompt record; the message names file and line. Earlier lines have been
        yielded by then.
    """
    for number, line in numbered_lines(Path(path)):
        try:
            request = _parse(line, f"{path}, line {number}")
        except InputError as error:
            if bad is None:
                raise
            bad(error)
        else:
            yield request


def count_requests(path: str | Path) -> int:
    """Records of a prompt file, well-formed or not."""
    return sum(1 for _ in numbered_lines(Path(path)))


def write_record(stream: IO[str], record: dict[str, Any]) -> None:
    """Appends one whole line, so that a file cut short still holds valid records."""
    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    stream.flush()


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file, also compressed (`.gz`), to read.

    Raises:
      InputError: it is none, or breaks off; names `path`.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            yield stream
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {error}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file that are not blank, with their numbers from 1."""
    with open_text(path) as stream:
        yield from ((i, line) for i, line in enumerate(stream, start=1) if line.strip())


def conversation(record: dict[str, Any], key: str, origin: str) -> list[Message]:
    """The messages of a record under one of the keys of `CONVERSATIONS`.

    Raises:
      InputError: none there, or one without a role or a text; names `origin`.
    """
    role, content = CONVERSATIONS[key]
    return [
        _message(item, role, content, f"{origin}: {key}[{i}]")
        for i, item in enumerate(_list_of(record, key, dict, origin))
    ]


def _parse(line: str, origin: str) -> Request:
    record = json_files.parse(line, origin)
    if not isinstance(record, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(record).__name__}")
    name = record.get("question_id", record.get("id"))
    request = Request(id=name, category=str(record.get("category") or ""), origin=origin)
    if "prompt_ids" in record:
        ids = _list_of(record, "prompt_ids", int, origin)
        return dataclasses.replace(request, prompt_ids=tuple(ids))
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise InputError(f"{origin}: 'prompt' must be a string")
        return dataclasses.replace(request, turns=(record["prompt"],))
    if "turns" in record:
        return dataclasses.replace(request, turns=tuple(_list_of(record, "turns", str, origin)))
    for key in CONVERSATIONS:
        if key in record:
            messages = conversation(record, key, origin)
            while messages and messages[-1]["role"] != "user":
                messages.pop()  # answers that come with the data are not part of the prompt
            if not messages:
                raise InputError(f"{origin}: {key!r} has no user turn to answer")
            return dataclasses.replace(
                request, turns=(messages[-1]["content"],), history=tuple(messages[:-1])
            )
    raise InputError(
        f"{origin}: expected one of the keys prompt, turns, messages, conversations, prompt_ids; "
        f"got {', '.join(record) or 'none'}"
    )


def _list_of(record: dict[str, Any], key: str, kind: type, origin: str) -> list[Any]:
    value = record[key]
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        raise InputError(f"{origin}: {key!r} must be a non-empty list of {kind.__name__}")
    return value


def _message(item: dict[str, Any], role: str, content: str, origin: str) -> Message:
    if not isinstance(item.get(role), str) or not isinstance(item.get(content), str):
        raise InputError(f"{origin} needs the strings {role!r} and {content!r}")
    speaker = _ROLES.get(item[role], item[role])
    if speaker not in ("system", "user", "assistant"):
        raise InputError(f"{origin}: unknown {role} {item[role]!r}")
    return {"role": speaker, "content": item[content]}
