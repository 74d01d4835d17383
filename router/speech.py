"""What a model writes besides text, and the tokens by which it does: calls of tools, thoughts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.cluster.model_files import ModelError
from pdserve.parsers.calls import CALLS, CallFormat, format_of
from pdserve.parsers.reasoning import REASONING, ReasoningFormat
from pdserve.router.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    calls: CallFormat | None = None
    """None: tools are refused."""
    auto_calls: bool = False
    """The model may call tools without being told to."""
    reasoning: ReasoningFormat | None = None
    """None: what it thinks is part of its answers."""
    after: tuple[int, ...] = ()
    """Tokens that end its thoughts."""
    closing: tuple[int, ...] = ()
    """What makes it end them."""
    kept: frozenset[int] = field(default_factory=frozenset)
    """Special tokens whose text the parsers need."""

    @property
    def may_call(self) -> bool:
        """It may decide to call tools, and its calls are recognised."""
        return self.auto_calls and self.calls is not None


def find_speech(
    tokenizer: TextTokenizer, template: str, *, calls: str, auto_calls: bool, reasoning: str
) -> Speech:
    """From the options --tool-call-parser, --enable-auto-tool-choice, --reasoning-parser. Raises
    ModelError for what the model cannot do."""

    def knows(token: str) -> bool:
        return tokenizer.core.token_to_id(token) is not None

    if calls == "auto":
        calls = format_of(template, knows) or "none"
    if reasoning == "auto":
        reasoning = _reasoning_of(template, knows)
    if auto_calls and calls == "none":
        raise ModelError(
            "--enable-auto-tool-choice needs a --tool-call-parser: how this model writes calls of "
            "tools does not follow from its chat template and vocabulary."
        )
    thoughts = REASONING.get(reasoning)
    if thoughts is not None:
        _check_marks(tokenizer, thoughts)
    marks = (CALLS[calls].marks if calls != "none" else ()) + (thoughts.marks if thoughts else ())
    found = {id_ for mark in marks for id_ in tokenizer.encode(mark, False)}
    return Speech(
        calls=CALLS.get(calls),
        auto_calls=auto_calls,
        reasoning=thoughts,
        after=tuple(tokenizer.encode(thoughts.end, False)) if thoughts else (),
        closing=tuple(tokenizer.encode(thoughts.closing, False)) if thoughts else (),
        kept=frozenset(found & tokenizer.tokens.special_ids),
    )


def _reasoning_of(template: str, knows: Callable[[str], bool]) -> str:
    if knows("<|channel|>") and knows("<|message|>"):
        return "gpt_oss"
    if knows("<think>") and knows("</think>"):
        return "qwen3" if "enable_thinking" in template else "deepseek_r1"
    return "none"


def _check_marks(tokenizer: TextTokenizer, thoughts: ReasoningFormat) -> None:
    """The marks must be tokens: grammars and budgets follow them by id."""
    pieces = ("<|channel|>", "<|message|>") if "<|" in thoughts.end else (thoughts.end,)
    for mark in pieces:
        if tokenizer.core.token_to_id(mark) is None:
            raise ModelError(
                f"--reasoning-parser {thoughts.name} needs the token {mark} in the model's "
                "vocabulary, which does not have it; choose another parser, or none."
            )
