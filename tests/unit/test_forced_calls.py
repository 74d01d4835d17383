"""Whatever a grammar of forced calls lets a model write, the parser of that format reads."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pdserve.cluster.model_files import resolve_model
from pdserve.parsers.calls import CALLS, Call, CallParser
from pdserve.parsers.forms import NO_PARAMETERS, Tool, guarded, required
from pdserve.protocol.grammar import LIMITS
from pdserve.router.grammars import grammar_of
from pdserve.router.schemas import ChatCompletionRequest
from pdserve.router.tool_use import tool_use

VOCAB, EOS = 2048, 2
TOKENIZER = LLTokenizer(
    (resolve_model("") / "tokenizer.json").read_text(), n_vocab=VOCAB, eos_token=EOS
)
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9},
                 "maxItems": 2},
        "fine": {"type": "boolean"},
        "at": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    },
    "required": ["city", "unit", "days", "fine", "at"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9,
                                                               "minimum": 0}},
                        "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
TOOLS = (Tool("weather", PARAMETERS, True), Tool("now", NO_PARAMETERS, False))


def matcher(form: dict[str, Any]) -> LLMatcher:
    grammar = grammar_of("structural_tag", {"format": form}, {}, {})
    limits = LLParserLimits(verbose_errors=False, **LIMITS)
    found = LLMatcher(TOKENIZER, grammar, log_level=0, limits=limits)
    assert not found.is_error(), found.get_error()
    return found


def wander(found: LLMatcher, rng: random.Random, longest: int = 400) -> str | None:
    """Any text of the grammar, as drawn by a model that likes no blanks; None: it went on."""
    tokens: list[int] = []
    while not found.is_stopped():
        mask = np.zeros(VOCAB // 32, dtype=np.int32)
        found.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert not found.is_error(), found.get_error()
        bits = mask.view(np.uint32)
        options = [t for t in range(VOCAB) if int(bits[t // 32]) >> (t % 32) & 1]
        if EOS in options and (len(options) == 1 or rng.random() < 0.5):
            break
        going_on = [t for t in options if t != EOS]
        dense = [t for t in going_on if TOKENIZER.decode_str([t]).strip()]
        tokens.append(rng.choice(dense if dense and rng.random() < 0.7 else going_on))
        found.consume_token(tokens[-1])
        if len(tokens) > longest:
            return None
    return TOKENIZER.decode_bytes(tokens).decode()


def read(name: str, text: str) -> tuple[str, list[Call]]:
    parser = CallParser(CALLS[name], {tool.name: tool.parameters for tool in TOOLS})
    events = parser.feed(text) + parser.finish()
    said = "".join(event for event in events if isinstance(event, str))
    return said, [event for event in events if isinstance(event, Call)]


def check(call: Call) -> None:
    arguments = json.loads(call.arguments)
    if call.name == "now":
        assert arguments == {}
        return
    assert call.name == "weather" and set(arguments) == set(PARAMETERS["properties"])
    assert isinstance(arguments["city"], str) and arguments["unit"] in ("C", "F")
    assert isinstance(arguments["fine"], bool) and len(arguments["days"]) <= 2
    assert arguments["at"] is None or set(arguments["at"]) == {"x"}


@pytest.mark.parametrize("name", CALLS)
def test_forced_calls_are_read(name: str) -> None:
    many = 0
    for seed in range(8):
        text = wander(matcher(required(name, TOOLS, False)), random.Random(seed))
        if text is None:
            continue  # free text of a parameter that never found its end
        said, calls = read(name, text)
        assert not said and calls, text
        many += len(calls) > 1
        for call in calls:
            check(call)
    for seed in range(4):
        text = wander(matcher(required(name, TOOLS[:1], True)), random.Random(seed))
        if text is not None:
            assert [call.name for call in read(name, text)[1]] == ["weather"], text
    assert many


@pytest.mark.parametrize("name", CALLS)
def test_free_text_may_turn_into_a_call_that_fits(name: str) -> None:
    form, begun = guarded(name, TOOLS), required(name, TOOLS[:1], True)
    one = wander(matcher(begun), random.Random(1))
    if one is not None:
        assert _accepts(matcher(form), one)
        if name not in ("llama3_json", "pythonic"):
            assert _accepts(matcher(form), f"Well, {one}")
        assert not _accepts(matcher(form), one.replace("weather", "whether"))
    assert _accepts(matcher(form), "Just a text, with {braces} and [brackets].")


def _accepts(found: LLMatcher, text: str) -> bool:
    return bool(found.consume_tokens(TOKENIZER.tokenize_str(text))) and found.is_accepting()


def test_texts_of_parameters_end_at_their_mark() -> None:
    values = {"city": "New\n<b>York", "unit": "C", "days": "[1,2]", "fine": "true", "at": "null"}
    lines = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    text = f"<tool_call>\n<function=weather>\n{lines}</function>\n</tool_call>"
    found = matcher(required("qwen3_coder", TOOLS[:1], True))
    assert found.consume_tokens(TOKENIZER.tokenize_str(text)) and found.is_stopped()
    ((call,), said) = read("qwen3_coder", text)[::-1]
    assert not said and json.loads(call.arguments)["city"] == "New\n<b>York"
    check(call)


FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        "additionalProperties": False}}}}, '{"a": 1}', '{"b": 1}'),
    "object": ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
    "dense": ({"structured_outputs": {"json": {"type": "object", "properties": {"a": {}}},
        "disable_any_whitespace": True, "disable_additional_properties": True}},
        '{"a":1}', '{"a": 1}'),
    "regex": ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "12"),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c")'}}, "ac", "a"),
    "tag": ({"response_format": {"type": "structural_tag", "format": {
        "type": "const_string", "value": "x"}}}, "x", "y"),
    "old tag": ({"response_format": {"type": "structural_tag", "triggers": ["<q"], "structures": [
        {"begin": "<q>", "schema": {"type": "integer"}, "end": "</f>"}]}}, "so <q>7</f>", "<q>x"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_of_a_form_or_calls(name: str, form: str) -> None:
    """What the client wants of answers does not keep the model from calling, nor the tools from
    answering in that form."""
    asked, good, bad = FORMS[form]
    functions = [
        {"name": tool.name, "parameters": tool.parameters, "strict": tool.strict} for tool in TOOLS
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    body = ChatCompletionRequest(messages=[], tools=tools, **asked)
    use = tool_use(body, name, True)
    assert use.parse and use.wish is not None
    grammar = grammar_of(use.wish.kind, use.wish.value, use.wish.options, {})
    limits = LLParserLimits(verbose_errors=False, **LIMITS)
    found = LLMatcher(TOKENIZER, grammar, log_level=0, limits=limits)
    assert not found.is_error(), found.get_error()
    assert _accepts(found.deep_copy(), good)
    assert not _accepts(found.deep_copy(), bad)
    call = next(
        text
        for seed in range(9)
        if (text := wander(matcher(required(name, TOOLS, True)), random.Random(seed))) is not None
    )
    assert _accepts(found.deep_copy(), call), call
    assert not read(name, good)[1]
