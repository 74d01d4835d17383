"""Calls and thoughts in text: what is read, and that it does not depend on how the text was cut."""

# ruff: noqa: UP031, E501

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.parsers.calls import CALLS, Call, CallParser, format_of
from pdserve.parsers.reasoning import REASONING, ReasoningParser

SCHEMAS = {
    "f": {
        "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": "object"}}
    },
    "g": {},
}
ARGUMENTS = {"a": 1, "s": 'é "q" {x} </t>\n'}
F, G = json.dumps(ARGUMENTS), "{}"
DS = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>".format
DC = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>".format
CODER = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>".format

ONE, TWO = [Call("f", F)], [Call("f", F), Call("g", G)]
CASES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>' % F, "", ONE),
    ("hermes", 'Well. <tool_call>{"name":"f","arguments":%s}</tool_call>\n'
     '<tool_call>{"name": "g", "arguments": {}}</tool_call>' % F, "Well. ", TWO),
    ("hermes", 'a <tool_call>{"name": </tool_call> b', 'a <tool_call>{"name": </tool_call> b', []),
    ("hermes", "what is <tool_call in prose?", "what is <tool_call in prose?", []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
     '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "\\ud800"}}</tool_call>',
     '<tool_call>{"name": "f", "arguments": {"s": "\\ud800"}}</tool_call>', []),
    ("qwen3_coder", CODER("f", "<parameter=a>\n1\n</parameter>\n<parameter=s>\nx\n y\n</parameter>\n"),
     "", [Call("f", '{"a": 1, "s": "x\\n y"}')]),
    ("qwen3_coder", "Hm " + CODER("g", "") + CODER("f", "<parameter=o>\n{\"k\": [1]}\n</parameter>"),
     "Hm ", [Call("g", "{}"), Call("f", '{"o": {"k": [1]}}')]),
    ("qwen3_coder", "<tool_call>f()</tool_call>", "<tool_call>f()</tool_call>", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": %s}, {"name": "g", "arguments": {}}]' % F,
     "", TWO),
    ("mistral", "Ok [TOOL_CALLS]f%s[TOOL_CALLS]g{}" % F, "Ok ", TWO),
    ("mistral", "[TOOL_CALLS]f{", "[TOOL_CALLS]f{", []),
    ("llama3_json", '{"name": "f", "parameters": %s}' % F, "", ONE),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": %s}; {"name": "g", "arguments": {}}'
     % F, "", TWO),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", 'No {"name": "f", "parameters": {}}', 'No {"name": "f", "parameters": {}}', []),
    ("pythonic", "[f(a=1, s='é \"q\" {x} </t>\\n'), g()]", "", TWO),
    ("pythonic", " [f(a=-1, o={'k': [1.5, None, true]})]", "",
     [Call("f", '{"a": -1, "o": {"k": [1.5, null, true]}}')]),
    ("pythonic", "[f(a=1), __import__('os')]", "[f(a=1), __import__('os')]", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "text [f()]", "text [f()]", []),
    ("deepseek_v3", DS(DC("f", F) + "\n" + DC("g", "{}")), "", TWO),
    ("deepseek_v3", "Sure." + DS(DC("f", F)), "Sure.", ONE),
    ("deepseek_v3", DS("nothing"), DS("nothing"), []),
]  # fmt: skip


def read(name: str, pieces: list[str]) -> tuple[str, list[Call]]:
    parser = CallParser(CALLS[name], SCHEMAS)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    return (
        "".join(event for event in events if isinstance(event, str)),
        [event for event in events if isinstance(event, Call)],
    )


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_what_is_read(name: str, text: str, content: str, calls: list[Call]) -> None:
    found, read_calls = read(name, [text])
    assert found == content
    assert [call.name for call in read_calls] == [call.name for call in calls]
    for call, wanted in zip(read_calls, calls, strict=True):
        assert json.loads(call.arguments) == json.loads(wanted.arguments)
    assert read(name, list(text)) == (found, read_calls)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


PARTS = [text for _, text, _, _ in CASES] + ["<tool", "[TOOL", "</tool_call>", " ", "\n", "[", "{"]


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=4),
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_pieces_do_not_matter(name: str, parts: list[str], places: list[int]) -> None:
    text = "".join(parts)
    assert read(name, cut(text, places)) == read(name, [text])


def read_pieces(name: str, pieces: list[str]) -> tuple[str, list[Call]]:
    """As `read`, from calls that come while they are written."""
    parser = CallParser(CALLS[name], SCHEMAS, pieces=True)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    calls: list[Call] = []
    for event in events:
        if isinstance(event, Call) and event.name:
            calls.append(event)
        elif isinstance(event, Call):
            calls[-1] = Call(calls[-1].name, calls[-1].arguments + event.arguments)
    return "".join(event for event in events if isinstance(event, str)), calls


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=4),
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_pieces_do_not_matter_while_calls_are_written(
    name: str, parts: list[str], places: list[int]
) -> None:
    text = "".join(parts)
    assert read_pieces(name, cut(text, places)) == read_pieces(name, [text])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab\n\"é", max_size=2), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(["a", "s", "o"]), VALUES, max_size=3)
