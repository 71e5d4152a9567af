"""The server, through the `openai` client: texts are those of `decode.py`, whatever runs beside."""

import concurrent.futures
import copy
import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from helpers import servers

from medusa_jax.data.prompts import Request
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.server.app import create_app
from medusa_jax.server.service import Service
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.ladder import Chooser

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STORIES = ["Once upon a time", "Lily and Tom", "The dog ran", "One day a big red ball"]
SLOTS, WAITING = 4, 12
# Of the samples: a scheme is a program.
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}


def alone(service: Service, prompt: str, settings: dict[str, Any]) -> str:
    """The text of `decode.py` for the same token ids and settings."""
    temperature = settings["temperature"]
    scheme = Lossless(temperature, top_p=settings.get("top_p", 1.0)) if temperature else Greedy()
    how = {"seed": settings.get("seed", 0), "batch_size": 1, "stop": settings.get("stop", [])}
    generator = service.generator.with_tree(service.generator.tree, scheme, **how)
    conversation = Conversation(Request((), prompt_ids=tuple(service.completion_ids(prompt))))
    for _ in generator.converse([conversation], max_new_tokens=settings["max_tokens"]):
        pass
    return conversation.completions[0].text


def test_many_requests_together_write_what_each_writes_alone(
    service: Service, address: str, client: openai.OpenAI
):
    """Greedy and sampled, streamed and whole, with stop strings, some given up."""
    cases = []
    for i in range(64):
        settings: dict[str, Any] = {"max_tokens": (5, 50, 20, 33)[i % 4], "temperature": 0.0}
        if i % 3:
            settings |= SAMPLED | {"seed": i}
        if i % 5 == 0:
            settings["stop"] = [" and", "."]
        cases.append((STORIES[i % len(STORIES)], settings, i % 2 == 0, i % 7 == 6))

    def ask(case: tuple[str, dict[str, Any], bool, bool]) -> str | None:
        prompt, settings, stream, leave = case
        asked = {"model": service.name, "prompt": prompt} | settings
        if not stream and not leave:
            return client.completions.create(**asked).choices[0].text
        with client.completions.create(**asked, stream=True) as chunks:
            pieces = []
            for chunk in chunks:
                if leave:
                    return None
                pieces.append(chunk.choices[0].text)
        return "".join(pieces)

    with concurrent.futures.ThreadPoolExecutor(SLOTS + WAITING) as pool:
        texts = list(pool.map(ask, cases))
    told: dict[str, str] = {}  # the same greedy request comes again
    for (prompt, settings, *_), text in zip(cases, texts, strict=True):
        name = f"{prompt} {settings}"
        if text is not None:
            told[name] = told.get(name) or alone(service, prompt, settings)
            assert text == told[name], settings
    assert servers.settled(address, service)


