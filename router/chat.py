"""Chat templates: messages to the text of a prompt.

Templates come from checkpoints and, if the operator allows it, from requests: they run in Jinja's
immutable sandbox, with the functions that transformers offers and within bounds of time and size.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pdserve.router.errors import BadRequest

Message = dict[str, Any]

MAX_SECONDS = 2.0
"""Longest rendering."""
MAX_CHARS = 64 * 2**20
"""Longest prompt that a template may write, and longest string it may build by repetition."""
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "tokenize",
        "chat_template",
        "namespace",
        "dict",
        "range",
    }
)
"""Names that `chat_template_kwargs` cannot give another meaning; they are dropped."""
CONTINUE_MARK = "\u2063CONTINUE-HERE\u2063 "
"""Put behind the last message to find where it ends in the prompt. Its blank at the end shows
whether the template trims."""


class TemplateError(BadRequest):
    """A template that is malformed or that failed on this conversation."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (as its base class has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` that cannot be given names with a leading underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"A namespace cannot hold {name!r}.")
        super().__setitem__(name, value)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a clock: every attribute, item and call looks at it."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self.clock = threading.local()
        """Its `deadline` is that of the rendering in this thread."""
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace

    def check_clock(self) -> None:
        if time.monotonic() > getattr(self.clock, "deadline", math.inf):
            raise TemplateError(
                f"The chat template did not finish within {MAX_SECONDS:g} s.", param="messages"
            )

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_clock()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_clock()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
        numbers = [abs(side) for side in (left, right) if isinstance(side, (int, float))]
        if operator == "**" and any(number > 4096 for number in numbers):
            raise TemplateError("The chat template computes too large a power.", param="messages")
        if operator == "*" and sizes and numbers and max(sizes) * max(numbers) > MAX_CHARS:
            raise TemplateError("The chat template builds too long a text.", param="messages")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise TemplateError("The chat template builds too long a text.", param="messages")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML characters; prompts must not be escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, content_format: str = "auto") -> None:
        """`content_format`: "string", "openai" or "auto". Raises TemplateError if malformed."""
        self.source = source
        try:
            self._environment = _Environment()
            tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except (jinja2.exceptions.TemplateError, RecursionError) as error:
            raise TemplateError(
                f"The chat template is malformed: {error}", param="chat_template"
            ) from None
        self.detected_format = detect_content_format(tree)
        self.content_format = self.detected_format if content_format == "auto" else content_format

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. Raises TemplateError."""
        conversation = [self._adapt(message) for message in messages]
        if continue_final_message:
            final = _mark_final(conversation)
        self._environment.clock.deadline = time.monotonic() + MAX_SECONDS
        given = {name: value for name, value in variables.items() if name not in RESERVED}
        try:
            pieces = self._template.generate(
                **given,
                messages=conversation,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
            text = _join(pieces, self._environment.check_clock)
        except TemplateError:
            raise
        except Exception as error:  # a template can make Python raise anything
            raise TemplateError(
                f"The chat template refused the conversation: {error}", param="messages"
            ) from None
        return _cut_at_mark(text, final) if continue_final_message else text

    def _adapt(self, message: Message) -> Message:
        """One message in the shape that the template reads."""
        adapted = dict(message)
        content = adapted.get("content")
        if isinstance(content, list) and self.content_format == "string":
            adapted["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self.content_format == "openai":
            adapted["content"] = [{"type": "text", "text": content}]
        if adapted.get("role") == "developer" and "developer" not in self.source:
            adapted["role"] = "system"  # most templates know only the older name
        return adapted


def _join(pieces: Iterator[str], check_clock: Callable[[], None]) -> str:
    parts, size = [], 0
    for piece in pieces:
        check_clock()
        parts.append(piece)
        size += len(piece)
        if size > MAX_CHARS:
            raise TemplateError(
                f"The chat template wrote more than {MAX_CHARS} characters.", param="messages"
            )
    return "".join(parts)


def _mark_final(conversation: list[Message]) -> str:
    """Put the mark behind the last text of the last message; returns that text."""
    message = conversation[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUE_MARK
        return content
    if isinstance(content, list) and content:
        last = content[-1]
        message["content"] = [*content[:-1], {**last, "text": last["text"] + CONTINUE_MARK}]
        return str(last["text"])
    raise TemplateError(
        "continue_final_message needs a last message with text in its content.",
        param="continue_final_message",
    )


def _cut_at_mark(text: str, final: str) -> str:
    place = text.rfind(CONTINUE_MARK.strip())
    if place < 0 or final.strip() not in text:
        raise TemplateError(
            "continue_final_message cannot be used here: the chat template leaves out or changes "
            "the last message.",
            param="continue_final_message",
        )
    kept = text[place : place + len(CONTINUE_MARK)] == CONTINUE_MARK
    return text[:place] if kept else text[:place].rstrip()


@lru_cache(maxsize=32)
def compiled(source: str, content_format: str) -> ChatTemplate:
    """Templates of requests: the same one comes again and again."""
    return ChatTemplate(source, content_format)


def find_template(option: str, own: Mapping[str, str]) -> str | None:
    """The text that `--chat-template` stands for: a file, one of the model's named templates, or
    the template itself; without the option the model's default. Raises TemplateError."""
    if not option:
        return own.get("default") or next(iter(own.values()), None)
    looks_like_text = any(mark in option for mark in "{}\n")
    if not looks_like_text:
        if option in own:
            return own[option]
        try:
            return Path(option).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(own)) or "none"
            raise TemplateError(
                f"--chat-template {option} looks like a file path, but it failed to be opened: "
                f"{error}. (The model's own templates: {names}.)"
            ) from None
    return option


