"""Wishes for grammars: every kind, every fault, and those that would keep the library busy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from pdserve.cluster.model_files import resolve_model
from pdserve.router.constraints import wish_of
from pdserve.router.errors import BadRequest
from pdserve.router.grammar_check import CPU_S, GrammarCheck, Wish

pytestmark = pytest.mark.anyio
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"begin": "<f>", "content": {"type": "json_schema", "json_schema": NUMBER}, "end": "</f>"}

GOOD: dict[str, dict[str, Any]] = {
    "schema": {"json": NUMBER},
    "schema as text": {"json": json.dumps(NUMBER)},
    "any object": {"json_object": True},
    "options": {"json": NUMBER, "disable_any_whitespace": True, "whitespace_pattern": " ?"},
    "closed": {"json": NUMBER, "disable_additional_properties": True},
    "regex": {"regex": "[0-9]{3}"},
    "anchors": {"regex": "^(yes|no)$"},
    "choice": {"choice": ["yes", 'no "x"\n', "ünï"]},
    "many choices": {"choice": [f"choice {n}" for n in range(2000)]},
    "gbnf": {"grammar": 'root ::= "a" ("b" | "c")*\n'},
    "lark": {"grammar": 'start: "a" ("b" | "c")*\n'},
    "tags": {"structural_tag": {"format": {"type": "triggered_tags", "triggers": ["<f"],
                                           "tags": [TAG]}}},
    "list of tags": {"structural_tag": {"format": {"type": "tags_with_separator", "tags": [TAG],
                                                   "separator": "\n", "at_least_one": True}}},
    "old tags": {"structural_tag": json.dumps({"structures": [{"begin": "<f>", "schema": NUMBER,
                                                               "end": "</f>"}],
                                               "triggers": ["<f"]})},
    "sequence": {"structural_tag": {"format": {"type": "sequence", "elements": [
        {"type": "const_string", "value": "<|im_start|>x"}, {"type": "regex", "pattern": "a/b"},
        {"type": "or", "elements": [{"type": "any_text"},
                                    {"type": "grammar", "grammar": 'start: "q"'}]}]}}},
}  # fmt: skip
BAD: dict[str, dict[str, Any]] = {
    "none": {},
    "unknown members": {"jason": 1},
    "two": {"regex": "a", "choice": ["a"]},
    "no choice": {"choice": []},
    "an empty choice": {"choice": [""]},
    "choice of numbers": {"choice": [1]},
    "empty grammar": {"grammar": ""},
    "empty text": {"json": ""},
    "false": {"json_object": False},
    "NUL": {"regex": "a\0b"},
    "no regex": {"regex": "(a"},
    "look-around": {"regex": "(?=a)b"},
    "no schema": {"json": {"type": "strnig"}},
    "unknown keyword": {"json": {"type": "string", "format": "no-such-format"}},
    "a file": {"json": {"$ref": "file:///etc/passwd"}},
    "itself": {"json": {"$ref": "#"}},
    "no grammar": {"grammar": "root ::= ("},
    "no start": {"grammar": "x: /a/"},
    "no tag": {"structural_tag": {"format": {"type": "wat"}}},
    "no trigger": {"structural_tag": {"format": {"type": "triggered_tags", "triggers": ["<g"],
                                                 "tags": [TAG]}}},
    "a number": {"structural_tag": 3},
    "option": {"json": NUMBER, "disable_any_whitespace": 1},
    "nothing fits": {"json": {"not": {}}},
}  # fmt: skip


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "multiples": {"json": {"type": "integer", "multipleOf": 99999989}},
    "multiples of all": {"json": {"allOf": [{"type": "integer", "multipleOf": p}
                                            for p in (9973, 9967, 9949)]}},
    "combinations": {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}}
                                                   for j in range(3)]} for i in range(14)]}},
    "depth": {"json": deep(300)},
    "parentheses": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "intersections": {"grammar": "start: A\nA: " + " & ".join(
        f"/(.*{c}.*)/" for c in "abcdefghijklmnop")},
    "size": {"json": {"enum": ["x" * 100] * 10_000}},
    "circles": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                                        "b": {"$ref": "#/$defs/a"}}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def check() -> AsyncIterator[GrammarCheck]:
    found = GrammarCheck(resolve_model("") / "tokenizer.json", 2048)
    yield found
    child = found._child._process
    found.close()
    assert child is None or not psutil.pid_exists(child.pid)


async def grammar(check: GrammarCheck, structured: dict[str, Any]) -> str:
    wish = wish_of(None, structured)
    assert wish is not None
    return await check.grammar(wish)


@pytest.mark.parametrize("name", GOOD)
async def test_what_can_be_used(check: GrammarCheck, name: str) -> None:
    assert await grammar(check, GOOD[name])


@pytest.mark.parametrize("name", BAD)
async def test_faults_name_the_field(check: GrammarCheck, name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await grammar(check, BAD[name])
    assert caught.value.param == "structured_outputs"
    assert caught.value.message.endswith((".", ")")) and "<non-verbose" not in caught.value.message


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_wishes_are_refused_in_time(check: GrammarCheck, name: str) -> None:
    before = psutil.Process().cpu_times()
    with pytest.raises(BadRequest) as caught:
        await grammar(check, HOSTILE[name])
    after = psutil.Process().cpu_times()
    assert caught.value.param == "structured_outputs"
    assert after.user - before.user < 1.0, "the router itself worked on it"
    assert after.children_user - before.children_user < CPU_S + 2.0
    assert await grammar(check, {"regex": f"after {name}"})


async def test_the_same_wish_is_compiled_once(check: GrammarCheck) -> None:
    wish = Wish("regex", "the same [a-z]+", "structured_outputs")
    found = await asyncio.gather(*(check.grammar(wish) for _ in range(20)))
    assert len(set(found)) == 1
    started = time.process_time()
    assert await check.grammar(wish) == found[0]
    assert time.process_time() - started < 0.05


async def test_a_killed_child_is_replaced(check: GrammarCheck) -> None:
    await grammar(check, {"regex": "before"})
    child = check._child._process
    assert child is not None
    child.kill()
    child.wait()
    assert await grammar(check, {"regex": "behind"})


def test_formats_of_responses() -> None:
    assert wish_of(None, None) is None and wish_of({"type": "text"}, None) is None
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}}
    assert wish_of(schema, None) == Wish("json", NUMBER, "response_format")
    assert wish_of({"type": "json_object"}, None) is not None
    for bad in ({}, {"type": "wat"}, {"type": "json_schema"}, {"type": "json_schema",
                "json_schema": {"schema": 3}}):  # fmt: skip
        with pytest.raises(BadRequest) as caught:
            wish_of(bad, None)
        assert caught.value.param == "response_format"
    with pytest.raises(BadRequest, match="only use one kind") as caught:
        wish_of({"type": "json_object"}, {"regex": "a"})
    assert caught.value.param == "structured_outputs"
