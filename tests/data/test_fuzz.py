"""Files of prompts and of training data with anything wrong: read, or refused by name."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.tokenizers import byte_fallback

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.prompts import read_requests
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError

TURNS = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": [{"type": "text", "text": "a"}]},
]
RECORDS: list[Any] = [
    {"prompt": "Once upon a time", "text": "there was 月"},
    {"turns": ["a", "b"], "question_id": 3, "text": "a"},
    {"system": "Be brief.", "conversations": TURNS, "category": "c", "truncated": True},
    {"messages": [{"role": "User", "content": "😀"}, {"role": "tool", "content": "1"}, TURNS[1]]},
    {"prompt_ids": [1, 2, 3], "id": "x", "text": "b"},
]
ODD = [None, True, -1, 2**70, 1e308, float("nan"), "", "\x00", "\ud800", [], {}, [[]], {"a": 1}]


def _other_value(rng: random.Random, value: Any) -> Any:
    """The value with something inside it replaced, left out or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value])
        rest = {name: inner for name, inner in value.items() if name != key}
        return rest if rng.random() < 0.2 else rest | {key: _other_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], _other_value(rng, value[i]), *value[rng.randrange(len(value) + 1) :]]
    return rng.choice(ODD)


def _other_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few changed, or a part of them repeated many times."""
    i, j = sorted(rng.choices(range(len(data)), k=2))
    if rng.random() < 0.5:
        return data[:i] + bytes(rng.choices(range(256), k=rng.randrange(4))) + data[j:]
    return data[:i] + data[i:j] * rng.choice([0, 2, 30]) + data[j:]


@pytest.fixture
def text(tmp_path) -> ChatTokenizer:
    return ChatTokenizer(byte_fallback(tmp_path), template="zephyr")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nothing_but_a_refusal_comes_out(tmp_path, text, name):
    """By values and by bytes; 100 of each, whatever becomes of bad records."""
    rng, file = random.Random(0), tmp_path / name

    def prompts() -> None:
        for request in read_requests(file):
            if request.turns:
                text.encode([*request.history, {"role": "user", "content": request.turns[0]}])

    def training() -> None:
        corpus = Corpus([str(file)], on_bad=rng.choice(["skip", "refuse"]))
        list(encode(corpus, text, batch=2))

    readers: list[Callable[[], None]] = [prompts, training]
    outcomes = []
    for i in range(200):
        records = list(RECORDS)
        if i % 2:
            place = rng.randrange(len(records))
            records[place] = _other_value(rng, records[place])
        lines = "\n".join(map(json.dumps, records)) if name == "a.jsonl" else json.dumps(records)
        data = lines.encode()
        file.write_bytes(data if i % 2 else _other_bytes(rng, data))
        for reader in readers:
            try:
                reader()
                outcomes.append(True)
            except InputError as error:
                assert "a.json" in str(error) or "template" in str(error)
                outcomes.append(False)
    assert 30 < sum(outcomes) < len(outcomes) - 30
