"""Bodies that mean harm, to every route that takes one: 4xx, soon, and the router lives on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from router_harness import RouterHarness

from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings
from pdserve.router.app import create_app

BOUND_S = 5.0
"""Of wall-clock time, on a machine that does other things, too."""
JSON = {"content-type": "application/json"}

DOCUMENT = create_app(RouterSettings(secret="x", enable_scale_out=True)).openapi()
BODIES: dict[str, dict[str, Any]] = {
    path: next(iter(content["examples"].values()))["value"]
    for path, methods in DOCUMENT["paths"].items()
    if "requestBody" in methods.get("post", {})
    for content in [methods["post"]["requestBody"]["content"]["application/json"]]
}
"""A body that is answered, for each route."""
MAIN = ("prompt", "messages", "input", "tokens", "token_ids", "request_ids",
        "generate_response", "generate_responses")  # fmt: skip
"""What a request is about; at least one of them is in every body."""


def main_of(path: str) -> str:
    return next(name for name in MAIN if name in BODIES[path])


def with_raw(path: str, name: str, raw: bytes) -> bytes:
    """The route's body with a member replaced by these bytes."""
    rest = {key: value for key, value in BODIES[path].items() if key != name}
    mark = "here it goes"
    return json.dumps(rest | {name: mark}).encode().replace(json.dumps(mark).encode(), raw)


HOSTILE: dict[str, bytes] = {
    "objects 10,000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "lists 10,000 deep": b"[" * 10_000 + b"]" * 10_000,
    "lists 900 deep": b"[" * 900 + b"]" * 900,
    "a lone surrogate": rb'["\ud800"]',
    "a lone surrogate as a key": rb'[{"\udfff": 1}]',
    "NaN": b"[NaN]",
    "Infinity": b"-Infinity",
    "10^400 as an integer": b"[1" + b"0" * 400 + b"]",
    "10^400 as a number": b"[1e400]",
    "a million digits": b"[" + b"9" * 1_000_000 + b"]",
    "invalid UTF-8": b'["\xff\xfe"]',
    "UTF-8 of a surrogate": b'["\xed\xa0\x80"]',
    "another type": b"true",
    "a raw NUL": b'["\x00"]',
}


@pytest.fixture(scope="module")
def router(redis_url: str) -> Iterator[RouterHarness]:
    with RouterHarness(redis_url, enable_scale_out=True) as running:
        running.add(Role.COLOCATED)
        running.until_connected()
        yield running
        running.until_idle()


def post(router: RouterHarness, path: str, body: bytes, kind: str = JSON["content-type"]) -> Any:
    started = time.monotonic()
    answer = router.client.post(path, content=body, headers={"content-type": kind})
    assert time.monotonic() - started < BOUND_S
    return answer


def refused(answer: Any) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    assert isinstance(answer.json()["error"]["message"], str)
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(router: RouterHarness, path: str, name: str) -> None:
    refused(post(router, path, with_raw(path, main_of(path), HOSTILE[name])))
    refused(post(router, path, HOSTILE[name]))


@pytest.mark.parametrize("path", BODIES)
def test_twenty_megabytes(router: RouterHarness, path: str) -> None:
    """Of what the route takes, as far as it is bounded by anything."""
    main = main_of(path)
    filler = {
        "prompt": b'"' + b"x" * 20_000_000 + b'"',
        "input": b'"' + b"x" * 20_000_000 + b'"',
        "messages": b'[{"role": "user", "content": "' + b"x" * 20_000_000 + b'"}]',
        "tokens": b"[" + b"5," * 10_000_000 + b"5]",
        "token_ids": b"[" + b"5," * 10_000_000 + b"5]",
        "generate_response": b'{"choices": [{"token_ids": [' + b"5," * 8_000_000 + b"5]}]}",
        "generate_responses": b"[" + b"{}," * 6_000_000 + b"{}]",
        "request_ids": b"[" + b"1," * 10_000_000 + b"1]",
    }[main]
    refused(post(router, path, with_raw(path, main, filler)))
    refused(post(router, path, with_raw(path, main, b"[" + b"{}," * 6_000_000 + b"1.5]")))
    refused(post(router, path, b" " * 40_000_000))


@pytest.mark.parametrize("path", [path for path in BODIES if "temperature" in BODIES[path]])
def test_many_bad_entries(router: RouterHarness, path: str) -> None:
    entries = b"{" + b",".join(b'"%d":"x"' % key for key in range(200_000)) + b"}"
    for name in ("logit_bias", "stop_token_ids", "stop"):
        refused(post(router, path, with_raw(path, name, entries)))
        refused(post(router, path, with_raw(path, name, b"[" + b"{}," * 200_000 + b"{}]")))


@pytest.mark.parametrize("path", BODIES)
def test_what_is_not_json(router: RouterHarness, path: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        refused(post(router, path, body, kind))
    for other in (b"", b"{", b"null", b"[]", b'"x"', body[:-1], body + body):
        refused(post(router, path, other))


@pytest.mark.parametrize("path", BODIES)
def test_of_equal_keys_the_last_one_counts(router: RouterHarness, path: str) -> None:
    """As in every JSON library; a bad last one is refused, however good the first was."""
    good = json.dumps(BODIES[path]).encode()
    bad = b'"' + main_of(path).encode() + b'": 5}'
    refused(post(router, path, good[:-1] + b", " + bad))
    assert post(router, path, bad.replace(b'"', b'{"', 1)[:-1] + b", " + good[1:]).is_success
