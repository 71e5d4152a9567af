"""A server of the shipped model, which the files of this folder share."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from helpers import servers

from medusa_jax.drafting.tree import Tree
from medusa_jax.server.options import ServeOptions
from medusa_jax.server.run import make_service
from medusa_jax.server.service import Service

SLOTS, WAITING = 4, 12
TREE = [[0], [0, 0], [0, 0, 0]]


@pytest.fixture(scope="session")
def service() -> Service:
    how: dict[str, Any] = {"slots": SLOTS, "max_waiting": WAITING, "max_length": 256}
    return make_service(ServeOptions(tree=Tree.from_lists(TREE), **how))  # no time to time trees


@pytest.fixture(scope="session")
def address(service: Service) -> Iterator[str]:
    with servers.running(service) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