def test_chat_choices_usage_and_figures(client: openai.OpenAI, service: Service):
    messages: Any = [{"role": "user", "content": "Tom"}]
    how: dict[str, Any] = {"model": service.name, "messages": messages, "max_tokens": 12}
    answer = client.chat.completions.create(**how, n=3, seed=5, **SAMPLED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    conversations = [Conversation.of(messages, 0) for _ in range(3)]
    for sample, conversation in enumerate(conversations):
        conversation.sample = sample
    scheme = Lossless(**SAMPLED)
    one = service.generator.with_tree(service.generator.tree, scheme, seed=5, batch_size=1)
    for _ in one.converse(conversations, max_new_tokens=12):
        pass
    expected = [conversation.completions[0] for conversation in conversations]
    assert [choice.message.content for choice in answer.choices] == [c.text for c in expected]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in expected)
    assert answer.usage.prompt_tokens == len(expected[0].prompt_ids)
    figures = answer.model_dump()["metrics"]["speculative_decoding"]
    # How many steps a text takes depends on the trees that the engine chooses.
    made = figures["num_spec_steps"] + figures["num_accepted_tokens"]
    assert 0 <= made - answer.usage.completion_tokens < 3 * 5
    lengths = figures["acceptance_histogram"]
    assert sum(lengths) == figures["num_spec_steps"]
    assert sum((i + 1) * count for i, count in enumerate(lengths)) == made
    how |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**how))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_steps_of_a_stream_make_up_its_text(
    address: str, service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Chooser, "step", lambda self, rows, ready: ready[-1])  # not by load
    body = {"prompt": STORIES[0], "max_tokens": 30, "temperature": 0, "stream": True}
    body |= {"stream_steps": True, "stream_options": {"include_usage": True}}
    text, steps, figures = "", [], {}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                figures = chunk.get("metrics", figures)
                for choice in chunk["choices"]:
                    text += choice["text"]
                    steps += choice["steps"]
    assert "".join(step["text"] for step in steps) == text and 1 < len(steps) < 30
    assert sum(step["tokens"] for step in steps) >= 30
    assert figures["speculative_decoding"]["num_spec_steps"] == len(steps)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{", 400, "not JSON"),
        ("completions", b"\xff", 400, "not UTF-8"),
        ("completions", b"[" * 100_000, 400, "nested too deeply"),
        ("completions", b"[]", 400, "valid dictionary"),
        ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ("completions", b'{"prompt": "a", "n": 1000}', 400, "n: "),
        ("completions", b'{"prompt": [99999999]}', 400, "vocabulary"),
        ("completions", b'{"prompt": []}', 400, "prompt is empty"),
        ("completions", b'{"prompt": "a", "max_tokens": 9999}', 400, "exceed"),
        ("completions", b'{"prompt": "a", "logprobs": 21}', 400, "at most 20"),
        (
            "completions",
            b'{"prompt": "a", "temperature": 0, "acceptance": "typical"}',
            400,
            "above",
        ),
        ("chat/completions", b'{"messages": [{}], "top_logprobs": 2}', 400, "needs logprobs"),
        ("completions", b'{"prompt": "a", "logit_bias": {"3": 5}}', 400, "logit_bias is not"),
        ("completions", b'{"prompt": "a", "model": "gpt-4"}', 404, "does not exist"),
        ("chat/completions", b'{"messages": []}', 400, "messages"),
        ("chat/completions", b'{"messages": [{"role": "user"}]}', 400, "messages[0]"),
        ("nothing", b"{}", 404, "Not Found"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(
    address: str, path: str, body: bytes, status: int, words: str
):
    answer = httpx.post(f"{address}/v1/{path}", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_are_refused(address: str, declared: bool):
    body = bytes(50 << 20)
    parts = (body[i : i + 65536] for i in range(0, len(body), 65536))
    content: Any = body if declared else parts
    answer = httpx.post(f"{address}/v1/completions", content=content)
    assert answer.status_code == 413 and "at most" in answer.json()["error"]["message"]


def test_a_full_queue_refuses_with_a_time_to_come_back(address: str, service: Service):
    body = {"prompt": "a", "max_tokens": 40, "temperature": 1, "n": 16, "ignore_eos": True}
    seen: list[httpx.Response] = []
    ask = lambda: seen.append(httpx.post(f"{address}/v1/completions", json=body, timeout=120))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    while not service.taken:
        time.sleep(0.005)
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full"
    thread.join()
    assert seen[0].status_code == 200
    assert all(choice["finish_reason"] == "length" for choice in seen[0].json()["choices"])
    assert servers.settled(address, service)


def test_who_goes_away_frees_the_slot(address: str, service: Service):
    """At once, and in the middle of an answer that would be long."""
    body = b'{"prompt": "a", "max_tokens": 250, "temperature": 1, "ignore_eos": true, "n": 4%s}'
    for extra in (b"", b', "stream": true'):
        with servers.connect(address, "/v1/completions", body % extra):
            deadline = time.monotonic() + 60
            while not service.taken and time.monotonic() < deadline:
                time.sleep(0.005)
            assert service.taken
        begun = time.monotonic()
        assert servers.settled(address, service)
        assert time.monotonic() - begun < 20


def test_a_key_is_asked_for(service: Service):
    locked = copy.copy(service)
    locked.key = "secret"
    client = TestClient(create_app(locked))
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer no"}).status_code == 401
    right = client.get("/v1/models", headers={"Authorization": "Bearer secret"})
    assert right.json()["data"][0]["id"] == service.name
    assert client.get("/health").status_code == 200
