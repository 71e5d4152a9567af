"""Load on a server with OpenAI's interface: many users, tokens a second, times to the first token.

    python -m medusa_jax.serve --slots 16 &
    python benchmarks/serve_load.py --users 1 16 --requests 64

Any such server may be given by `--url`, vLLM's among them: the figures are the client's. Each
user asks its next prompt once the answer before is whole. With `--users 1`, requests come one
after the other. `--long_prompt N` sends a prompt of about N tokens meanwhile, and `--extra` adds
fields to all requests, such as '{"speculative": false}'.
"""

import asyncio
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from medusa_jax import json_files
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.cli import runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.errors import InputError
from medusa_jax.options import option

EXAMPLE = "python benchmarks/serve_load.py --url http://127.0.0.1:8000 --users 1 16"
TIMEOUT = 600.0


@dataclasses.dataclass(kw_only=True)
class LoadOptions:
    """Whom to ask, what, and how."""

    url: str = option("http://127.0.0.1:8000", help="of the server, without /v1")
    model: str | None = option(None, help="its name (default: the first that the server has)")
    users: list[int] = option([1, 16], nargs="+", least=1, help="who ask at once; a run each")
    requests: int = option(64, least=1, help="of each run")
    prompts: str | None = option(None, help="JSON Lines (default: those of the shipped model)")
    chat: bool = option(False, help="conversations, by the model's chat template")
    max_tokens: int = option(128, least=1, help="of an answer")
    temperature: float = option(0.0, least=0, help="0 is greedy")
    long_prompt: int = option(0, least=0, help="tokens of a prompt that arrives meanwhile")
    extra: str = option("{}", metavar="JSON", help="more fields of each request")
    output: str | None = option(None, metavar="FILE", help="the figures as JSON")


@dataclasses.dataclass
class Answer:
    """What a client saw of a request: tokens, and seconds to the first and to the last."""

    tokens: int
    first: float
    last: float
    error: str = ""


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Streams an answer; the tokens are those of the server's usage."""
    begun, first, tokens = time.perf_counter(), 0.0, 0
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        async with client.stream("POST", route, json=body) as reply:
            if reply.status_code != 200:
                said = (await reply.aread()).decode("utf-8", "replace")
                return Answer(0, 0.0, 0.0, f"{reply.status_code}: {said[:200]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Answer(0, 0.0, 0.0, str(chunk["error"]))
                if not first and any(map(text_of, chunk["choices"])):
                    first = time.perf_counter() - begun
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.HTTPError as error:
        return Answer(0, 0.0, 0.0, f"{type(error).__name__}: {error}")
    return Answer(tokens, first, time.perf_counter() - begun)


def text_of(choice: dict[str, Any]) -> str:
    """What a chunk adds to a text."""
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


async def load(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], users: int
) -> tuple[list[Answer], float]:
    """All answers, and the seconds that they took together."""
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def user() -> None:
        for body in waiting:
            answers.append(await ask(client, body))

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
    return answers, time.perf_counter() - begun


def figures(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Tokens a second of all users, and the median and 95th percentile of first-token times."""
    good = [answer for answer in answers if not answer.error]
    firsts = sorted(answer.first for answer in good if answer.first) or [0.0]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 2),
        "first_token_median": round(statistics.median(firsts), 4),
        "first_token_95": round(firsts[min(int(0.95 * len(firsts)), len(firsts) - 1)], 4),
        "tokens_per_answer": round(sum(a.tokens for a in good) / max(len(good), 1), 1),
    }


async def measure(options: LoadOptions) -> list[dict[str, Any]]:
    """The figures of each run.

    Raises:
      InputError: the server is not there, or the prompts hold none.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=TIMEOUT, limits=limits) as client:
        try:
            models = (await client.get("/v1/models")).json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise InputError(f"--url {options.url}: no models there: {error}") from None
        shared = {"model": options.model or models[0]["id"], "max_tokens": options.max_tokens}
        shared |= {"temperature": options.temperature, **json_files.parse(options.extra, "--extra")}
        source = options.prompts or str(shipped() / "prompts.jsonl")
        prompts = [request.turns[0] for request in read_requests(source) if request.turns]
        if not prompts:
            raise InputError(f"{source} holds no prompts")
        bodies = [
            shared | asked(prompts[i % len(prompts)], options.chat) | {"seed": i}
            for i in range(options.requests)
        ]
        rows = []
        for users in options.users:
            await _long(client, shared, options.long_prompt, 1)  # to compile what is needed
            await load(client, bodies[:users], users)
            long = asyncio.create_task(_long(client, shared, options.long_prompt))
            answers, seconds = await load(client, bodies, users)
            long.cancel()
            rows.append({"users": users} | figures(answers, seconds))
            print(json.dumps(rows[-1]), flush=True)
            for error in sorted({answer.error for answer in answers if answer.error})[:3]:
                print(f"  failed: {error}")
        return rows


def asked(prompt: str, chat: bool) -> dict[str, Any]:
    """The field of a request that has the prompt."""
    return {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}


async def _long(
    client: httpx.AsyncClient, shared: dict[str, Any], tokens: int, times: int = 1 << 31
) -> None:
    """Sends a prompt of about so many tokens again and again."""
    for _ in range(times if tokens else 0):
        answer = await ask(client, shared | {"prompt": "the " * tokens, "max_tokens": 1})
        if answer.error:
            raise InputError(f"--long_prompt {tokens}: {answer.error}")


def run(options: LoadOptions) -> None:
    """Measures, and writes the figures."""
    rows = asyncio.run(measure(options))
    if options.output:
        json_files.write(Path(options.output), rows)


if __name__ == "__main__":
    runner.command(run, LoadOptions, __doc__ or "", EXAMPLE)
