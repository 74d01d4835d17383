"""Calls of tools as models write them: one table of formats, one parser for all.

A format says where calls stand in the text and how the text between the marks is decoded. What
cannot be decoded was no call: it comes out as text, never as an error.

Calls come out whole, when they are complete, or in pieces while they are written, where the format
has them as JSON. Joined, the pieces are the whole calls. Only what is cut off or turns out to be no
call differs: its beginning cannot be taken back.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.parsers.json_text import ObjectText
from pdserve.parsers.scan import Scanner

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call; `arguments` is the text of a JSON object. Of a call that comes in pieces, the first
    has the name and no arguments, and the others have no name."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallFormat:
    """Where calls stand. Without `begin` an answer is calls from its first character, or none."""

    name: str
    decode: Callable[[str, Mapping[str, Json]], list[Call] | None]
    """From what stands between begin and end, and the tools' parameter schemas by name."""
    begin: tuple[str, ...] = ()
    end: str = ""
    """"": up to the next `begin`, or the end of the answer."""
    opens: tuple[str, ...] = ()
    """Beginnings of answers that are calls, if there is no `begin`."""
    tokens: tuple[str, ...] = ()
    """Further marks that may be special tokens of the vocabulary."""
    short_ids: bool = False
    """Ids of calls have nine letters and digits."""
    head: re.Pattern[str] | None = None
    """Up to the brace of a call's arguments, from the begin or from the arguments before; its last
    group is the name. None: arguments do not stand there as JSON."""

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (*self.begin, self.end, *self.tokens) if mark)


class CallParser:
    """Reads one answer. Events are texts and calls, in order."""

    def __init__(
        self, calls: CallFormat, schemas: Mapping[str, Json], pieces: bool = False
    ) -> None:
        """`schemas`: the parameters of each tool, by name; `pieces`: tell of calls while they are
        written."""
        self._format = calls
        self._schemas = schemas
        self._pieces = pieces
        self._scanner = Scanner(calls.begin)
        self._inside: str | None = None
        """The mark that began the calls that are being read."""
        self._body = ""
        self._written = Written(calls.head, schemas)
        """What has been told of the body, with `pieces`."""
        self._blank = True
        """Nothing but white space has come since the beginning or the last call."""
        self._held = ""
        """That white space."""
        self._undecided = not calls.begin

    @property
    def inside(self) -> bool:
        """Between the marks of a call."""
        return self._inside is not None

    def feed(self, text: str) -> list[str | Call]:
        events: list[str | Call] = []
        if self._undecided:
            text = self._decide(text)
            if self._undecided:
                return events
        if self._inside is not None and not self._format.begin:
            self._grow(text, events)
            return events
        self._scan(text, events)
        return events

    def _grow(self, text: str, events: list[str | Call]) -> None:
        """More of the body that is being read."""
        self._body += text
        if self._pieces:
            events += self._written.feed(text)

    def _decide(self, text: str) -> str:
        """Whether the answer is a call, by its first characters; "" while that is open."""
        self._body += text
        start, opens = self._body.lstrip(), self._format.opens
        if any(start.startswith(one) for one in opens):
            self._undecided, self._inside = False, ""
            rest, self._body = self._body, ""
        elif any(one.startswith(start) for one in opens):
            rest = ""
        else:
            self._undecided, rest, self._body = False, self._body, ""
        return rest

    def _scan(self, text: str, events: list[str | Call]) -> None:
        while True:
            before, mark = self._scanner.feed(text)
            text = ""
            if self._inside is None:
                self._say(before, events)
            else:
                self._grow(before, events)
            if mark is None:
                return
            if self._inside is not None:
                self._close(mark, events)
            if mark in self._format.begin:
                self._inside, self._body = mark, ""
                self._written = Written(self._format.head, self._schemas)
                end = self._format.end
                self._scanner.marks = (end,) if end else self._format.begin

    def _close(self, mark: str, events: list[str | Call]) -> None:
        """The calls are complete."""
        end = mark if mark == self._format.end else ""
        raw, body = f"{self._inside}{self._body}{end}", self._body
        self._inside, self._body = None, ""
        self._scanner.marks = self._format.begin
        found, told = self._decode(body), self._written.begun if self._pieces else 0
        if found is None and not told:
            self._say(raw, events)
            return
        events += (found or [])[told:]
        self._blank, self._held = True, ""

    def _decode(self, body: str) -> list[Call] | None:
        try:
            found = self._format.decode(body, self._schemas) or None
        except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
            return None
        written = Written(self._format.head, self._schemas)
        pieces = written.feed(body)
        return None if found is None or written.cut else as_written(found, pieces)

    def _say(self, text: str, events: list[str | Call]) -> None:
        if self._blank:
            self._held += text
            if not self._held.strip():
                return
            text, self._held, self._blank = self._held, "", False
        if text:
            events.append(text)

    def finish(self) -> list[str | Call]:
        """The answer has ended."""
        events: list[str | Call] = []
        rest = self._scanner.flush()
        if self._inside is None:
            self._say(self._body + rest, events)
        elif not self._format.end:
            self._grow(rest, events)
            self._close("", events)
        elif not (self._pieces and self._written.begun):
            self._say(f"{self._inside}{self._body}{rest}", events)  # cut off: no call
        return events


