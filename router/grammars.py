"""From what clients write about the form of an answer to a grammar in llguidance's notation.

Runs in the process of `grammar_child`, never in the router: some schemas keep the library busy for
ever. A wish is a (kind, value, options):

    json            a JSON schema; options: whitespace, additional properties
    regex           a pattern for the whole answer
    choice          a list of texts
    grammar         EBNF (`::=`, as llama.cpp writes it) or Lark
    structural_tag  a format of nested texts, tags and schemas (the names are vLLM's and xgrammar's)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from pdserve.router.parts import closed

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Json = dict[str, Any]

ANY_TEXT = r"/(.|\n)*/"

BLANKS = r"[ \n\r\t]{1,24}"
"""What may stand between the parts of JSON: enough to indent, and no way to go on for ever."""


class WishError(ValueError):
    """A sentence about what is wrong with the wish."""


def grammar_of(
    kind: str, value: Any, options: Mapping[str, Any], special: Mapping[str, int]
) -> str:
    """The grammar, not yet compiled. `special`: token ids of the vocabulary's special tokens, by
    what they are called. Raises WishError, or ValueError of the library."""
    if kind == "json":
        return json_grammar(value, options)
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(value))
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))
    if kind == "grammar":
        return str(LLMatcher.grammar_from_lark(as_lark(value)))
    return TagCompiler(special).compile(value)


def json_grammar(schema: Any, options: Mapping[str, Any]) -> str:
    overrides: JsonCompileOptions = {"whitespace_pattern": BLANKS}
    if options.get("disable_any_whitespace"):
        overrides = {"whitespace_flexible": False}
    if options.get("whitespace_pattern"):
        overrides["whitespace_pattern"] = options["whitespace_pattern"]
    if options.get("disable_additional_properties"):
        schema = closed(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides))


def as_lark(text: str) -> str:
    return str(gbnf_to_lark(text)) if "::=" in text else text


class TagCompiler:
    """A structural tag as one Lark grammar: every part becomes a rule."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._rules: list[str] = []
        self._grammars: list[Json] = []

    def compile(self, tag: Any) -> str:
        """`tag`: {"format": …}, or the older {"structures": […], "triggers": […]}."""
        if not isinstance(tag, dict):
            raise WishError("it must be an object")
        if "structures" in tag:
            start = self._legacy(tag)
        elif "format" in tag:
            start = self.part(tag["format"])
        else:
            raise WishError("it needs a member `format`, or `structures` and `triggers`")
        lark = "\n".join([f"start: {start}", *self._rules, f"ANY_TEXT: {ANY_TEXT}"])
        named = {"name": "structural_tag", "lark_grammar": lark}
        return json.dumps({"grammars": [named, *self._grammars]})

    def part(self, part: Any) -> str:
        """The name of a rule for one part."""
        kind = part.get("type") if isinstance(part, dict) else None
        makers: dict[str, Callable[[Json], str]] = {
            "const_string": lambda p: self._literal(_text(p, "value")),
            "json_schema": lambda p: f"%json {json.dumps(_spaced(_schema(p)))}",
            "regex": lambda p: f"/{regex_to_lark(_text(p, 'pattern'))}/",
            "grammar": self._grammar,
            "any_text": lambda p: "ANY_TEXT",
            "sequence": lambda p: " ".join(map(self.part, _list(p, "elements"))),
            "or": lambda p: " | ".join(map(self.part, _list(p, "elements"))),
            "tag": self._tag,
            "structures": self._legacy,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        if kind not in makers:
            raise WishError(f"a part's type must be one of {', '.join(makers)}, got {kind!r:.100}")
        return self._rule(makers[kind](part))

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """A text, in which the names of special tokens stand for them."""
        pieces, rest = [], text
        while rest:
            places = [(rest.find(name), name) for name in self._special if name in rest]
            place, name = min(places, default=(len(rest), ""), key=lambda p: (p[0], -len(p[1])))
            if place:
                pieces.append(json.dumps(rest[:place], ensure_ascii=False))
            if name:
                pieces.append(f"<[{self._special[name]}]>")
            rest = rest[place + len(name) :]
        return " ".join(pieces) or '""'

    def _grammar(self, part: Json) -> str:
        name = f"grammar_{len(self._grammars)}"
        lark = as_lark(_text(part, "grammar"))
        self._grammars.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def _tag(self, tag: Json, skipped: int = 0) -> str:
        """begin, content, end; without the first `skipped` characters of begin."""
        begin, content = self._literal(_text(tag, "begin")[skipped:]), tag.get("content")
        ends = tag.get("end", "")
        ends = ends if isinstance(ends, list) else [ends]
        if not ends or not all(isinstance(text, str) for text in ends):
            raise WishError("a tag's end must be a text or a list of texts")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            return f"{begin} ({' | '.join(map(self._until, ends))})"
        return f"{begin} {self.part(content)} ({' | '.join(map(self._literal, ends))})"

    def _triggered(self, part: Json) -> str:
        """Free text; where a trigger comes, one of its tags must follow."""
        triggers, tags = _list(part, "triggers"), _list(part, "tags")
        uses: list[str] = []
        for trigger in triggers:
            if not isinstance(trigger, str) or not trigger:
                raise WishError("a trigger must be a text that is not empty")
            bodies = [
                self._rule(self._tag(tag, len(trigger)))
                for tag in tags
                if _text(tag, "begin").startswith(trigger)
            ]
            if not bodies:
                raise WishError(f"no tag begins with the trigger {trigger!r:.100}")
            uses.append(self._rule(f"{self._until(trigger)} ({' | '.join(bodies)})"))
        orphans = [tag for tag in tags if not _text(tag, "begin").startswith(tuple(triggers))]
        if orphans:
            raise WishError(f"no trigger begins the tag {orphans[0]['begin']!r:.100}")
        once = f"({' | '.join(uses)})"
        if part.get("stop_after_first"):
            return once if part.get("at_least_one") else f"{once} | ANY_TEXT"
        return f"{once}{'+' if part.get('at_least_one') else '*'} ANY_TEXT"

    def _until(self, mark: str) -> str:
        """Text up to the first `mark`, and that."""
        if mark in self._special:
            return f"(ANY_TEXT {self._literal(mark)})"
        return self._rule(f"ANY_TEXT {json.dumps(mark, ensure_ascii=False)}", "[lazy]")

    def _separated(self, part: Json) -> str:
        """Tags and nothing else."""
        tags = [self.part({**tag, "type": "tag"}) for tag in _list(part, "tags")]
        one = self._rule(" | ".join(tags))
        separator = part.get("separator", "")
        if not isinstance(separator, str):
            raise WishError("a separator must be a text")
        more = "" if part.get("stop_after_first") else f"({self._literal(separator)} {one})*"
        whole = f"{one} {more}"
        return whole if part.get("at_least_one") else f"({whole})?"

    def _legacy(self, tag: Json) -> str:
        tags = [
            {
                "begin": _text(structure, "begin"),
                "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
                "end": _text(structure, "end"),
            }
            for structure in _list(tag, "structures")
        ]
        return self.part(
            {"type": "triggered_tags", "triggers": _list(tag, "triggers"), "tags": tags}
        )


def _schema(part: Json) -> Any:
    schema = part.get("json_schema")
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise WishError("a part of type json_schema needs a schema in its member json_schema")
    return schema


def _spaced(schema: Json) -> Json:
    """With our rule for blanks, where the schema has none of its own."""
    own = schema.get("x-guidance", {})
    blanks = {} if "whitespace_flexible" in own else {"whitespace_pattern": BLANKS}
    return {**schema, "x-guidance": {**blanks, **own}}


def _text(part: Any, name: str) -> str:
    value = part.get(name) if isinstance(part, dict) else None
    if not isinstance(value, str):
        raise WishError(f"a part needs a text in its member {name}")
    return value


def _list(part: Json, name: str) -> list[Any]:
    value = part.get(name)
    if not isinstance(value, list) or not value:
        raise WishError(f"a part needs a list that is not empty in its member {name}")
    return value
