"""What a sampler is told about the form of an answer: a grammar, where free thinking ends, and the
tokens that there are."""

from __future__ import annotations

from typing import TypedDict

import msgspec


class Limits(TypedDict):
    """Bounds of llguidance's `LLParserLimits`."""

    max_grammar_size: int
    initial_lexer_fuel: int
    step_lexer_fuel: int
    step_max_items: int
    max_lexer_states: int


LIMITS: Limits = {
    "max_grammar_size": 200_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
}
"""The same wherever a grammar is checked or used. With
these the worst token that we found, `(a{1000}){1000}`, costs some 0.1 s before its request ends."""
MAX_CHARS = 256 * 1024
"""Longest grammar, as llguidance reads it."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be drawn, as a function of the answer's tokens so far.

    While the answer thinks (`after` is not empty and its tokens have not come yet) anything may be
    drawn, `budget` tokens long; then the grammar holds. An end-of-sequence token may be drawn where
    the grammar's text may end, and an answer to which nothing can be added ends at once. `allowed`
    and `forbidden` hold all along.
    """

    grammar: str = ""
    """A grammar in llguidance's own notation, checked by the router; "": any text."""
    after: tuple[int, ...] = ()
    """The tokens that end the thinking; (): the answer does not begin with thoughts."""
    budget: int | None = None
    """Tokens of thinking after which `closing` is forced, 0 or more; None: no limit."""
    closing: tuple[int, ...] = ()
    """What is forced; ends with `after`."""
    allowed: tuple[int, ...] = ()
    """The only tokens that may be drawn, ends of sequence included; (): all."""
    forbidden: tuple[tuple[int, ...], ...] = ()
    """Sequences of at least one token that the answer must not contain: the last one of each cannot
    be drawn behind the others."""
