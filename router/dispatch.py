"""The life of one answer over its legs.

                 growing ticket ┌──► EARLY ──first token──┐
    choose ─pair──► PREFILL ────┴─first token, ticket──► DECODE ──tokens … finish──► done
      │                │ worker lost, refused            │ lost, refused, blocks lost
      │                └──► place again                  └──► moved: prompt + tokens so far are
      └─colocated──► FULL ──tokens … finish──► done            computed by another worker
                         └ lost, refused ──► moved

Every leg that fails for a reason that another worker may not have is retried, at most MAX_MOVES
times without a token in between and MAX_MOVES_IN_ALL times in a life; tokens already delivered are
never drawn again: they travel with the submission, and the generator keyed by (seed, position) goes
on where it was. While no worker is there, the answer waits for one (`waiting.py`). An
EARLY leg fetches while the prompt is still being computed; if it ends before the first token comes,
nothing is lost.

All of this happens in callbacks on the event loop; sends never wait, so neither does any of this,
and an abort cannot be cancelled half way. What comes out is put into the request's `Mailbox`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import msgspec

from pdserve.protocol.blocks import pack_tokens, route_hashes
from pdserve.protocol.errors import ErrorCode, RequestError, WorkerError
from pdserve.protocol.events import FETCHED, RECOMPUTED
from pdserve.protocol.messages import LifeEvent, Output, Submit
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket
from pdserve.router.breaker import Pairs
from pdserve.router.chooser import Chooser, Need, Verdict
from pdserve.router.packed import PackedPrompt
from pdserve.router.placement import (
    FETCH,
    Candidate,
    Disaggregate,
    Policy,
    decode_options,
    first_options,
    usable,
)
from pdserve.router.predict import LegFacts, Predictor
from pdserve.router.unheard import Unheard
from pdserve.router.waiting import PATIENCE_S, WaitingRoom
from pdserve.router.workers import WorkerLink, WorkerPool, final_error

log = logging.getLogger(__name__)

MAX_MOVES = 4
"""Legs that may fail under one answer, one after the other and without a token, before it does."""
MAX_MOVES_IN_ALL = 12
"""And in its life: a request that kills its workers must not go through all of them."""

RETRYABLE = frozenset(
    {
        ErrorCode.OVERLOADED,
        ErrorCode.STALE_EPOCH,
        ErrorCode.KV_LOST,
        ErrorCode.DRAINING,
        ErrorCode.WORKER_LOST,
    }
)
"""Another worker may do better; everything else is the request's fate anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSpec:
    """One answer to generate."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    session: str = ""
    """Under the policy `session`, answers with the same one go to the same worker."""
    ttft_s: float = 0.0
    """Soon enough for the first token; 0: as soon as possible."""
    itl_s: float = 0.0
    """What the client can bear between two tokens; 0: anything."""
    priority: int = 0
    """Lower ones go first."""


class Mailbox:
    """Outputs of a request's answers, for the one task that serves its client.

    However many outputs a step brings, the task wakes up once.
    """

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[int, Output]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, output: Output) -> None:
        self._items.append((index, output))
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, Output]]:
        """Everything that has come, at least one thing unless `wake` was called."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items


@dataclass(slots=True, eq=False)
class AnswerLeg:
    """One submission to one worker. The link calls `receive` and `lost`."""

    answer: Answer
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


@dataclass(slots=True, eq=False)
class _Early:
    """A hand-over that began before its prompt was complete."""

    ticket: KVTicket
    tries: int = 0
    leg: AnswerLeg | None = None
    """None: it is being placed, or has ended badly."""
    successor: KVTicket | None = None
    """The ticket that came with the first token, if it is another one: it waits for the end of the
    leg, which has the same id."""


