"""Conversations as people write them, read as a single form: messages of a role and a text.

    {"conversations": [{"from": "human", "value": "Hi"}, ...]}      ShareGPT
    {"messages": [{"role": "user", "content": "Hi"}, ...]}          OpenAI, Hugging Face
    {"conversation": ...}                                           either

The keys of a turn tell its form, whatever the key of the conversation. A content may be a list of
parts {"type": "text", "text": ...}, which are joined. Speakers are known by many names, in any
case. A field "system" beside the conversation is its first message.

Turns of tools are kept as context. What a tool returned has the role "tool". A call of a tool is
the assistant's, but nothing to learn: see `is_answer`.
"""

from typing import Any

from medusa_jax import json_files
from medusa_jax.errors import InputError

# "role" is system, user, assistant or tool; "content" is a text. Further keys are for templates.
Message = dict[str, Any]

CONVERSATIONS = ("conversations", "messages", "conversation")
_CALL = "function_call"
ROLES = {
    alias: role
    for role, aliases in {
        "system": "system developer",
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt gpt4 gpt-4 bing bard bot model ai",
        "tool": "tool function observation tool_response tool_result tool_results "
        "function_response function_result ipython",
        _CALL: "function_call tool_call tool_calls",
    }.items()
    for alias in aliases.split()
}
# What templates read of tool turns beside their text, as OpenAI names it.
_TOOL_KEYS = ("tool_calls", "tool_call_id", "name")


def conversation_key(record: dict[str, Any]) -> str | None:
    """The key of a record's conversation: the first of `CONVERSATIONS` that is not null."""
    return next((key for key in CONVERSATIONS if record.get(key) is not None), None)


def read_messages(record: dict[str, Any], key: str, origin: str) -> list[Message]:
    """The messages of a record's conversation, that of its "system" field first.

    Raises:
      InputError: none there, or a turn without a known speaker or a text; names `origin`.
    """
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{origin}: {key!r} must be a non-empty list of turns")
    messages = [_message(turn, f"{origin}: {key}[{i}]") for i, turn in enumerate(turns)]
    system = record.get("system")
    if system is None or system == "":
        return messages
    opening = {"role": "system", "content": _text(system, f"{origin}: 'system'")}
    return messages if messages[0] == opening else [opening, *messages]


def is_answer(message: Message) -> bool:
    """Whether an assistant's text is meant for the user, and so to be learnt: no call of a tool."""
    return message["role"] == "assistant" and not message.keys() & {"tool_calls", "from"}


def _message(turn: Any, origin: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{origin}: expected an object, got {json_files.short(turn)}")
    speaker = turn["role"] if turn.get("role") is not None else turn.get("from")
    if not isinstance(speaker, str):
        raise InputError(f"{origin} needs a speaker: the string 'role' or 'from'")
    role = ROLES.get(speaker.strip().lower())
    if role is None:
        raise InputError(f"{origin}: unknown speaker {json_files.short(speaker)}")
    extra = {name: turn[name] for name in _TOOL_KEYS if turn.get(name)}
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if content is None and extra.get("tool_calls"):
        content = ""
    if role == _CALL:
        role, extra = "assistant", extra | {"from": _CALL}
    elif role == "user":
        extra = {}  # the name of a person, which templates do not write
    return {"role": role, "content": _text(content, origin), **extra}


def _text(content: Any, origin: str) -> str:
    """A text, or the texts of a list of parts, joined."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "text"
        if isinstance(part.get("text"), str)
    ]
    if not texts or len(texts) < len(parts):
        raise InputError(
            f"{origin} needs a text: the string 'content' or 'value', or a list of parts "
            f'{{"type": "text", "text": ...}}; got {json_files.short(content)}'
        )
    return "".join(texts)
