"""One answer's text, growing: tokens in, deltas out.

Tokens are taken one at a time, so the result does not depend on how they were grouped on the way:
what is streamed, joined, is what is not streamed.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass, field, replace

from pdserve.protocol.messages import FinishReason, Output, PositionLogprobs
from pdserve.protocol.sampling import SamplingParams
from pdserve.router.detokenize import TokenText
from pdserve.router.reading import Read
from pdserve.router.repetition import DETECTED, REASON, RepetitionScanner
from pdserve.router.requests import TextOptions
from pdserve.router.stops import StopScanner

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as the client hears of it, or more of one."""

    index: int
    id: str
    """"": only arguments are new."""
    name: str
    arguments: str
    """JSON text."""


@dataclass(slots=True)
class Delta:
    """What is new in an answer since the last delta."""

    text: str = ""
    thoughts: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    """One per token, if asked for."""
    offsets: list[int] = field(default_factory=list)
    """Characters of the answer before each token, if logprobs were asked for."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def continued(self) -> list[ToolCall]:
        """The rest of a call that had begun before everything else in this delta."""
        return [call for call in self.calls if not call.id]

    @property
    def begun(self) -> list[ToolCall]:
        """Calls that begin in this delta, behind its text."""
        return [call for call in self.calls if call.id]


def call_id(short: bool) -> str:
    """A new id; short ones have nine letters and digits."""
    if short:
        return "".join(secrets.choice(_LETTERS) for _ in range(9))
    return f"chatcmpl-tool-{secrets.token_hex(8)}"


class AnswerText:
    """Feeds outputs of the workers through detokenizer and stop strings."""

    def __init__(
        self, tokens: TokenText, prompt: list[int], sampling: SamplingParams, options: TextOptions
    ) -> None:
        reading = options.reading
        self._reader = None if reading is None else reading.reader()
        self._show_thoughts = reading is None or reading.show_thoughts
        self._short_ids = bool(reading and reading.calls and reading.calls.short_ids)
        kept = reading.kept if reading and options.skip_special_tokens else frozenset()
        self._hidden = tokens.special_ids - kept if kept else frozenset()
        """Tokens whose text is not shown, where some special ones are."""
        self._detokenizer = tokens.detokenizer(prompt, options.skip_special_tokens and not kept)
        self._scanner = StopScanner(options.stops, options.include_stop)
        rule = options.repetition
        self._repetition = None if rule is None else RepetitionScanner(rule)
        self._ending = sampling.ending_token_ids
        self._include_stop = options.include_stop
        self._scan_after = sampling.min_tokens if options.stops else 0
        """Stop strings are looked for only behind so many tokens."""
        self._with_logprobs = sampling.logprobs is not None
        self._chars = 0
        self._called = 0
        self._delta = Delta()
        self.count = 0
        """Tokens of the answer."""
        self.thought = 0
        """Tokens of its thoughts."""
        self.before_calls: int | None = None
        """Tokens before its first call; None: there has been none."""
        self._spoken = 0
        """Tokens before what may become its first call."""
        self.finished = False
        self.finish_reason = ""
        self.cached_tokens: int | None = None
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None

    def feed(self, output: Output) -> None:
        """Take one output. After a stop string nothing more counts."""
        if output.cached_tokens is not None and self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        token_ids, logprobs = output.token_ids, output.logprobs
        stopped = output.finish_reason is FinishReason.STOP
        for place, token_id in enumerate(token_ids):
            ends = stopped and place == len(token_ids) - 1 and token_id in self._ending
            self._add(token_id, logprobs[place] if logprobs else None, ends)
            if self.finished:
                return
        if output.finish_reason is not None:
            self.finish(output.finish_reason.value, output.stop_token_id)

    def _add(self, token_id: int, logprobs: PositionLogprobs | None, ends: bool) -> None:
        self.count += 1
        shown, reader = True, self._reader
        if reader is not None:
            if reader.thinking:
                self.thought += 1
                shown = self._show_thoughts
            if not reader.calling:
                self._spoken = self.count
        if shown:
            self._note(token_id, logprobs)
        if ends and not self._include_stop:
            return  # the token that ends an answer is counted, its text is not shown
        if token_id not in self._hidden:
            text = self._detokenizer.add(token_id)
            if text:
                self._pass_on(text)
        if self._repetition and self._repetition.feed(token_id) and not self.finished:
            self.finish(REASON, DETECTED)

    def _note(self, token_id: int, logprobs: PositionLogprobs | None) -> None:
        delta = self._delta
        delta.token_ids.append(token_id)
        if logprobs is not None and self._with_logprobs:
            delta.logprobs.append(logprobs)
            delta.offsets.append(self._chars)

    def _pass_on(self, text: str) -> None:
        self._chars += len(text)
        if self.count <= self._scan_after:
            self._show(text)
            return
        free, match = self._scanner.feed(text)
        self._show(free)
        if match is not None:
            self._end("stop", match)

    def finish(self, reason: str, stop_reason: int | str | None) -> None:
        """No more tokens will come."""
        rest = self._detokenizer.finish()
        if rest:
            self._pass_on(rest)
        if not self.finished:
            self._show(self._scanner.flush())
            self._end(reason, stop_reason)

    def _show(self, text: str) -> None:
        if self._reader is None:
            self._delta.text += text
        elif text:
            self._take_in(self._reader.feed(text))

    def _take_in(self, read: Read) -> None:
        delta = self._delta
        delta.text += read.text
        delta.thoughts += read.thoughts
        for call in read.calls:
            if call.name:
                if not self._called:
                    self.before_calls = self._spoken
                found = call_id(self._short_ids)
                delta.calls.append(ToolCall(self._called, found, call.name, call.arguments))
                self._called += 1
            elif delta.calls:
                last = delta.calls[-1]
                delta.calls[-1] = replace(last, arguments=last.arguments + call.arguments)
            else:
                delta.calls.append(ToolCall(self._called - 1, "", "", call.arguments))

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        self.finish_reason = reason
        if self._reader is not None:
            self._take_in(self._reader.finish())
            if self._reader.called and reason == "stop":
                reason = "tool_calls"
        self._delta.finish_reason = reason
        self._delta.stop_reason = stop_reason

    def waits(self, interval: int) -> bool:
        """Too few tokens are in the delta to send it, and it is neither the first nor the last."""
        pending = len(self._delta.token_ids)
        return pending < interval and self.count > pending and not self.finished

    def take(self) -> Delta | None:
        """The delta, if it has text or ends the answer: tokens wait for the text they are part
        of."""
        delta = self._delta
        if not (delta.text or delta.thoughts or delta.calls) and delta.finish_reason is None:
            return None
        self._delta = Delta()
        return delta
