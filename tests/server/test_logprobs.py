"""Log-probabilities over HTTP are those of Hugging Face, in both forms, streamed and whole."""

import concurrent.futures
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.data.token_bytes import TokenBytes
from medusa_jax.server.service import Service

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPT = "Lily ate a café"


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(shipped(), dtype=torch.float32)


def expected(
    model: transformers.PreTrainedModel, prompt: list[int], tokens: list[int]
) -> np.ndarray:
    """log_softmax at each token [n, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def entries(choice: Any) -> list[dict[str, Any]]:
    """The tokens of a choice of a chat."""
    return choice.model_dump()["logprobs"]["content"]


def test_a_chat(service: Service, client: openai.OpenAI, model: transformers.PreTrainedModel):
    """Greedy and sampled, by the tree and plainly, side by side; the stream says the same."""
    prompt = service.generator.text.encode([{"role": "user", "content": PROMPT}])
    messages: Any = [{"role": "user", "content": PROMPT}]
    how: dict[str, Any] = {"model": service.name, "messages": messages, "max_tokens": 12}
    how |= {"logprobs": True, "top_logprobs": 3, "seed": 4}

    def ask(settings: dict[str, Any]) -> list[dict[str, Any]]:
        return entries(client.chat.completions.create(**how, **settings).choices[0])

    cases: list[dict[str, Any]] = [
        {"temperature": temperature, "extra_body": {"speculative": speculative}}
        for temperature in (0, 1.0)
        for speculative in (True, False)
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        said = list(pool.map(ask, cases))
    ids = {TokenBytes(service.generator.text.tokenizer).of(i): i for i in range(4096)}
    for content in said:
        tokens = [ids[bytes(entry["bytes"])] for entry in content]
        whole = expected(model, prompt, tokens)
        chosen = whole[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose([entry["logprob"] for entry in content], chosen, atol=1e-4)
        top = [[one["logprob"] for one in entry["top_logprobs"]] for entry in content]
        np.testing.assert_allclose(top, -np.sort(-whole, axis=1)[:, :3], atol=1e-4)
    for tree, plain in (said[:2], said[2:]):
        assert [entry["bytes"] for entry in tree] == [entry["bytes"] for entry in plain]
    streamed = client.chat.completions.create(**how, **cases[2], stream=True)
    content = [
        entry for one in streamed if one.choices[0].logprobs for entry in entries(one.choices[0])
    ]
    assert [entry["bytes"] for entry in content] == [entry["bytes"] for entry in said[2]]
    alone, beside = ([entry["logprob"] for entry in one] for one in (content, said[2]))
    np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_a_completion(service: Service, client: openai.OpenAI):
    how: dict[str, Any] = {"model": service.name, "prompt": PROMPT, "max_tokens": 16}
    choice = client.completions.create(**how, temperature=0, logprobs=2).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens and found.text_offset and found.top_logprobs
    assert "".join(found.tokens).startswith(choice.text)
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs or [], found.top_logprobs, strict=True
    ):
        assert top[token] == max(top.values()) == logprob and len(top) == 2
    chunks = client.completions.create(**how, temperature=0, logprobs=2, stream=True)
    parts = [one.choices[0].logprobs for one in chunks]
    offsets = [offset for part in parts if part for offset in part.text_offset or []]
    assert offsets == found.text_offset
    assert found.text_offset[2] == len(found.tokens[0] + found.tokens[1])
    none = client.completions.create(**how, temperature=0)
    assert none.choices[0].logprobs is None