class Answer:
    """One answer on its way: at most one running leg, at most one decode leg that awaits the token
    of a running prefill leg (`_early`), at most one prefill leg whose blocks may still lie in its
    worker's outbox (`_held`)."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        base_id: str,
        index: int,
        spec: AnswerSpec,
        mailbox: Mailbox,
        deadline: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._base_id = base_id
        self._index = index
        self._spec = spec
        self._mailbox = mailbox
        self._deadline = deadline
        self._tokens: list[int] = []
        self._first_at = 0.0
        self._running: AnswerLeg | None = None
        self._held: AnswerLeg | None = None
        self._early: _Early | None = None
        self._avoid: set[str] = set()
        self._prompt = dispatcher.packed(spec)
        self._routes: list[bytes] = []
        self._moves = self._moves_in_all = 0
        self._attempts = 0
        self._prompt_logprobs_sent = spec.sampling.prompt_logprobs is None
        self.done = False
        self.legs: list[AnswerLeg] = []
        """Every leg there was, for those who ask for timings."""

    # from the request

    def start(self) -> None:
        """Send the first leg. Raises RequestError(NO_WORKER) if nobody can serve it."""
        if not self._try_to_place():
            raise RequestError(ErrorCode.NO_WORKER, self._dispatcher.nobody())

    def end(self) -> None:
        """The client has what it wanted, or is gone: abort whatever still goes on. Idempotent."""
        self.done = True
        self._dispatcher.waiting.leave(self)
        self._drop_early()
        self._dispatcher.unheard.discard(self)
        for leg in (self._running, self._held):
            if leg is not None:
                leg.link.abort(leg.request_id)
        self._running = self._held = None

    def fail(self, code: ErrorCode, message: str) -> None:
        """End with an error that the client sees."""
        if not self.done:
            self.end()
            error = WorkerError(code=code, message=message)
            self._mailbox.put(self._index, final_error(self._base_id, error))

    def learn_from(self, leg: AnswerLeg) -> None:
        """A leg has told what happened when."""
        told = {event.name for event in leg.events}
        if leg.source and told & {FETCHED, RECOMPUTED}:
            self._dispatcher.pairs.note(leg.source, leg.link.worker_id, RECOMPUTED not in told)
        self._dispatcher.predictor.learn(
            LegFacts(
                worker_id=leg.link.worker_id,
                length=leg.length,
                cached=leg.cached,
                drawn=leg.drawn,
                requests=leg.link.requests,
                events=leg.events,
                hand_over_s=self._hand_over_s(leg),
            )
        )

    def _hand_over_s(self, leg: AnswerLeg) -> float | None:
        """By how much the blocks came later than the first token, if they came."""
        for event in leg.events:
            if event.name == FETCHED and self._first_at:
                return max(0.0, leg.submitted_at + event.at_s - self._first_at)
        return None

    # placing

    def place(self) -> None:
        """Find a worker for what is left to do, or wait for one."""
        if not self.done and not self._try_to_place():
            self._dispatcher.waiting.enter(self)

    def nobody_came(self) -> None:
        self.fail(ErrorCode.NO_WORKER, self._dispatcher.nobody())

    def _try_to_place(self) -> bool:
        """Choose a worker and send it the next leg; False if there is nobody to choose from."""
        candidates = self._candidates()
        if candidates:
            self._choose(candidates, lambda verdict: self._send(verdict, None))
        return bool(candidates)

    def _candidates(self) -> list[Candidate]:
        dispatcher, spec = self._dispatcher, self._spec
        workers = dispatcher.pool.snapshot()
        if not self._tokens:
            length, predictor = len(spec.prompt_token_ids), dispatcher.predictor
            found = first_options(
                workers,
                self._avoid,
                dispatcher.disaggregate,
                functools.partial(predictor.price, length) if predictor.warm else None,
                spec.ttft_s * 1e6,
            )
            if found or not self._moves:
                return self._within_target(found)
        return self._within_target(decode_options(workers, avoid=self._avoid))

    def _within_target(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that decode count as full where the tokens of one more would come too slowly."""
        spec, predictor = self._spec, self._dispatcher.predictor
        if not spec.itl_s:
            return candidates
        length = len(spec.prompt_token_ids)
        return [
            one if one.hand_off else one.with_most_requests(
                predictor.most_requests(one.worker.worker_id, spec.itl_s, length)
            )
            for one in candidates
        ]  # fmt: skip

    def _choose(
        self,
        candidates: Sequence[Candidate],
        done: Callable[[Verdict], None],
        fetches: bool = False,
    ) -> None:
        length = len(self._spec.prompt_token_ids) + len(self._tokens)
        need = Need(length, self._route_hashes, self._spec.session, fetches)
        self._dispatcher.chooser.pick(candidates, need, done)

    def _route_hashes(self) -> Sequence[bytes]:
        spec = self._spec
        self._routes = self._routes or self._prompt.routes
        if self._tokens:
            packed = self._prompt.packed + pack_tokens(self._tokens)
            self._routes = route_hashes(packed, spec.cache_salt, self._routes)
        return self._routes

    def _send(self, verdict: Verdict, ticket: KVTicket | None) -> None:
        """Carry a choice out; it may have come late."""
        if self.done or self._running is not None:
            return
        worker_id = verdict.candidate.worker.worker_id
        link = self._dispatcher.pool.link(worker_id)
        if ticket is not None:
            kind = "decode"
        elif verdict.candidate.hand_off:
            kind = "prefill"
        else:
            kind = "moved" if self._tokens or self._moves else "full"
        try:
            if link is None:
                raise RequestError(ErrorCode.WORKER_LOST, f"{worker_id} has just left.")
            self._running = self._submit(link, kind, ticket, verdict)
        except RequestError:
            self._avoid.add(worker_id)
            if link is not None:
                link.listed = False
            if ticket is not None:
                self._hand_over(ticket)
            else:
                self.place()

    def _submit(
        self, link: WorkerLink, kind: str, ticket: KVTicket | None, verdict: Verdict
    ) -> AnswerLeg:
        """One more leg. Raises RequestError(WORKER_LOST)."""
        now = time.monotonic()
        if ticket is None:
            self._attempts += 1
        sampling = self._spec.sampling
        if self._prompt_logprobs_sent and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        request_id = f"{self._base_id}-{self._index}-{self._attempts}"
        length = len(self._spec.prompt_token_ids) + len(self._tokens)
        source = ticket.source if ticket is not None else ""
        leg = AnswerLeg(self, link, request_id, kind, now, verdict, length=length, source=source)
        leg.early = ticket is not None and ticket.growing
        message = Submit(
            request_id=leg.request_id,
            epoch=link.epoch,
            prompt=self._prompt.packed,
            output_token_ids=list(self._tokens),
            sampling=sampling,
            hand_off=kind == "prefill",
            ticket=ticket,
            timeout_s=max(0.001, self._deadline - now),
            cache_salt=self._spec.cache_salt,
            priority=self._spec.priority,
        )
        link.submit(message, leg)
        self._dispatcher.pairs.sent(source, link.worker_id)
        self.legs.append(leg)
        return leg

    # from the workers

    def on_output(self, leg: AnswerLeg, output: Output) -> None:
        if output.error is not None:
            self.on_failure(leg, output.error)
            return
        if self.done or leg is not self._running:
            return
        if output.ticket is not None and output.ticket.growing:
            self._early = _Early(output.ticket)
            self._place_early(self._early)
            return
        if leg.early:
            self._drop_held()  # it may have given the ticket up before that was complete
        elif leg.kind == "decode":
            self._held = None  # it has tokens, so it has the blocks
        if not self._tokens:
            self._first_at = time.monotonic()
            self._dispatcher.unheard.discard(self)
        self._tokens.extend(output.token_ids)
        self._moves = 0
        if output.prompt_logprobs is not None:
            self._prompt_logprobs_sent = True
        if output.finish_reason is not None:
            self.done = True
            self._drop_early()
            self._running = self._held = None
        self._mailbox.put(self._index, output)
        if output.ticket is not None and not self.done:
            self._running, self._held = None, leg
            if not self._go_on_early(output.ticket):
                self._hand_over(output.ticket)

    def _place_early(self, early: _Early) -> None:
        """Choose who shall fetch while the prompt is still being computed; maybe nobody."""
        assert self._running is not None
        candidates = self._readers(early.ticket, self._running)
        if candidates and early.tries < MAX_MOVES:
            early.tries += 1
            self._choose(candidates, lambda verdict: self._send_early(verdict, early), fetches=True)

    def _send_early(self, verdict: Verdict, early: _Early) -> None:
        """Carry that choice out, unless the first token was quicker."""
        if self._early is not early:
            return
        worker_id = verdict.candidate.worker.worker_id
        link = self._dispatcher.pool.link(worker_id)
        if link is None:
            return
        try:
            early.leg = self._submit(link, "decode", early.ticket, verdict)
        except RequestError:
            self._avoid.add(worker_id)
            link.listed = False
            self._place_early(early)

    def _go_on_early(self, ticket: KVTicket) -> bool:
        """The first token and its ticket are here: whether an early leg takes over."""
        early = self._early
        if early is None or early.leg is None:
            self._early = None
            return False
        if early.ticket.ticket_id != ticket.ticket_id:
            early.successor = ticket
            return True
        self._early = None
        try:
            early.leg.link.resume(early.leg.request_id, list(self._tokens))
        except RequestError:
            return False
        self._running = early.leg
        return True

    def _early_failed(self, early: _Early, leg: AnswerLeg, error: WorkerError) -> None:
        """Nothing is lost but time: another worker may fetch early, or one does it later."""
        leg.error, early.leg = error, None
        log.info("%s: fetching early on %s ended (%s)", leg.request_id, leg.link.worker_id, error)
        elsewhere = error.code in RETRYABLE and error.code is not ErrorCode.KV_LOST
        if elsewhere:
            self._avoid.add(leg.link.worker_id)
        if early.successor is not None:
            self._early = None
            self._hand_over(early.successor)
        elif elsewhere:
            self._place_early(early)

    def _drop_early(self) -> None:
        """Nobody needs the early leg any more."""
        early, self._early = self._early, None
        if early is not None and early.leg is not None:
            early.leg.link.abort(early.leg.request_id)

    def _hand_over(self, ticket: KVTicket) -> None:
        """From prefill to decode, on fresh numbers."""
        assert self._held is not None
        candidates = self._readers(ticket, self._held)
        if candidates:
            self._choose(candidates, lambda verdict: self._send(verdict, ticket), fetches=True)
        else:
            self._drop_held()
            self.place()

    def _readers(self, ticket: KVTicket, leg: AnswerLeg) -> list[Candidate]:
        """Who may fetch the blocks that the leg's worker has."""
        workers = self._dispatcher.pool.snapshot()
        avoid = self._avoid | self._dispatcher.pairs.shunned(ticket.source)
        return self._within_target(decode_options(workers, leg.link.fingerprint, avoid, FETCH))

    def _drop_held(self) -> None:
        """The blocks in the outbox are of no use any more."""
        if self._held is not None:
            self._held.link.abort(self._held.request_id)
            self._held = None

    def on_failure(self, leg: AnswerLeg, error: WorkerError) -> None:
        """A leg ended badly: go on elsewhere if that can help."""
        if self.done:
            return
        if self._early is not None and leg is self._early.leg:
            self._early_failed(self._early, leg, error)
            return
        if leg is not self._running:
            return
        leg.error = error
        self._running = None
        self._drop_early()
        self._drop_held()
        spent = self._moves >= MAX_MOVES or self._moves_in_all >= MAX_MOVES_IN_ALL
        if error.code not in RETRYABLE or spent:
            self.fail(error.code, error.message)
            return
        self._moves += 1
        self._moves_in_all += 1
        self._dispatcher.count_move(leg.kind, error.code)
        log.warning(
            "%s: the %s leg on %s ended (%s); going on elsewhere after %d tokens",
            leg.request_id,
            leg.kind,
            leg.link.worker_id,
            error.message,
            len(self._tokens),
        )
        if error.code is not ErrorCode.KV_LOST:
            self._avoid.add(leg.link.worker_id)
        if error.code is ErrorCode.OVERLOADED and not self._others(leg.link.worker_id):
            self.fail(error.code, error.message)
            return
        self.place()

    def _others(self, worker_id: str) -> bool:
        workers = self._dispatcher.pool.snapshot()
        others = [load for load in workers if load.worker_id != worker_id]
        return usable(others, self._dispatcher.disaggregate)


