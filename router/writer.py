"""What stands between a generation and the protocol in which its client is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.router.errors import ApiError
from pdserve.router.output import AnswerText
from pdserve.router.requests import GenerateRequest
from pdserve.router.served import ServedModel

Json = dict[str, Any]


def _no_times() -> Json | None:
    return None


@dataclass(slots=True, kw_only=True)
class Progress:
    """A request on its way, as a writer sees it; only the generation changes it."""

    request: GenerateRequest
    model: ServedModel
    answers: list[AnswerText]
    open: int
    """Answers that have not ended."""
    created: int
    """Unix time."""
    extras: Callable[[], Json]
    """The `pdserve` member with timings, or nothing if the client did not ask."""
    times: Callable[[], Json | None] = _no_times
    """The member `metrics`, for requests that get one."""
    stored: Callable[[], int] = lambda: 0
    """Prompt tokens that the next request with these prompts will find cached, and this one has
    not."""


class Writer(Protocol):
    """One request's answer in the shapes of a protocol: a whole body, or server-sent events."""

    keep_alive: bytes
    """Sent when a stream has been silent for so long:"""
    silence_s: float
    """Seconds; 0: nothing is sent."""

    def body(self) -> Json:
        """All of it, after the last answer has ended."""

    def opening(self) -> list[bytes]:
        """Frames before everything else, when the first token has come."""

    def frames(self, index: int) -> list[bytes]:
        """Takes what is new in an answer that has grown, if it is time to send it."""

    def closing(self) -> list[bytes]:
        """Frames after everything else."""

    def error(self, error: ApiError) -> bytes:
        """The last frames of a stream that failed on its way."""


WriterOf = Callable[[Progress], Writer]
