"""Conversations in the forms that people write, read as a single form."""

import json
from typing import Any

import pytest

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.messages import ROLES, is_answer, read_messages
from medusa_jax.data.prompts import read_requests
from medusa_jax.errors import InputError


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _said(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


TALK = [_turn("user", "Hi"), _turn("assistant", "Hello")]
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
FORMS = [
    {"conversations": [_said("human", "Hi"), _said("gpt", "Hello")]},
    {"conversations": TALK},
    {"messages": [_said("human", "Hi"), _said("gpt", "Hello")]},
    {"conversation": [_said(" Human", "Hi"), _said("GPT ", "Hello")]},
    {
        "conversations": None,
        "messages": [{"role": "PROMPTER", "value": "Hi"}, _said("Bard", "Hello")],
    },
    {"messages": [_turn("user", PARTS), _turn("model", [{"type": "text", "text": "Hello"}])]},
    {"messages": [_turn("user", "Hi", name="Tom"), _turn("AI", "Hello", tool_calls=None)]},
    {"messages": [{"from": None, "role": "human", "content": "Hi"}, _said("bing", "Hello")]},
]


@pytest.mark.parametrize("record", FORMS)
def test_every_form_is_the_same_conversation(tmp_path, record):
    """In training and in prompts alike."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (document,) = Corpus([str(file)], on_bad="refuse")
    assert list(document.messages) == TALK
    (request,) = read_requests(file)
    assert request.turns == ("Hi",) and request.history == ()


def test_a_system_field_comes_first(tmp_path):
    brief = _turn("system", "Be brief.")
    for record in (
        {"system": "Be brief.", "messages": TALK},
        {"system": "Be brief.", "conversations": [brief, *TALK]},
        {"system": "", "messages": [_turn("Developer", "Be brief."), *TALK]},
    ):
        key = next(key for key in record if key != "system")
        assert read_messages(record, key, "a") == [brief, *TALK]
    with pytest.raises(InputError, match="a: 'system' needs a text"):
        read_messages({"system": 5, "messages": TALK}, "messages", "a")


def test_tool_turns_are_kept_and_not_learnt():
    """ShareGPT's names and OpenAI's; further keys of tool turns are for the template."""
    call = {"type": "function", "function": {"name": "time", "arguments": {}}}
    asked = [
        _said("human", "When?"),
        _said("function_call", '{"name": "time"}'),
        _said("observation", "noon"),
        _turn("assistant", None, tool_calls=[call]),
        _turn("tool", "12", tool_call_id="x", name="time"),
        _said("gpt", "At noon."),
    ]
    found = read_messages({"messages": asked}, "messages", "a")
    assert found == [
        _turn("user", "When?"),
        {**_turn("assistant", '{"name": "time"}'), "from": "function_call"},
        _turn("tool", "noon"),
        _turn("assistant", "", tool_calls=[call]),
        _turn("tool", "12", tool_call_id="x", name="time"),
        _turn("assistant", "At noon."),
    ]
    assert [is_answer(message) for message in found] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("a", r"^a: messages\[1\]: expected an object, got 'a'"),
        (_turn("root", "x"), r"^a: messages\[1\]: unknown speaker 'root'"),
        ({"role": 3, "content": "x"}, r"^a: messages\[1\] needs a speaker"),
        (_turn("user", None), r"^a: messages\[1\] needs a text"),
        (_turn("user", []), r"needs a text.*got \[\]"),
        (_turn("user", [{"type": "image_url", "image_url": "x"}]), "needs a text"),
        (_turn("user", [*PARTS, "x"]), "needs a text"),
        (_turn("user", [*PARTS, {"type": "text", "text": 3}]), "needs a text"),
    ],
)
def test_what_is_no_turn(turn, message):
    with pytest.raises(InputError, match=message):
        read_messages({"messages": [TALK[0], turn]}, "messages", "a")


def test_speakers_are_lower_case():
    assert all(alias == alias.strip().lower() for alias in ROLES)