class Written:
    """Calls in pieces, from what stands between begin and end. It goes silent at what it cannot
    tell: calls of unknown tools, arguments that are not JSON or stand before the name."""

    def __init__(self, head: re.Pattern[str] | None, known: Container[str]) -> None:
        self.begun = 0
        """Calls that have been told of."""
        self._head = head
        self._known = known
        self._text = ""
        self._arguments: ObjectText | None = None
        self._silent = head is None

    @property
    def cut(self) -> bool:
        """The last call that has been told of is not complete."""
        return self._arguments is not None

    def feed(self, text: str) -> list[Call]:
        found: list[Call] = []
        while text and not self._silent:
            if self._arguments is None:
                text = self._begin(text, found)
                continue
            piece, text = self._arguments.feed(text)
            if piece:
                found.append(Call("", piece))
            self._silent = self._arguments.broken
            if self._arguments.complete:
                self._arguments = None
        return found

    def _begin(self, text: str, found: list[Call]) -> str:
        """Look for the next call; the text of its arguments so far."""
        self._text += text
        head = self._head.match(self._text) if self._head else None
        if head is None or head.end() > LONGEST_HEAD:
            self._silent = len(self._text) > LONGEST_HEAD
            return ""
        name = head[head.lastindex or 0].strip()
        self._silent = name not in self._known
        if self._silent:
            return ""
        found.append(Call(name, ""))
        self.begun += 1
        self._arguments = ObjectText()
        rest, self._text = self._text[head.end() :], ""
        return rest


LONGEST_HEAD = 2000
"""In characters."""


def as_written(calls: Sequence[Call], pieces: Sequence[Call]) -> list[Call]:
    """The calls with their arguments as the model wrote them, as far as the pieces go."""
    texts: list[str] = []
    for piece in pieces:
        if piece.name:
            texts.append("")
        else:
            texts[-1] += piece.arguments
    kept = zip(calls, texts, strict=False)
    return [Call(call.name, text) for call, text in kept] + list(calls[len(texts) :])


# How each format is decoded. They raise what they like for what is no call.


_DECODER = json.JSONDecoder(strict=False)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # half a surrogate pair is no text
    return text


def _call(content: Any) -> Call:
    """{"name", "arguments" or "parameters"}."""
    name = content["name"]
    arguments = content["arguments"] if "arguments" in content else content["parameters"]
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    name.encode()
    return Call(name, _dumps(arguments))


def _objects(text: str, separators: str) -> list[Any]:
    """JSON values one after the other."""
    place, found = 0, []
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        found.append(value)
        while place < len(text) and text[place] in separators:
            place += 1
    return found


def _hermes(body: str, _: Mapping[str, Json]) -> list[Call]:
    return [_call(_loads(body))]


def _llama(body: str, _: Mapping[str, Json]) -> list[Call]:
    text = body.strip().removeprefix("<|python_tag|>").strip()
    return [_call(content) for content in _objects(text, "; \n\t")]


def _mistral(body: str, _: Mapping[str, Json]) -> list[Call]:
    text = body.strip()
    if text.startswith("["):
        return [_call(content) for content in _loads(text)]
    name, brace, rest = text.partition("{")
    return [_call({"name": name.strip(), "arguments": _loads(brace + rest)})]


_DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n<]+)\n```json\n(.*?)\n?```\s*<｜tool▁call▁end｜>\s*",
    re.DOTALL,
)


def _deepseek(body: str, _: Mapping[str, Json]) -> list[Call]:
    calls, place = [], 0
    while place < len(body):
        found = _DEEPSEEK_CALL.match(body, place)
        if found is None:
            raise ValueError("no call")
        arguments = _loads(found[2])
        calls.append(_call({"name": found[1].strip(), "arguments": arguments}))
        place = found.end()
    return calls


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


