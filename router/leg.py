"""One leg of an answer: a submission to one worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pdserve.protocol.errors import WorkerError
from pdserve.protocol.messages import LifeEvent, Output
from pdserve.router.chooser import Verdict
from pdserve.router.link import WorkerLink


class LegOwner(Protocol):
    """Who hears of it: its answer."""

    def learn_from(self, leg: AnswerLeg) -> None:
        """It has told what happened when."""

    def on_output(self, leg: AnswerLeg, output: Output) -> None:
        """In order."""

    def on_failure(self, leg: AnswerLeg, error: WorkerError) -> None:
        """It is lost."""


@dataclass(slots=True, eq=False)
class AnswerLeg:
    """One submission to one worker. The link calls `receive` and `lost`."""

    answer: LegOwner
    link: WorkerLink
    request_id: str
    kind: str
    """"prefill", "decode" (with a ticket), "full" (prompt in, tokens out) or "moved"."""
    submitted_at: float
    verdict: Verdict
    """Why this worker."""
    events: tuple[LifeEvent, ...] = ()
    answered: bool = False
    """The worker has brought at least one output."""
    error: WorkerError | None = None
    """Why it ended badly."""
    length: int = 0
    """Tokens when it was submitted."""
    cached: int = 0
    """Of them, found in the worker's prefix cache."""
    drawn: int = 0
    """Tokens that it brought."""
    source: str = ""
    """The worker from which it fetches blocks."""
    early: bool = False
    """Sent before the prompt was complete."""

    def receive(self, output: Output) -> None:
        self.answered = True
        self.drawn += len(output.token_ids)
        self.cached = output.cached_tokens or self.cached
        if output.events:
            self.events = output.events
            self.answer.learn_from(self)
        self.answer.on_output(self, output)

    def lost(self, error: WorkerError) -> None:
        self.answer.on_failure(self, error)
