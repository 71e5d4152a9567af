"""The recipes on Ray, with two workers on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.paths import ROOT

pytest.importorskip("ray", reason="needs ray: pip install 'medusa_jax[ray]'")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BODY = {"prompt": "Tom", "max_tokens": 8, "temperature": 0}


def environment(mark: str) -> dict[str, str]:
    """That of a recipe, whose workers can be told by a mark."""
    return os.environ | {"MARK": mark, "RAY_AUTH_MODE": "disabled", "JAX_PLATFORMS": "cpu"}


def replicas(mark: str) -> list[int]:
    """Process ids of the replicas."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            name = (directory / "cmdline").read_bytes()
            variables = (directory / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::ServeReplica:medusa") and f"MARK={mark}".encode() in variables:
            found.append(int(directory.name))
    return found


@pytest.fixture
def served() -> Iterator[tuple[str, str]]:
    """The address of two replicas, and their mark."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, mark = free.getsockname()[1], uuid.uuid4().hex
    flags = ["--replicas", "2", "--slots", "2", "--max_length", "128", "--port", str(port)]
    flags += ["--cpus", "0.5", "--autoregressive"]
    process = subprocess.Popen(
        [sys.executable, "recipes/ray_serve.py", *flags],
        cwd=ROOT, env=environment(mark), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    address = next(found[1] for line in lines if (found := re.search(r"^listening on (\S+)", line)))
    yield address, mark
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_a_killed_replica_is_answered_by_the_other(served: tuple[str, str]):
    address, mark = served
    ask = lambda: httpx.post(f"{address}/v1/completions", json=BODY, timeout=120)  # noqa: E731
    first = ask()
    assert first.status_code == 200
    wrong = httpx.post(f"{address}/v1/completions", content=b"{", timeout=120)
    assert wrong.status_code == 400 and "not JSON" in wrong.json()["error"]["message"]
    with httpx.stream("POST", f"{address}/v1/completions", json=BODY | {"stream": True}) as parts:
        assert "".join(parts.iter_text()).endswith("data: [DONE]\n\n")
    one, other = replicas(mark)
    os.kill(one, signal.SIGKILL)
    texts = []
    until = time.monotonic() + 60
    while len(texts) < 3 and time.monotonic() < until:
        answer = ask()  # Ray answers 500 for what the dead replica had begun
        if answer.status_code == 200:
            texts.append(answer.json()["choices"][0]["text"])
    assert texts == [first.json()["choices"][0]["text"]] * 3 and other in replicas(mark)


def test_answers_of_two_workers_are_those_of_distill(tmp_path: Path, run_module):
    """The files of both shards hold what a single process writes."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{name} had a"}) for name in ("Tom", "Lily", "Mia", "Ben")]
    prompts.write_text("\n".join(lines))
    flags = ["--data", str(prompts), "--temperature", "0", "--max_new_tokens", "12"]
    flags += ["--batch_size", "2", "--max_length", "128", "--autoregressive"]
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "recipes/ray_distill.py", *flags, "--output", str(output)]
    workers = ["--workers", "2", "--cpus", "0.5"]
    subprocess.run(
        [*command, *workers], cwd=ROOT, env=environment(""), check=True, capture_output=True
    )
    alone = tmp_path / "alone.jsonl"
    code, err = run_module("distill", *flags, "--output", alone)
    assert code == 0, err
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    assert read(output) == read(alone) and len(read(output)) == 4
