"""Who is let in, who waits, who is refused: before any worker has done anything for a request.

    request ─► limits: in flight, waiting, predicted first token ─► 429 with Retry-After
                 │
                 └─► room at the workers ─► launched
                 └─► none ─► line (fair among keys, by priority) ─room─► launched

Room means that few answers of this router wait for their first token: what waits here is served in
a fair order, what waits in a worker's queue is not. So workers get enough to fill their steps.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.records import Role
from pdserve.router.dispatch import Dispatcher
from pdserve.router.errors import Overloaded
from pdserve.router.line import FairLine, Pace
from pdserve.router.placement import WorkerLoad

WAITING_PER_WORKER = 32
"""Answers that may wait for their first token, for each worker that takes prompts."""
TOKENS_PER_WORKER = 16384
"""And their tokens; one answer may always wait."""
LONGEST_RETRY_S = 60
LOOK_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a router takes on. 0: no limit."""

    in_flight: int
    """Answers launched or in line."""
    waiting: int = 0
    """Answers without a first token, in line or at the workers, those of other routers included."""
    ttft_s: float = 0.0
    """Predicted time to the first token."""
    itl_s: float = 0.0
    """Predicted time between tokens beyond which nobody more is let in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request asks for."""

    answers: int = 1
    tokens: int = 0
    """Of its longest prompt; 0: not known yet."""
    key: str = ""
    """Requests with the same one share a turn."""
    priority: int = 0
    ttft_s: float = 0.0
    itl_s: float = 0.0
    """Its own targets, 0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known when a request comes."""

    in_flight: int
    waiting: int
    ttft_s: float | None
    """Predicted for this request; None: not known."""
    itl_s: float | None
    """Predicted at the least busy worker, with this request."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is answered 429."""

    reason: str
    """For metrics."""
    message: str
    retry_after_s: int


def decide(limits: Limits, demand: Demand, now: Situation) -> Refusal | None:
    """None: it may come in, or wait."""
    soon = _retry_after(now.ttft_s or 0.0)
    if now.in_flight + demand.answers > limits.in_flight:
        return Refusal(
            "max_queue",
            f"The router is busy with {now.in_flight} answers; at most {limits.in_flight} may be "
            "in flight (--max-queue).",
            soon,
        )
    if limits.waiting and now.waiting + demand.answers > limits.waiting:
        return Refusal(
            "max_waiting",
            f"{now.waiting} answers wait for their first token; at most {limits.waiting} may "
            "(--max-waiting).",
            soon,
        )
    for limit, name in ((limits.ttft_s, "--max-ttft-ms"), (demand.ttft_s, "x-slo-ttft-ms")):
        if limit and now.ttft_s is not None and now.ttft_s > limit:
            return Refusal(
                "ttft",
                f"The first token is predicted after {now.ttft_s * 1000:.0f} ms; the limit is "
                f"{limit * 1000:.7g} ms ({name}).",
                _retry_after(now.ttft_s - limit),
            )
    if demand.itl_s and now.itl_s is not None and now.itl_s > demand.itl_s:
        return Refusal(
            "itl",
            f"Tokens are predicted {now.itl_s * 1000:.1f} ms apart; the limit is "
            f"{demand.itl_s * 1000:.1f} ms (x-slo-itl-ms).",
            soon,
        )
    return None


