"""Constrained answers as a client asks for them: what reaches the workers, and what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from router_harness import RouterHarness

MESSAGES: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


def sent(harness: RouterHarness) -> set[str]:
    """Grammars that workers have got since the last call."""
    found = set()
    for worker in harness.workers:
        for submit in worker.submits:
            constraint = submit.sampling.constraint
            found.add(constraint.grammar if constraint else "")
        worker.submits.clear()
    return found


def test_every_leg_gets_the_grammar(harness: RouterHarness, client: OpenAI) -> None:
    sent(harness)
    client.chat.completions.create(model="demo", messages=MESSAGES, response_format=NAMED)  # type: ignore[call-overload]
    (grammar,) = sent(harness)
    schema = json.loads(grammar)["grammars"][0]["json_schema"]
    assert {name: schema[name] for name in SCHEMA} == SCHEMA
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    client.completions.create(model="demo", prompt="x", n=2, temperature=1, extra_body=extra)
    (grammar,) = sent(harness)
    assert '"yes"' in grammar
    for free in ({"response_format": {"type": "text"}}, {"response_format": None}):
        client.completions.create(model="demo", prompt="x", extra_body=free)
        assert sent(harness) == {""}


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "only use"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "type must be"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "only use one kind",
        ),
        ({"response_format": "json"}, "body.response_format", "response_format"),
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
    ],
)
def test_faults_are_400s(client: OpenAI, extra: Any, param: str, words: str) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(
                model="demo", messages=MESSAGES, stream=stream, extra_body=extra
            )
        assert caught.value.param == param and words in caught.value.message


def test_a_huge_schema_is_refused_at_once(client: OpenAI) -> None:
    schema = {"enum": ["x" * 100] * 10_000}
    extra = {"structured_outputs": {"json": schema}}
    with pytest.raises(BadRequestError, match="at most"):
        client.completions.create(model="demo", prompt="x", extra_body=extra)