@dataclass(slots=True, eq=False)
class Flight:
    """All answers of one HTTP request. Use as a context: leaving it aborts what still runs."""

    answers: list[Answer]
    mailbox: Mailbox
    open: int
    """Answers that have not ended."""
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
        self.chooser = chooser or Chooser(None, Policy.LEAST_LOAD, pool.epoch, random.Random())
        self.disaggregate = disaggregate
        self.predictor = Predictor()
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

    def launch(self, request_id: str, specs: Sequence[AnswerSpec]) -> Flight:
        """Send the first legs of all answers. Raises RequestError(NO_WORKER); then none is left.

        `request_id` need not be unique: what workers get is.
        """
        mailbox = Mailbox()
        base_id = f"{request_id}-{secrets.token_hex(4)}"
        deadline = time.monotonic() + self._timeout_s
        answers = [
            Answer(self, base_id, index, spec, mailbox, deadline)
            for index, spec in enumerate(specs)
        ]
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, self._expire, answers)
        self.in_flight += len(answers)
        for answer, spec in zip(answers, specs, strict=True):
            self.unheard.add(answer, len(spec.prompt_token_ids))
        flight = Flight(answers, mailbox, len(answers), timer, lambda: self._land(len(answers)))
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
        roles = sorted(link.role for link in self.pool.links if link.placeable)
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
