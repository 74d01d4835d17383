"""Thoughts that a model writes before its answer, between marks of its own."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.parsers.scan import Scanner


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models marks its thoughts."""

    name: str
    start: str
    """Begins the thoughts; it may stand in the prompt instead of the answer."""
    end: str
    closing: str
    """What to write so that the thoughts end: `end`, and what belongs before it."""
    noise: tuple[str, ...] = ()
    """Marks inside the thoughts that are not shown."""
    implied: tuple[str, ...] = ()
    """Marks that end the thoughts without `end`, and belong to what follows."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.start, self.end, *self.noise)


THINK = ("<think>", "</think>", "</think>")
HARMONY = "<|channel|>final<|message|>"

REASONING = {
    found.name: found
    for found in (
        ReasoningFormat("deepseek_r1", *THINK),
        ReasoningFormat("qwen3", *THINK, implied=("<tool_call>",)),
        ReasoningFormat(
            "gpt_oss",
            "<|channel|>analysis<|message|>",
            HARMONY,
            "<|end|><|start|>assistant" + HARMONY,
            noise=(
                "<|end|>",
                "<|start|>assistant",
                "<|channel|>commentary<|message|>",
                "<|channel|>",
                "<|message|>",
                "<|start|>",
            ),
        ),
    )
}
"""Every format that can be read, by name."""


class ReasoningParser:
    """Reads one answer. It begins with thoughts, whether or not the start mark comes."""

    def __init__(self, reasoning: ReasoningFormat) -> None:
        self._format = reasoning
        self._scanner = Scanner((*reasoning.marks, *reasoning.implied))
        self.thinking = True
        self._blanks = ""
        """White space that is shown only if more of the same follows."""
        self._begun = False

    def feed(self, text: str) -> tuple[str, str]:
        """(thoughts, answer) that this piece brings."""
        thoughts = ""
        while self.thinking:
            before, mark = self._scanner.feed(text)
            thoughts += self._thought(before)
            text = ""
            if mark is None:
                return thoughts, ""
            if mark in (self._format.end, *self._format.implied):
                self._end()
                text = (mark if mark != self._format.end else "") + self._scanner.flush()
        return thoughts, self._answer(text)

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        if not self.thinking:
            return "", ""
        rest = self._scanner.flush()
        for mark in self._format.marks:
            rest = rest.replace(mark, "")
        return self._thought(rest), ""

    def _end(self) -> None:
        self.thinking = self._begun = False
        self._blanks = ""

    def _thought(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        whole = self._blanks + text
        shown = whole.rstrip()
        self._blanks = whole[len(shown) :]
        return shown

    def _answer(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text
