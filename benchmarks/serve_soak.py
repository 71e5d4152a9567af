"""A long run of a server: its memory over time, and slots that are not given back.

    python benchmarks/serve_soak.py --requests 2000
    python benchmarks/serve_soak.py --requests 2000 --flags "--model DIR --slots 8"

Starts a server of its own. Users send greedy and sampled requests of mixed lengths, streamed and
whole, some with stop strings, log-probabilities or plain decoding; some leave in the middle.
Exits with 1 where a request failed, a slot leaked, or memory grew by more than `--growth` after the
first quarter.
"""

import asyncio
import dataclasses
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from medusa_jax.cli import runner
from medusa_jax.options import option

EXAMPLE = "python benchmarks/serve_soak.py --requests 2000 --users 24"
PROMPTS = ("Once upon a time", "Lily and Tom", "The dog ran", "One day a big red ball", "Mia saw")


@dataclasses.dataclass(kw_only=True)
class SoakOptions:
    """How long, and on what."""

    requests: int = option(2000, least=8, help="in all")
    users: int = option(24, least=1, help="who ask at once")
    growth: float = option(0.1, least=0, help="of memory that is allowed, as a part of it")
    flags: str = option("", help="of the server")


class Leaked(RuntimeError):
    """The server has lost memory or slots, or did not answer."""


def body_of(number: int) -> dict[str, Any]:
    """A request: of each number another mix."""
    draw = random.Random(number)
    body: dict[str, Any] = {"prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(1, 120)}
    body |= {"temperature": draw.choice((0, 0, 0.8, 1.2)), "seed": number}
    body |= draw.choice(({}, {}, {"stop": [".", " and"]}, {"logprobs": 3}, {"n": 2}))
    return body | ({"speculative": False} if number % 16 == 15 else {})


async def ask(client: httpx.AsyncClient, number: int) -> str:
    """Sends a request; what became of it: "whole", "streamed", "left", or an error."""
    body = body_of(number)
    try:
        if number % 2:
            reply = await client.post("/v1/completions", json=body)
            return "whole" if reply.status_code == 200 else f"status {reply.status_code}"
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            last = ""
            async for line in reply.aiter_lines():
                if number % 10 == 4:
                    return "left"
                last = line or last
            return "streamed" if last == "data: [DONE]" else f"ended with {last[:100]}"
    except httpx.HTTPError as error:
        return type(error).__name__


def memory(process: int) -> float:
    """Resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


async def soak(options: SoakOptions, address: str, process: int) -> None:
    """Sends all requests, and looks at the server between them.

    Raises:
      Leaked: see the module.
    """
    results: dict[str, int] = {}
    sizes: list[float] = []
    every = max(options.requests // 20, 1)
    numbers = iter(range(options.requests))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:

        async def user() -> None:
            for number in numbers:
                result = await ask(client, number)
                results[result] = results.get(result, 0) + 1
                answered = sum(results.values())
                if answered % every == 0:
                    sizes.append(memory(process))
                    print(f"{answered} requests, {sizes[-1]:.0f} MiB, {results}", flush=True)

        async with asyncio.TaskGroup() as group:
            for _ in range(options.users):
                group.create_task(user())
        await asyncio.sleep(2)
        text = (await client.get("/metrics")).text
    left = re.findall(r"^vllm:num_requests_(running|waiting)\{.*\} (\S+)$", text, re.M)
    print(f"left in the server: {dict(left)}")
    failed = {name: n for name, n in results.items() if name not in ("whole", "streamed", "left")}
    if failed or any(float(number) for _, number in left) or not left:
        raise Leaked(f"failed: {failed or 'none'}; left in the server: {dict(left)}")
    settled, last = sizes[len(sizes) // 4], sizes[-1]
    print(f"memory after a quarter {settled:.0f} MiB, at the end {last:.0f} MiB")
    if last > settled * (1 + options.growth):
        raise Leaked(f"memory grew from {settled:.0f} to {last:.0f} MiB")


def run(options: SoakOptions) -> None:
    """Starts a server, and soaks it."""
    command = [sys.executable, "-m", "medusa_jax.serve", "--port", "0"]
    command += ["--max_waiting", "1000", *shlex.split(options.flags)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if found is None:
            raise Leaked(f"the server did not start: {shlex.join(command)}")
        asyncio.run(soak(options, found[0], server.pid))
    finally:
        server.terminate()
        server.wait()
    if server.returncode:
        raise Leaked(f"the server ended with {server.returncode}")


if __name__ == "__main__":
    runner.command(run, SoakOptions, __doc__ or "", EXAMPLE)
