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

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from pdserve.protocol.blocks import pack_tokens, route_hashes
from pdserve.protocol.errors import ErrorCode, RequestError, WorkerError
from pdserve.protocol.events import FETCHED, RECOMPUTED
from pdserve.protocol.messages import Output, Submit
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket
from pdserve.router.candidates import CandidateSet
from pdserve.router.chooser import Need, Verdict
from pdserve.router.early import Early
from pdserve.router.leg import AnswerLeg
from pdserve.router.link import WorkerLink, final_error
from pdserve.router.mailbox import Mailbox
from pdserve.router.placement import Candidate, usable
from pdserve.router.predict import LegFacts

if TYPE_CHECKING:
    from pdserve.router.dispatch import Dispatcher

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
        self._handed_at = 0.0
        """When the token came with which a decode leg begins."""
        self._running: AnswerLeg | None = None
        self._held: AnswerLeg | None = None
        self._early: Early | None = None
        self._avoid: set[str] = set()
        self._prompt = dispatcher.packed(spec)
        self._routes: list[bytes] = []
        self._moves = self._moves_in_all = 0
        self._attempts = 0
        self._prompt_logprobs_sent = spec.sampling.prompt_logprobs is None
        self.done = False
        self.legs: list[AnswerLeg] = []
        """Every leg there was, for those who ask for timings."""

    @property
    def held_by(self) -> list[AnswerLeg]:
        """The legs that workers have now."""
        early = self._early.leg if self._early is not None else None
        return [leg for leg in (self._held, self._running, early) if leg is not None]

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
        """By how much the blocks came later than the token, if they came."""
        for event in leg.events:
            if event.name == FETCHED and self._handed_at:
                return max(0.0, leg.submitted_at + event.at_s - self._handed_at)
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

    def _candidates(self) -> CandidateSet:
        candidates = self._dispatcher.candidates
        if not self._tokens:
            found = candidates.for_prompt(self._avoid, self._spec.ttft_s)
            if found or not self._moves:
                return self._within_target(found)
        return self._within_target(candidates.for_rest(self._avoid))

    def _within_target(self, found: CandidateSet) -> CandidateSet:
        """Those that decode count as full where the tokens of one more would come too slowly."""
        spec, predictor = self._spec, self._dispatcher.predictor
        if not spec.itl_s:
            return found
        length = len(spec.prompt_token_ids)

        def bounded(one: Candidate) -> Candidate:
            worker_id = one.worker.worker_id
            most = predictor.most_requests(worker_id, spec.itl_s, length)
            return one if one.hand_off else one.with_most_requests(most)

        return CandidateSet([bounded(one) for one in found.candidates])

    def _choose(
        self,
        candidates: CandidateSet,
        done: Callable[[Verdict], None],
        fetches: bool = False,
    ) -> None:
        def chosen(verdict: Verdict) -> None:
            worker_id = verdict.candidate.worker.worker_id
            self._dispatcher.pool.reach(worker_id, lambda: done(verdict))

        length = len(self._spec.prompt_token_ids) + len(self._tokens)
        need = Need(length, self._route_hashes, self._spec.session, fetches)
        self._dispatcher.chooser.pick(candidates, need, chosen)

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
                link.withdraw()
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
            if not self._tokens:  # early legs have no tokens of their own
                self._begin_early(output.ticket, leg)
            return
        if leg.early:
            self._drop_held()  # it may have given the ticket up before that was complete
        elif leg.kind == "decode":
            self._held = None  # it has tokens, so it has the blocks
        if not self._tokens:
            self._dispatcher.unheard.discard(self)
        if leg.kind == "prefill":
            self._handed_at = time.monotonic()
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

    def _begin_early(self, ticket: KVTicket, leg: AnswerLeg) -> None:
        """Let somebody fetch while the leg still computes the prompt."""
        self._early = Early(
            ticket,
            readers=lambda: self._readers(ticket, leg),
            choose=lambda readers, done: self._choose(readers, done, fetches=True),
            submit=self._submit_early,
        )
        self._early.place()

    def _submit_early(self, verdict: Verdict, ticket: KVTicket) -> AnswerLeg | None:
        """A leg that awaits its first token; None if its worker has just left."""
        worker_id = verdict.candidate.worker.worker_id
        link = self._dispatcher.pool.link(worker_id)
        if link is not None:
            try:
                return self._submit(link, "decode", ticket, verdict)
            except RequestError:
                link.withdraw()
        self._avoid.add(worker_id)
        return None

    def _go_on_early(self, ticket: KVTicket) -> bool:
        """The first token and its ticket are here: whether an early leg takes over."""
        early = self._early
        if early is None or not early.fetches(ticket):
            self._drop_early()
            return False
        self._early = None
        self._running = early.resume(self._tokens)
        return self._running is not None

    def _early_failed(self, early: Early, leg: AnswerLeg, error: WorkerError) -> None:
        leg.error = error
        log.info("%s: fetching early on %s ended (%s)", leg.request_id, leg.link.worker_id, error)
        elsewhere = error.code in RETRYABLE and error.code is not ErrorCode.KV_LOST
        if elsewhere:
            self._avoid.add(leg.link.worker_id)
        early.ended(elsewhere)

    def _drop_early(self) -> None:
        """Nobody needs the early leg any more."""
        early, self._early = self._early, None
        if early is not None:
            early.drop()

    def _hand_over(self, ticket: KVTicket) -> None:
        """From prefill to decode, on fresh numbers."""
        assert self._held is not None
        candidates = self._readers(ticket, self._held)
        if candidates:
            self._choose(candidates, lambda verdict: self._send(verdict, ticket), fetches=True)
        else:
            self._drop_held()
            self.place()

    def _readers(self, ticket: KVTicket, leg: AnswerLeg) -> CandidateSet:
        """Who may fetch the blocks that the leg's worker has."""
        avoid = self._avoid | self._dispatcher.pairs.shunned(ticket.source)
        found = self._dispatcher.candidates.for_blocks(leg.link.fingerprint, avoid)
        return self._within_target(found)

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
        if leg.source:
            leg.link.abort(leg.request_id)  # what failed may be an early leg of the same id
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
