"""Prompt files and answer files: JSON Lines in, JSON Lines out.

A prompt record is one of
    {"prompt": text}                                    one user turn
    {"question": text}                                  the same (GSM8K); its answer is left alone
    {"turns": [text, ...]}                              each answered in turn (MT-bench)
    {"messages": [{"role", "content"}, ...]}            the last user turn is answered
    {"conversations": [{"from", "value"}, ...]}         the same, as `messages` reads it
    {"prompt_ids": [id, ...]}                           token ids as they are
Other keys are left alone; `question_id` or `id` is carried to the answer, and
`category` tells `bench` which prompts belong together.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.messages import Message, conversation_key, read_messages
from medusa_jax.data.text_files import numbered_lines
from medusa_jax.errors import InputError


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
        """A single user turn; bytes of a command line that are no text become U+FFFD."""
        text = json_files.whole_text(text)
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


def count_requests(path: str | Path) -> int | None:
    """Records of a prompt file, well-formed or not; None of a pipe, which is read only once."""
    if not Path(path).is_file():
        return None
    return sum(1 for _ in numbered_lines(Path(path)))


def record_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON Lines, without its end."""
    return json.dumps(record, ensure_ascii=False)


def _parse(line: str, origin: str) -> Request:
    record = json_files.parse(line, origin)
    if not isinstance(record, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(record).__name__}")
    name = record.get("question_id", record.get("id"))
    request = Request(id=name, category=str(record.get("category") or ""), origin=origin)
    if "prompt_ids" in record:
        _list_of(record, "prompt_ids", int, origin)
        ids = json_files.Fields(record, origin).integers("prompt_ids")
        return dataclasses.replace(request, prompt_ids=ids)
    if "prompt" in record:
        return dataclasses.replace(request, turns=(_text_of(record, "prompt", origin),))
    if "turns" in record:
        return dataclasses.replace(request, turns=tuple(_list_of(record, "turns", str, origin)))
    if key := conversation_key(record):
        messages = read_messages(record, key, origin)
        while messages and messages[-1]["role"] != "user":
            messages.pop()  # answers that come with the data are not part of the prompt
        if not messages:
            raise InputError(f"{origin}: {key!r} has no user turn to answer")
        return dataclasses.replace(
            request, turns=(messages[-1]["content"],), history=tuple(messages[:-1])
        )
    if "question" in record:
        return dataclasses.replace(request, turns=(_text_of(record, "question", origin),))
    raise InputError(
        f"{origin}: expected one of the keys prompt, question, turns, messages, conversations, "
        f"prompt_ids; got {', '.join(record) or 'none'}"
    )


def _text_of(record: dict[str, Any], key: str, origin: str) -> str:
    if not isinstance(record[key], str):
        raise InputError(f"{origin}: {key!r} must be a string")
    return record[key]


def _list_of(record: dict[str, Any], key: str, kind: type, origin: str) -> list[Any]:
    value = record[key]
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        raise InputError(f"{origin}: {key!r} must be a non-empty list of {kind.__name__}")
    return value