def _retry_after(seconds: float) -> int:
    return max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A request in line."""

    demand: Demand
    called: asyncio.Future[bool]

    @property
    def tokens(self) -> int:
        return self.demand.tokens * self.demand.answers


class Admission:
    """One router's door. Event loop only."""

    def __init__(
        self, dispatcher: Dispatcher, limits: Limits, count_refused: Callable[[str], None]
    ) -> None:
        """`count_refused(reason)` is told of every refusal."""
        self._dispatcher = dispatcher
        self._limits = limits
        self._count_refused = count_refused
        self._line: FairLine[_Turn] = FairLine()
        self._pace = Pace()
        self._in_line = 0
        self._entering: set[_Turn] = set()
        """Called out of the line and not launched yet."""
        self._timer: asyncio.TimerHandle | None = None
        dispatcher.unheard.listen(self._let_in)

    @property
    def in_line(self) -> int:
        """Answers that wait for room."""
        return self._in_line

    def check(self, demand: Demand) -> None:
        """Raises Overloaded if the request cannot be taken on now."""
        limits, in_flight = self._limits, self._dispatcher.in_flight + self._in_line
        predicting = limits.ttft_s or demand.ttft_s or demand.itl_s or limits.waiting
        if not predicting and in_flight + demand.answers <= limits.in_flight:
            return
        refusal = decide(limits, demand, self._situation(demand, in_flight))
        if refusal is not None:
            self._count_refused(refusal.reason)
            raise Overloaded(f"{refusal.message} Try again later.", refusal.retry_after_s)

    def _situation(self, demand: Demand, in_flight: int) -> Situation:
        pool = self._dispatcher.pool
        workers = pool.snapshot()
        return Situation(
            in_flight=in_flight,
            waiting=self._in_line + max(len(self._dispatcher.unheard), pool.waiting),
            ttft_s=self._ttft_s(workers, demand.tokens),
            itl_s=self._itl_s(workers, demand.tokens, 1),
        )

    def _ttft_s(self, workers: Sequence[WorkerLoad], tokens: int) -> float | None:
        """Behind all who wait: at the least busy worker, or in line as fast as it moves."""
        predict, takers = self._dispatcher.predictor.prefill_s, _takers(workers)
        behind = self._pace.wait_s(time.monotonic(), len(self._line))
        in_line = self._line.tokens // max(1, len(takers))
        known = [
            seconds
            for worker in takers
            if (seconds := predict(worker.worker_id, worker.queued_tokens + in_line + tokens))
        ]
        return max(min(known), behind) if known else behind or None

    def _itl_s(self, workers: Sequence[WorkerLoad], tokens: int, more: int) -> float | None:
        """Between tokens of the least busy worker that decodes, with `more` requests."""
        predict = self._dispatcher.predictor.step_s
        known = [
            step
            for worker in workers
            if worker.role is not Role.PREFILL
            and (step := predict(worker.worker_id, worker.requests + more, tokens))
        ]
        return min(known, default=None)

    def _has_room(self) -> bool:
        """Whether one more may be launched now."""
        unheard = self._dispatcher.unheard
        count = len(unheard) + sum(turn.demand.answers for turn in self._entering)
        if not count and not self._dispatcher.in_flight:
            return True
        tokens = unheard.tokens + sum(turn.tokens for turn in self._entering)
        if count >= WAITING_PER_WORKER or tokens >= TOKENS_PER_WORKER:
            workers = len(_takers(self._dispatcher.pool.snapshot()))
            if count >= WAITING_PER_WORKER * workers or tokens >= TOKENS_PER_WORKER * workers:
                return not count
        return not self._too_slow()

    def _too_slow(self) -> bool:
        """One more, beside those on their way to a decode worker, would make tokens too slow."""
        if not self._limits.itl_s:
            return False
        workers = self._dispatcher.pool.snapshot()
        decoders = sum(worker.role is not Role.PREFILL for worker in workers)
        coming = sum(worker.requests for worker in workers if worker.role is Role.PREFILL)
        more = 1 + (coming + len(self._entering)) // max(1, decoders)
        step = self._itl_s(workers, 0, more)
        return step is not None and step > self._limits.itl_s

    async def wait(
        self,
        demand: Demand,
        timeout_s: float,
        until_gone: Callable[[], Coroutine[Any, Any, None]],
    ) -> bool:
        """Wait for room; who gets True launches at once, before anything else is awaited. False:
        the client has left, which is when `until_gone()` ends. Raises TimeoutError."""
        if not self._line and self._has_room():
            return True
        called: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        watcher = asyncio.create_task(until_gone())

        def left(_: asyncio.Task[None]) -> None:
            if not called.done():
                called.set_result(False)

        watcher.add_done_callback(left)
        turn = _Turn(demand, called)
        place = self._line.push(demand.key, demand.priority, max(1, turn.tokens), turn)
        self._in_line += demand.answers
        self._look_again()
        try:
            async with asyncio.timeout(timeout_s):
                return await called
        finally:
            watcher.cancel()
            self._in_line -= demand.answers
            if not self._line.remove(place):
                self._entering.discard(turn)
                if self._line:  # it may not be launched after all
                    asyncio.get_running_loop().call_soon(self._let_in)

    def _let_in(self) -> None:
        """Call as many out of the line as there is room for."""
        while self._line and self._has_room():
            turn = self._line.pop()
            if turn is not None:
                self._entering.add(turn)
                self._pace.passed(time.monotonic(), bool(self._line))
                if not turn.called.done():
                    turn.called.set_result(True)

    def _look_again(self) -> None:
        """Room may come from what other routers do, of which nobody tells."""
        if self._timer is None and self._line:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LOOK_AGAIN_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._let_in()
        self._look_again()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _takers(workers: Sequence[WorkerLoad]) -> list[WorkerLoad]:
    """Those that compute prompts."""
    prefills = [worker for worker in workers if worker.role is Role.PREFILL]
    return prefills or list(workers)
