"""Requests made from the server's own description: none is answered with 500."""

from typing import Any

import hypothesis
import pytest

from medusa_jax.server.app import create_app
from medusa_jax.server.service import Service

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLES = 12  # of each route


# Hypothesis sees the random numbers that the server's thread draws meanwhile.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_no_request_is_answered_with_500(service: Service):
    """Valid ones and wrong ones; texts are kept short, for other files test them."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    statuses = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(hypothesis.strategies.data())
    def ask(data: Any) -> None:
        case = data.draw(strategy)
        if isinstance(case.body, dict):
            case.body |= {"max_tokens": 2} if case.body.get("max_tokens", 1) else {}
            case.body |= {"n": 2} if case.body.get("n") in range(3, 17) else {}
        reply = case.call()
        statuses.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        assert reply.status_code < 400 or reply.json()["error"]["message"]

    for operation in schema.get_all_operations():
        modes = list(schemathesis.GenerationMode)
        for mode in modes if operation.ok().method == "post" else modes[:1]:
            strategy = operation.ok().as_strategy(generation_mode=mode)
            ask()
    assert {200, 400} <= statuses
