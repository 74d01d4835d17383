"""Requests made from the OpenAPI document, valid ones and broken ones: each is answered soon, in a
way that the document allows, and never with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from router_harness import RouterHarness
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation

from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.app import create_app

LARGE, SMALL = 75, 180
"""Requests for each route whose body has many fields, and for others; half of them are meant to
break its schema. Making the large ones costs some 20 ms each."""
MANY_FIELDS = 7
IN_ALL = 2000
TIMEOUT_S = 10.0

DOCUMENT = create_app(
    RouterSettings(secret="x", enable_scale_out=True, enable_tokenizer_info_endpoint=True)
).openapi()


def operations() -> list[APIOperation]:
    found = schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
    return [result.ok() for result in found]


@pytest.fixture(scope="module")
def router(redis_url: str) -> Iterator[RouterHarness]:
    options = {"enable_scale_out": True, "enable_tokenizer_info_endpoint": True}
    with RouterHarness(redis_url, **options) as running:
        running.add(Role.PREFILL)
        running.add(Role.DECODE)
        running.until_connected()
        yield running
        running.until_idle()


def ask(router: RouterHarness, operation: APIOperation, mode: GenerationMode, count: int) -> int:
    """Send generated requests; how many there were."""
    sent = 0
    session = requests.Session()

    @seed(7)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        nonlocal sent
        sent += 1
        answer = case.call(base_url=router.url, session=session, timeout=TIMEOUT_S)
        case.validate_response(answer, checks=[not_a_server_error])

    with session:
        one()
    return sent


def fields(operation: APIOperation) -> int:
    """Of the smallest body that the route takes."""
    body = DOCUMENT["paths"][operation.path]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    names = [one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])]
    return min(len(DOCUMENT["components"]["schemas"][name]["properties"]) for name in names)


@pytest.mark.timeout(300)
def test_no_request_breaks_the_router(router: RouterHarness) -> None:
    sent = 0
    for operation in operations():
        count = SMALL
        if operation.body:
            count = LARGE if fields(operation) > MANY_FIELDS else SMALL
            sent += ask(router, operation, GenerationMode.NEGATIVE, count // 2)
        sent += ask(router, operation, GenerationMode.POSITIVE, count // 2)
    assert sent >= IN_ALL
    assert router.client.get("/health").status_code == 200
