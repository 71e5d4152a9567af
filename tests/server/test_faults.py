"""What goes wrong: each client gets an answer in OpenAI's form, and the others go on."""

import concurrent.futures
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from helpers import servers
from helpers.paths import ROOT

from medusa_jax.server import connections
from medusa_jax.server.service import Service

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LONG = b'{"prompt": "a", "max_tokens": 120, "temperature": 1, "ignore_eos": true, "stream": true'


def ask(address: str, **body: Any) -> httpx.Response:
    body = {"prompt": "Tom", "max_tokens": 4, "temperature": 0} | body
    return httpx.post(f"{address}/v1/completions", json=body, timeout=120)


def read_all(connection: Any) -> bytes:
    """What a server sends until it closes, or a pause."""
    connection.settimeout(5)
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(parts)


def test_who_stops_to_read_loses_the_answer(
    service: Service, address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    body = LONG + b', "n": 4, "logprobs": 20}'
    with servers.connect(address, "/v1/completions", body, SO_RCVBUF=4096) as connection:
        while not service.taken:
            time.sleep(0.005)
        assert ask(address).status_code == 200
        assert servers.settled(address, service)
        assert b"[DONE]" not in read_all(connection)


def test_who_stops_to_write_is_told(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    with servers.connect(address, "/v1/completions", b"{", length=100) as connection:
        said = read_all(connection)
    assert b" 408 " in said and b"did not come to its end" in said


def test_three_hundred_connections_at_once(service: Service, address: str):
    body = b'{"prompt": "a", "max_tokens": 2, "temperature": 0}'
    held = [servers.connect(address, "/v1/completions", body) for _ in range(300)]
    statuses = [int(connection.recv(4096).split()[1]) for connection in held]
    for connection in held:
        connection.close()
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 16
    assert servers.settled(address, service)


def test_a_text_that_the_engine_does_not_take_ends_alone(
    service: Service, address: str, monkeypatch: pytest.MonkeyPatch
):
    """And an engine that fails in a command or in a step ends all texts, and goes on."""
    engine = service.generator.engine

    def broken(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("broken")

    monkeypatch.setattr(engine, "submit", broken)
    for _ in range(2):
        answer = ask(address)
        if answer.status_code == 200:
            break
        error = answer.json()["error"]
        assert answer.status_code == 500 and error["message"] == "the engine failed: RuntimeError"
    assert answer.status_code == 200
    with servers.connect(address, "/v1/completions", LONG + b"}") as connection:
        connection.recv(64)
        monkeypatch.setattr(engine, "cancel", broken)
        gone = servers.connect(address, "/v1/completions", LONG + b"}")
        gone.recv(64)
        gone.close()
        said = read_all(connection)
    assert b"the engine failed: RuntimeError" in said and b"server_error" in said
    monkeypatch.setattr(engine, "advance", broken)
    assert ask(address).status_code == 500
    assert ask(address).status_code == 200
    assert httpx.get(f"{address}/health").status_code == 200
    assert servers.settled(address, service)


# --- a process of its own -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, and its address."""
    tree = tmp_path_factory.mktemp("tree") / "tree.json"
    tree.write_text("[[0], [0, 0], [0, 0, 0]]")
    flags = ["--port", "0", "--slots", "4", "--max_length", "256", "--max_waiting", "12"]
    flags += ["--tree", str(tree)]
    command = [sys.executable, "-m", "medusa_jax.serve", *flags]
    made = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    line = made.stdout.readline()
    found = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line + made.communicate(timeout=5)[1]
    yield made, found[1]
    made.kill()
    made.communicate()


def test_the_examples_of_the_guide_run(process: tuple[subprocess.Popen, str]):
    _, address = process
    guide = (ROOT / "docs/guides/serve.md").read_text().replace("http://127.0.0.1:8000", address)
    (line,) = re.findall(r"^curl .*", guide, re.M)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["choices"][0]["text"].split()) > 5
    examples = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert len(examples) == 2  # the client's, and that without a server
    for code in examples:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert len(done.stdout.split()) > 5


def test_sigterm_under_load_finishes_what_was_taken(process: tuple[subprocess.Popen, str]):
    served, address = process
    how: dict[str, Any] = {"max_tokens": 60, "temperature": 1, "ignore_eos": True}

    def streamed(seed: int) -> str | None:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = {"model": "shipped", "prompt": "a", "stream": True, "seed": seed}
        *_, last = client.completions.create(**asked, max_tokens=60, extra_body=how)
        return last.choices[0].finish_reason

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(ask, address, **how) for _ in range(4)]
        parts = [pool.submit(streamed, seed) for seed in range(4)]
        while servers.metric(address, "num_requests_running") < 4:
            time.sleep(0.02)
        taken = servers.metric(address, "num_requests_running")
        taken += servers.metric(address, "num_requests_waiting")
        served.send_signal(signal.SIGTERM)
        ends = [one.result().json()["choices"][0]["finish_reason"] for one in whole]
        assert ends == ["length"] * 4 and taken >= 4
        assert [one.result() for one in parts] == ["length"] * 4
    err = served.communicate(timeout=30)[1]
    assert served.returncode == 0 and "Traceback" not in err and "finishing " in err
    with pytest.raises(httpx.ConnectError):
        ask(address)
