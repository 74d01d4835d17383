"""Clusters of fake workers around a real router, for the API tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from openai import OpenAI
from router_harness import RedisProcess, RouterHarness

from pdserve.cluster.records import Role


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with RedisProcess() as redis:
        yield redis.url


@pytest.fixture
def start(redis_url: str) -> Iterator[Callable[..., RouterHarness]]:
    """Starts routers that end with the test."""
    with ExitStack() as stack:

        def start_router(**settings: Any) -> RouterHarness:
            return stack.enter_context(RouterHarness(redis_url, **settings))

        yield start_router


@pytest.fixture(scope="module", params=["pair", "colocated"])
def harness(request: pytest.FixtureRequest, redis_url: str) -> Iterator[RouterHarness]:
    """A router with one prefill and one decode worker, and then one with a colocated worker."""
    with RouterHarness(redis_url) as running:
        roles = [Role.PREFILL, Role.DECODE] if request.param == "pair" else [Role.COLOCATED]
        for role in roles:
            running.add(role)
        running.until_connected()
        yield running
        running.until_idle()


@pytest.fixture(scope="module")
def client(harness: RouterHarness) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{harness.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client
