"""The loop over turns: histories, errors in the middle, texts that grow."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from medusa_jax.data.prompts import Request
from medusa_jax.errors import InputError
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.generator import Generator


@pytest.fixture(scope="module")
def generator(shared: Path) -> Generator:
    """Plain decoding of stories260K, two rows at a time."""
    return Generator.load(
        shared / "models/stories260K",
        raw=True,
        autoregressive=True,
        max_length=128,
        max_new_tokens=12,
        batch_size=2,
    )


def request(*turns: str, origin: str = "here") -> Request:
    return Request(turns, origin=origin)


def test_a_prompt_of_messages_in_any_form():
    parts = [{"type": "text", "text": "T"}, {"type": "text", "text": "om"}]
    made = Conversation.of([{"from": "GPT", "value": "Hi"}, {"role": "human", "content": parts}])
    assert made.request.turns == ("Tom",)
    assert made.messages == [{"role": "assistant", "content": "Hi"}]


def test_turns_hear_the_answers_before_them(generator: Generator):
    conversation = Conversation(request("Tom", "Then"))
    updates = [one for one in generator.converse([conversation]) if one.completion]
    first, second = conversation.completions
    assert [one.completion for one in updates] == [first, second]
    history = ["Tom", first.text.strip(), "Then"]
    expected = generator.text.encode([{"role": "user", "content": turn} for turn in history])
    assert second.prompt_ids == expected and second.prompt == "Then"
    assert conversation.ended and conversation.record()["turn"] == 1


@pytest.mark.slow
def test_what_came_before_an_error_of_reading_is_answered_first(generator: Generator):
    def read() -> Iterator[Conversation]:
        yield Conversation(request("Tom"), 0)
        yield Conversation(request("Lily"), 1)
        raise InputError("line 3: not JSON")

    answered = []
    with pytest.raises(InputError, match="line 3"):
        for update in generator.converse(read()):
            answered += [update.conversation.number] if update.completion else []
    assert sorted(answered) == [0, 1]
    assert generator.engine.idle


@pytest.mark.slow
@pytest.mark.parametrize("refuse", [True, False])
def test_a_first_turn_that_does_not_fit(generator: Generator, refuse: bool):
    asked = [Conversation(request("Tom"), 0), Conversation(request("word " * 90, origin="x"), 1)]
    asked.append(Conversation(request("Ben"), 2))
    answered: list[int] = []

    def hold() -> None:
        for update in generator.converse(asked, refuse=refuse):
            answered.extend([update.conversation.number] if update.completion else [])

    if refuse:
        with pytest.raises(InputError, match=r"^x has "):
            hold()
        assert answered == [0]
    else:
        hold()
        assert sorted(answered) == [0, 2]
        assert asked[1].problem is not None and asked[1].messages == []


def test_a_later_turn_that_does_not_fit_ends_the_conversation(generator: Generator):
    conversation = Conversation(request("Tom", "word " * 90, "And?"))
    updates = list(generator.converse([conversation]))
    assert len(conversation.completions) == 1 and conversation.ended
    assert updates[-1].completion is None and "exceed" in str(conversation.problem)
    assert [one["role"] for one in conversation.messages] == ["user", "assistant"]


@pytest.mark.slow
def test_texts_that_grow_end_as_whole_texts(generator: Generator):
    conversations = [Conversation(request(text), i) for i, text in enumerate(("Tom", "Lily"))]
    texts = {0: "", 1: ""}
    for update in generator.converse(conversations, stream=True):
        texts[update.conversation.number] += update.text
    assert texts == {one.number: one.completions[0].text for one in conversations}


def test_a_loop_that_is_left_frees_its_slots(generator: Generator):
    updates = generator.converse([Conversation(request("Tom"), i) for i in range(5)], stream=True)
    next(updates)
    updates.close()
    assert generator.engine.idle


def test_an_engine_serves_on_after_an_interrupt(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    """The state was given away, and did not come back."""
    expected = generator.generate(["Tom", "Lily"])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("medusa_jax.serving.slots.outputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.generate(["Tom", "Lily", "Ben"])
    assert generator.engine.idle
    again = generator.generate(["Tom", "Lily"])
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]