WRITTEN = {
    "hermes": lambda calls: "\n".join(
        '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>' % call for call in calls
    ),
    "llama3_json": lambda calls: "; ".join(
        '{"name": "%s", "parameters": %s}' % call for call in calls
    ),
    "mistral": lambda calls: (
        "[TOOL_CALLS] [%s]" % ", ".join('{"name": "%s", "arguments": %s}' % call for call in calls)
    ),
    "deepseek_v3": lambda calls: DS("\n".join(DC(*call) for call in calls)),
}
SHAPES: tuple[dict[str, Any], ...] = ({}, {"ensure_ascii": False}, {"indent": 1})


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=60, deadline=None)
@given(
    arguments=st.lists(OBJECTS, min_size=1, max_size=3),
    shape=st.sampled_from(SHAPES),
    places=st.lists(st.integers(0, 500), max_size=12),
)
def test_calls_in_pieces_are_the_whole_calls(
    name: str, arguments: list[dict[str, Any]], shape: dict[str, Any], places: list[int]
) -> None:
    calls = [Call("fg"[place % 2], json.dumps(one, **shape)) for place, one in enumerate(arguments)]
    text = WRITTEN[name]([(call.name, call.arguments) for call in calls])
    assert read(name, [text]) == read_pieces(name, cut(text, places)) == ("", calls)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_comes_while_it_is_written(name: str) -> None:
    text = WRITTEN[name]([("f", '{"s": "one, two"}')])
    place = text.index(" two")
    parser = CallParser(CALLS[name], SCHEMAS, pieces=True)
    assert parser.feed(text[:place]) == [Call("f", ""), Call("", '{"s": "one,')]
    assert parser.feed(text[place : place + 2]) == [Call("", " t")]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": [1, 2', '{"a": [1, '),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', '{"a": '),
        ('<tool_call>{"name": "f", "arguments": {"s": "\\ud800"}}</tool_call>', '{"s": "'),
        ('<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>', '{"s": "a\\nb"}'),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}, "x": 2}</tool_call>', '{"a": 1}'),
    ],
)
def test_what_has_been_told_of_a_call_stays(text: str, wanted: str) -> None:
    assert read_pieces("hermes", [text]) == ("", [Call("f", wanted)])


def test_what_cannot_be_told_while_it_is_written_comes_at_the_end() -> None:
    unknown = '<tool_call>{"name": "h", "arguments": {"a": 1}}</tool_call>'
    assert read_pieces("hermes", [unknown]) == ("", [Call("h", '{"a": 1}')])
    turned = '<tool_call>{"arguments": {"a":1}, "name": "f"}</tool_call>'
    assert read_pieces("hermes", [turned]) == ("", [Call("f", '{"a": 1}')])


THOUGHTS = {
    "deepseek_r1": [
        ("<think>\nHm, so\n</think>\n\nYes.", "Hm, so", "Yes."), ("Hm</think>Yes", "Hm", "Yes"),
        ("Hm, and so on", "Hm, and so on", ""), ("</think>Yes</think>", "", "Yes</think>"),
    ],
    "qwen3": [
        ("<think>a < b</think>\nYes", "a < b", "Yes"),
        ("So:<tool_call>{}</tool_call>", "So:", "<tool_call>{}</tool_call>"),
    ],
    "gpt_oss": [
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes",
         "Hm", "Yes"),
        ("<|channel|>final<|message|>Yes", "", "Yes"),
        ("<|channel|>analysis<|message|>Hm<|end|>", "Hm", ""),
    ],
}  # fmt: skip


def think(name: str, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(REASONING[name])
    found = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(thought for thought, _ in found), "".join(text for _, text in found)


@pytest.mark.parametrize(
    ("name", "text", "thoughts", "answer"),
    [(name, *case) for name, cases in THOUGHTS.items() for case in cases],
)
def test_thoughts(name: str, text: str, thoughts: str, answer: str) -> None:
    assert think(name, [text]) == think(name, list(text)) == (thoughts, answer)


@pytest.mark.parametrize("name", REASONING)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([case[0] for cases in THOUGHTS.values() for case in cases])
        | st.sampled_from([*REASONING["gpt_oss"].marks, "<|", "\n", "<think>"])
        | st.text(max_size=4),
        max_size=4,
    ),
    places=st.lists(st.integers(0, 300), max_size=12),
)
def test_pieces_of_thoughts_do_not_matter(name: str, parts: list[str], places: list[int]) -> None:
    text = "".join(parts)
    assert think(name, cut(text, places)) == think(name, [text])


def test_the_format_follows_from_the_model() -> None:
    def knows(*tokens: str) -> object:
        return lambda token: token in tokens

    assert format_of("...<tool_call>...", knows()) == "hermes"  # type: ignore[arg-type]
    assert format_of("<tool_call><function=f>", knows()) == "qwen3_coder"  # type: ignore[arg-type]
    assert format_of("{{ tools }}", knows("<|python_tag|>")) == "llama3_json"  # type: ignore[arg-type]
    assert format_of("{{ tools }}", knows("[TOOL_CALLS]")) == "mistral"  # type: ignore[arg-type]
    assert format_of("<｜tool▁calls▁begin｜>", knows()) == "deepseek_v3"  # type: ignore[arg-type]
    assert format_of("{{ messages }}", knows()) is None  # type: ignore[arg-type]
