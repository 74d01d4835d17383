"""Starts requests: their answers, each with its own life (`answer.py`), and what they share."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from pdserve.protocol.errors import ErrorCode
from pdserve.router.answer import Answer, AnswerSpec
from pdserve.router.breaker import Pairs
from pdserve.router.candidates import Candidates
from pdserve.router.chooser import Chooser
from pdserve.router.mailbox import Mailbox
from pdserve.router.packed import PackedPrompt
from pdserve.router.placement import (
    Disaggregate,
    Policy,
    usable,
)
from pdserve.router.predict import Predictor
from pdserve.router.unheard import Unheard
from pdserve.router.waiting import PATIENCE_S, WaitingRoom
from pdserve.router.workers import WorkerPool


@dataclass(slots=True, eq=False)
class Flight:
    """All answers of one HTTP request. Use as a context: leaving it aborts what still runs."""

    answers: list[Answer]
    mailbox: Mailbox
    open: int
    """Answers that have not ended."""
    deadline: float
    """Monotonic time at which they end in any case."""
    timer: asyncio.TimerHandle
    release: Callable[[], None]
    gone: bool = field(default=False)
    """The client has left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        for answer in self.answers:
            if not answer.done:
                answer.end()
        self.release()

    def client_left(self) -> None:
        """Abort everything now, and wake the task that serves the client."""
        self.gone = True
        for answer in self.answers:
            answer.end()
        self.mailbox.wake()


class Dispatcher:
    """Starts requests on the pool's workers."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        timeout_s: float,
        patience_s: float = PATIENCE_S,
        chooser: Chooser | None = None,
        disaggregate: Disaggregate = Disaggregate.ALWAYS,
        count_move: Callable[[str, ErrorCode], None] = lambda kind, code: None,
    ) -> None:
        """`timeout_s`: longest life of a request. `chooser`: by default least load over the pool's
        own view. `count_move(kind of leg, why)` is told of each
        leg that is retried."""
        self.pool = pool
        self.unheard = Unheard()
        self.chooser = chooser or Chooser(None, Policy.LEAST_LOAD, pool.load, random.Random())
        self.disaggregate = disaggregate
        self.predictor = Predictor()
        self.candidates = Candidates(pool, self.predictor, disaggregate)
        self.count_move = count_move
        self.in_flight = 0
        """Answers that are being generated."""
        self.pairs = Pairs()
        self.waiting = WaitingRoom(lambda: pool.loading, patience_s)
        self._timeout_s = timeout_s
        self._last_prompt = PackedPrompt([], "")
        pool.on_change(self.waiting.wake)

    @property
    def ready(self) -> bool:
        return usable(self.pool.snapshot(), self.disaggregate)

    def launch(self, request_id: str, specs: Sequence[AnswerSpec], spent_s: float = 0.0) -> Flight:
        """Send the first legs of all answers. Raises RequestError(NO_WORKER); then none is left.

        `request_id` need not be unique: what workers get is. `spent_s` of the requests' life have
        gone by.
        """
        left_s = max(0.001, self._timeout_s - spent_s)
        mailbox = Mailbox()
        base_id = f"{request_id}-{secrets.token_hex(4)}"
        deadline = time.monotonic() + left_s
        answers = [
            Answer(self, base_id, index, spec, mailbox, deadline)
            for index, spec in enumerate(specs)
        ]
        loop = asyncio.get_running_loop()
        timer = loop.call_later(left_s, self._expire, answers)
        self.in_flight += len(answers)
        for answer, spec in zip(answers, specs, strict=True):
            self.unheard.add(answer, len(spec.prompt_token_ids))
        count = len(answers)
        flight = Flight(answers, mailbox, count, deadline, timer, lambda: self._land(count))
        try:
            for answer in answers:
                answer.start()
        except BaseException:
            flight.__exit__()
            raise
        return flight

    def packed(self, spec: AnswerSpec) -> PackedPrompt:
        """The answers of one request share the work on their prompt."""
        last = self._last_prompt
        same = last.token_ids is spec.prompt_token_ids and last.salt == spec.cache_salt
        if not same:
            self._last_prompt = last = PackedPrompt(spec.prompt_token_ids, spec.cache_salt)
        return last

    def nobody(self) -> str:
        """Why no request can be served, as a sentence."""
        roles = sorted(load.role for load in self.pool.snapshot())
        there = ", ".join(roles) or "none"
        reason = f" ({self.pool.redis_error})" if self.pool.redis_error else ""
        return (
            "No workers can serve requests now: at least one prefill and one decode worker, or one "
            f"colocated worker, must be ready; connected: {there}{reason}. Try again soon."
        )

    def _expire(self, answers: list[Answer]) -> None:
        for answer in answers:
            answer.fail(
                ErrorCode.DEADLINE,
                f"The request was not finished within {self._timeout_s:g} s; ask for fewer tokens, "
                "or raise --request-timeout.",
            )

    def _land(self, count: int) -> None:
        self.in_flight -= count
        self.unheard.ended()