# How a template reads message.content


def detect_content_format(tree: jinja2.nodes.Template) -> str:
    """ "openai" if the template loops over a message's content, else "string"."""
    conversations = _aliases(tree, {"messages"}, _stands_for)
    loops = list(tree.find_all(jinja2.nodes.For))
    heads = {
        loop.target.name
        for loop in loops
        if isinstance(loop.target, jinja2.nodes.Name) and _stands_for(loop.iter, conversations)
    }
    heads = _aliases(tree, heads, _stands_for)
    contents = _aliases(tree, set(), lambda node, names: _is_content(node, heads, names))
    if any(_is_content(loop.iter, heads, contents) for loop in loops):
        return "openai"
    return "string"


def _aliases(
    tree: jinja2.nodes.Template,
    names: set[str],
    matches: Callable[[jinja2.nodes.Node, set[str]], bool],
) -> set[str]:
    """`names` and every variable that is assigned from something that `matches`."""
    found = set(names)
    assigned = [
        (node.target.name, node.node)
        for node in tree.find_all(jinja2.nodes.Assign)
        if isinstance(node.target, jinja2.nodes.Name)
    ]
    for _ in assigned:
        grown = found | {name for name, value in assigned if matches(value, found)}
        if grown == found:
            break
        found = grown
    return found


def _stands_for(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """Whether `node` is one of `names`, or that filtered, tested, sliced or chosen between."""
    if isinstance(node, jinja2.nodes.Name):
        return node.name in names
    if isinstance(node, (jinja2.nodes.Filter, jinja2.nodes.Test)):
        return node.node is not None and _stands_for(node.node, names)
    if isinstance(node, jinja2.nodes.Getitem):
        return _stands_for(node.node, names)
    if isinstance(node, jinja2.nodes.CondExpr):
        return any(_stands_for(side, names) for side in (node.expr1, node.expr2) if side)
    return False


def _is_content(node: jinja2.nodes.Node, heads: set[str], aliases: set[str]) -> bool:
    """Whether `node` is message.content, message['content'], or an alias of it."""
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content" and _stands_for(node.node, heads)
    if isinstance(node, jinja2.nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, jinja2.nodes.Const) else None
        return key == "content" and _stands_for(node.node, heads)
    if isinstance(node, jinja2.nodes.Filter):
        return node.node is not None and _is_content(node.node, heads, aliases)
    return isinstance(node, jinja2.nodes.Name) and node.name in aliases