def _qwen_coder(body: str, schemas: Mapping[str, Json]) -> list[Call]:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        raise ValueError("no call")
    name, place = function[1].strip(), 0
    properties = schemas.get(name, {}).get("properties") or {}
    arguments: Json = {}
    text = function[2].strip()
    while place < len(text):
        found = _PARAMETER.match(text, place)
        if found is None:
            raise ValueError("no call")
        value = found[2].removeprefix("\n").removesuffix("\n")
        arguments[found[1].strip()] = _cast(value, properties.get(found[1].strip()))
        place = found.end()
        while place < len(text) and text[place].isspace():
            place += 1
    return [Call(name, _dumps(arguments))]


def _cast(text: str, schema: Any) -> Any:
    """A parameter's value by its schema: text, unless another type is wanted and the text is it."""
    kinds = schema.get("type", "string") if isinstance(schema, dict) else "string"
    if isinstance(schema, dict) and "type" not in schema and schema.keys() & {"anyOf", "$ref"}:
        kinds = ["any"]
    if "string" in (kinds if isinstance(kinds, list) else [kinds]):
        return text
    try:
        return _loads(text)
    except ValueError:
        return text


def _pythonic(body: str, _: Mapping[str, Json]) -> list[Call]:
    text = body.strip().removeprefix("<|python_start|>").removesuffix("<|python_end|>")
    with warnings.catch_warnings(action="ignore"):  # of odd literals: they are the model's
        tree = ast.parse(text.strip(), mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("no call")
    return [_python_call(node) for node in tree.elts]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call")
    arguments: Json = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("no call")
        arguments[keyword.arg] = _python_value(keyword.value)
    name = ast.unparse(node.func)
    name.encode()
    return Call(name, _dumps(arguments))


_WORDS = {"true": True, "false": False, "null": None}


def _python_value(node: ast.expr) -> Any:
    """A literal; JSON's words for True, False and None are taken, too."""
    if isinstance(node, ast.Name):
        return _WORDS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _key(key): _python_value(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    value = ast.literal_eval(node)
    if isinstance(value, (bytes, complex, set)) or value is ...:
        raise ValueError("no JSON value")
    return value


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("no JSON object")
    return node.value


_OBJECT = (
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""A call as JSON, up to the brace of its arguments."""

CALLS = {
    found.name: found
    for found in (
        CallFormat(
            "hermes",
            _hermes,
            ("<tool_call>",),
            "</tool_call>",
            head=re.compile(r"\s*" + _OBJECT),
        ),
        CallFormat("qwen3_coder", _qwen_coder, ("<tool_call>",), "</tool_call>"),
        CallFormat(
            "deepseek_v3",
            _deepseek,
            ("<｜tool▁calls▁begin｜>",),
            "<｜tool▁calls▁end｜>",
            tokens=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
            head=re.compile(
                r"(?:\s*```\s*<｜tool▁call▁end｜>)?\s*<｜tool▁call▁begin｜>function"
                r"<｜tool▁sep｜>([^\n<]+)\n```json\n\s*(?=\{)"
            ),
        ),
        CallFormat(
            "mistral",
            _mistral,
            ("[TOOL_CALLS]",),
            short_ids=True,
            head=re.compile(rf"\s*(?:(?:\[|\}}\s*,)\s*{_OBJECT}|([^\s{{}}\[\],]+)\s*(?=\{{))"),
        ),
        CallFormat(
            "llama3_json",
            _llama,
            opens=("<|python_tag|>", "{"),
            tokens=("<|python_tag|>",),
            head=re.compile(rf"\s*(?:<\|python_tag\|>|\}}[; \n\t]*)?\s*{_OBJECT}"),
        ),
        CallFormat(
            "pythonic",
            _pythonic,
            opens=("<|python_start|>", "["),
            tokens=("<|python_start|>", "<|python_end|>"),
        ),
    )
}
"""Every format that can be read, by name."""


def format_of(template: str, vocabulary: Callable[[str], bool]) -> str | None:
    """The format of a model by its chat template and the tokens that it knows; None: none shows."""
    if "<function=" in template and "<tool_call>" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek_v3"
    if "[TOOL_CALLS]" in template or ("tools" in template and vocabulary("[TOOL_CALLS]")):
        return "mistral"
    if "<|python_start|>" in template:
        return "pythonic"
    if "tools" in template and vocabulary("<|python_tag|>"):
        return "llama3_json"
    return None


def names(formats: Mapping[str, object]) -> Sequence[str]:
    return sorted(formats)
