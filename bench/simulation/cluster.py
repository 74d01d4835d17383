"""A simulated cluster: arrivals, a router's choices, workers, and blocks that travel."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from pdserve.bench.simulation.profile import Profile, StepTimes
from pdserve.bench.simulation.texts import Prompt
from pdserve.bench.simulation.worker import Clock, Happened, Simulated, Worker, request_of
from pdserve.bench.topology import Topology
from pdserve.cluster.placement import LAST_LOOKS
from pdserve.cluster.records import Role
from pdserve.engine.scheduler import FetchOrder
from pdserve.protocol.events import FETCH_STARTED, FETCHED, FINISHED, FIRST_TOKEN, SCHEDULED
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.router.candidates import CandidateSet
from pdserve.router.chooser import near
from pdserve.router.placement import FETCH, Candidate, by_cost, decode_options, first_options

LOOK_S = 10.0
"""Simulated seconds between two entries of the logbook."""
SHOWN = 256
"""The progress is shown after so many arrivals."""
PHASES = ("queue", "prefill", "transfer", "wait", "decode")
"""As in bench.phases, but that the router's share is a constant of the profile."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    number: int
    """Among all, from 0."""
    at: float
    prompt: Prompt
    output_len: int
    follows: int | None = None
    """The request before it in its conversation: it comes `think_s` after that is answered, and
    `at` means nothing."""
    think_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What came of a run. One entry per request, by number; seconds; NaN: it was refused."""

    topology: str
    ttft: array[float] = field(default_factory=lambda: array("d"))
    tpot: array[float] = field(default_factory=lambda: array("d"))
    e2e: array[float] = field(default_factory=lambda: array("d"))
    phases: dict[str, float] = field(default_factory=dict)
    """Mean seconds of a request."""
    tokens: int = 0
    """Of answers."""
    prompt_tokens: int = 0
    computed: int = 0
    """Of the prompts' tokens; the others were found in caches."""
    span_s: float = 0.0
    """From the first arrival to the last token."""
    busy: dict[str, float] = field(default_factory=dict)
    """Role → share of the time in which its workers computed."""
    preemptions: int = 0
    refused: int = 0
    """Requests that no worker has room for."""
    logbook: list[tuple[float, int, int]] = field(default_factory=list)
    """(second, requests that wait for a first token, requests that decode), every LOOK_S."""


@dataclass(slots=True)
class _Machine:
    """Workers that slow each other down while they compute."""

    workers: list[Worker]
    paces: Sequence[StepTimes]
    """By how many others compute."""
    busy: set[Worker] = field(default_factory=set)


@dataclass(slots=True)
class _Early:
    """A leg that fetches while its prompt is computed."""

    worker: Worker
    request: Simulated
    order: FetchOrder | None = None
    began: float = 0.0


@dataclass(slots=True)
class _Story:
    """One request on its way."""

    arrival: Arrival
    came: float
    source: Worker
    """Computes the prompt."""
    first: Simulated
    """Its leg there."""
    early: _Early | None = None


class Simulation:
    """One run. Use once."""

    def __init__(
        self, profile: Profile, topology: Topology, *, seed: int = 0, policy: str = "prefix"
    ) -> None:
        """`policy`: prefix or least-load, see router.placement."""
        self._profile, self._topology = profile, topology
        self._clock = Clock()
        self._rng = random.Random(seed)
        self._prefixes = policy == "prefix"
        fingerprint = LayoutFingerprint(
            model=profile.model, weights="", dtype=profile.dtype, num_layers=1, num_kv_heads=1,
            head_dim=1, block_size=profile.block_size,
        )  # fmt: skip
        roles = [Role.PREFILL] * topology.prefill + [Role.DECODE] * topology.decode
        roles += [Role.COLOCATED] * topology.colocated
        self.workers = [
            Worker(index, role, profile, fingerprint, self._clock, self._cut)
            for index, role in enumerate(roles)
        ]
        self._named = {worker.name: worker for worker in self.workers}
        paces = profile.paces()
        self._machines: dict[Worker, _Machine] = {}
        """Those that come one after the other share one, the last may have fewer."""
        for start in range(0, len(self.workers), profile.workers):
            machine = _Machine(self.workers[start : start + profile.workers], paces)
            self._machines.update(dict.fromkeys(machine.workers, machine))
        self._jitter = random.Random(seed)
        self._last: dict[tuple[bool, bytes], tuple[str, int]] = {}
        """Who was chosen to compute, or to fetch, the prompt with this last route hash."""
        self._stories: dict[str, _Story] = {}
        self._following: dict[int, Arrival] = {}
        """Later turns of conversations, by the number of the request before."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting = 0
        self._outcome = Outcome(str(topology))
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._longest = min(profile.kv_tokens, profile.max_model_len)
        self._mixed = bool(topology.colocated and topology.prefill)
        self._take_candidates()

    def _take_candidates(self) -> None:
        """Whom a router considers. Only where colocated workers stand beside pairs does that
        depend on their load."""
        loads = [worker.load() for worker in self.workers]
        self._first = CandidateSet(first_options(loads))
        self._second = CandidateSet(decode_options(loads, price=FETCH))

    # the run

    def run(
        self,
        arrivals: Iterable[Arrival],
        progress: Callable[[int, int], None] = lambda done, running: None,
    ) -> Outcome:
        """Serve them all. `arrivals`: ascending in time, but for those that follow others."""
        outcome, events, clock = self._outcome, self._events, self._clock
        coming = iter(arrivals)
        following = self._next(coming)
        looked = 0.0
        while events or following is not None:
            if following is not None and (not events or following.at <= events[0][0]):
                clock.now = following.at
                self._arrive(following)
                following = self._next(coming)
                if len(outcome.ttft) % SHOWN == 0:
                    progress(len(outcome.ttft) - len(self._stories), len(self._stories))
            else:
                clock.now, _, act = heapq.heappop(events)
                act()
            if clock.now >= looked:
                busy = len(self._stories) - self._waiting
                outcome.logbook.append((clock.now, self._waiting, busy))
                looked = clock.now + LOOK_S
        assert not self._stories, "Every request has been answered."
        self.check()
        return self._close(len(outcome.ttft) - outcome.refused)

    def _next(self, coming: Iterator[Arrival]) -> Arrival | None:
        """The next one that does not follow another."""
        for arrival in coming:
            if arrival.follows is None:
                return arrival
            self._following[arrival.follows] = arrival
        return None

    def _close(self, number: int) -> Outcome:
        outcome, span = self._outcome, self._clock.now
        outcome.span_s = span
        outcome.phases = {name: spent / max(1, number) for name, spent in self._spent.items()}
        outcome.computed = sum(worker.tally.computed for worker in self.workers)
        outcome.preemptions = sum(worker.scheduler.preemptions for worker in self.workers)
        for role in Role:
            mine = [worker.tally.busy_s for worker in self.workers if worker.role is role]
            if mine and span:
                outcome.busy[str(role)] = sum(mine) / len(mine) / span
        return outcome

    def check(self) -> None:
        """Every block has its owner. Raises IntegrityError."""
        for worker in self.workers:
            tables = [request.block_table for request in worker.scheduler]
            worker.pool.check_integrity(tables, worker.outgoing.blocks)

    def _at(self, second: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (second, next(self._order), act))

    # workers

    def _wake(self, worker: Worker) -> None:
        """Something has come for it."""
        if worker.idle:
            self._begin(worker)
        elif worker.interrupt():
            self._expect(worker)

    def _begin(self, worker: Worker) -> None:
        for order in worker.begin():
            self._fetch(worker, order)
        self._share(worker)
        if not worker.idle:
            self._expect(worker)

    def _share(self, worker: Worker) -> None:
        """If it has just begun or ceased to compute, the others of its machine notice."""
        machine = self._machines[worker]
        busy = machine.busy
        if (worker in busy) is not worker.idle:
            return
        (busy.discard if worker.idle else busy.add)(worker)
        for other in machine.workers:
            if other is not worker:
                other.turn(machine.paces[len(busy - {other})])
                if not other.idle:
                    self._expect(other)

    def _expect(self, worker: Worker) -> None:
        due = worker.ends_at

        def over() -> None:
            if worker.ends_at == due:  # it was not cut short meanwhile
                for happened in worker.finish():
                    self._take(worker, happened)
                self._begin(worker)

        self._at(due, over)

    def _post(self, worker: Worker, command: Callable[[], None]) -> None:
        worker.post(command)
        self._wake(worker)

    def _submit(self, worker: Worker, request: Simulated) -> None:
        worker.submit(request)
        self._wake(worker)

    # requests

    def _arrive(self, arrival: Arrival) -> None:
        outcome, prompt = self._outcome, arrival.prompt
        missing = arrival.number + 1 - len(outcome.ttft)
        for column in (outcome.ttft, outcome.tpot, outcome.e2e):
            column.extend([math.nan] * missing)
        if prompt.length + arrival.output_len > self._longest:
            outcome.refused += 1
            return
        outcome.prompt_tokens += prompt.length
        self._waiting += 1
        if self._mixed:
            self._take_candidates()
        chosen = self._choose(self._first, prompt)
        worker = self._named[chosen.worker.worker_id]
        request = request_of(
            prompt, arrival.output_len, arrival.number, self._clock, hand_off=chosen.hand_off
        )
        self._stories[request.request_id] = _Story(arrival, self._clock.now, worker, request)
        self._submit(worker, request)

    def _choose(self, among: CandidateSet, prompt: Prompt) -> Candidate:
        routes, held = (prompt.routes, prompt.held) if self._prefixes else ((), ())
        few, _ = among.asked(near(routes, self._rng.getrandbits(30)), self._rng)
        large = bool(routes) and len(few) < len(among)
        if large:
            last = self._chosen_last(among, routes)
            few = [*few, *(one for one in last if not any(one is other for other in few))]
        found = [self._named[one.worker.worker_id].candidate(one, held) for one in few]
        index = by_cost(found, prompt.length, self._rng.getrandbits(30))
        assert index is not None
        if large:
            worker = few[index].worker
            self._last[among is self._first, routes[-1]] = worker.worker_id, worker.epoch
        return found[index]

    def _chosen_last(self, among: CandidateSet, routes: Sequence[bytes]) -> list[Candidate]:
        """Who was chosen for the longest known beginning of a prompt."""
        for route in reversed(routes[-LAST_LOOKS:]):
            known = self._last.get((among is self._first, route))
            if known is not None:
                found = among.find(*known)
                return [found] if found is not None else []
        return []

    def _take(self, worker: Worker, happened: Happened) -> None:
        """What a step brought for a request."""
        request, ticket = happened.request, happened.ticket
        story = self._stories[request.request_id]
        if happened.first and request is story.first:
            self._waiting -= 1
            spent = self._clock.now - story.came + self._profile.front_s
            self._outcome.ttft[story.arrival.number] = spent
        if happened.done:
            self._end(story, request)
        elif ticket is not None and ticket.growing:
            self._hand_early(story, ticket)
        elif ticket is not None:
            self._hand_over(story, ticket)

    def _end(self, story: _Story, last: Simulated) -> None:
        outcome, now = self._outcome, self._clock.now
        count, first_at = story.arrival.output_len, story.first.at[FIRST_TOKEN]
        steps_s = (now - first_at) * math.exp(self._jitter.gauss(0.0, self._profile.jitter))
        outcome.tpot[story.arrival.number] = steps_s / (count - 1) if count > 1 else 0.0
        outcome.e2e[story.arrival.number] = first_at + steps_s - story.came + self._profile.front_s
        outcome.tokens += count
        for name, spent in phases(story.came, story.first.at, last.at).items():
            self._spent[name] += spent
        del self._stories[last.request_id]
        following = self._following.pop(story.arrival.number, None)
        if following is not None:
            self._at(now + following.think_s, lambda: self._arrive(following))

    # hand-overs

    def _reader(self, story: _Story, ticket: KVTicket) -> tuple[Worker, Simulated]:
        arrival = story.arrival
        chosen = self._choose(self._second, arrival.prompt)
        request = request_of(
            arrival.prompt, arrival.output_len, story.arrival.number, self._clock,
            ticket=ticket, drawn=0 if ticket.growing else 1,
        )  # fmt: skip
        return self._named[chosen.worker.worker_id], request

    def _hand_early(self, story: _Story, ticket: KVTicket) -> None:
        """Half of a prompt is there: somebody may begin to fetch."""
        worker, request = self._reader(story, ticket)
        story.early = _Early(worker, request)
        self._submit(worker, request)

    def _hand_over(self, story: _Story, ticket: KVTicket) -> None:
        """The prompt is there and its first token drawn."""
        early = story.early
        if early is None:
            worker, request = self._reader(story, ticket)
            self._submit(worker, request)
            return
        offer = story.source.outbox.offers[ticket.request_id]
        if early.order is not None:
            size = self._profile.block_size
            all_of_it = early.began + self._profile.transfer_s(len(early.order.wanted) * size)
            rest = self._clock.now + self._profile.transfer_s(offer.last * size)
            self._arrives(max(all_of_it, rest), early.worker, early.request)
        self._post(early.worker, lambda: early.worker.resume(early.request))

    def _fetch(self, worker: Worker, order: FetchOrder) -> None:
        """A worker has room and wants the blocks."""
        request = cast(Simulated, order.request)
        story = self._stories[request.request_id]
        early = story.early
        if early is not None and early.request is request and request.awaits_token:
            early.order, early.began = order, self._clock.now
            return
        took = self._profile.transfer_s(len(order.wanted) * self._profile.block_size)
        self._arrives(self._clock.now + took, worker, request)

    def _arrives(self, at: float, worker: Worker, request: Simulated) -> None:
        source, ticket = self._stories[request.request_id].source, request.ticket
        assert ticket is not None

        def over() -> None:
            source.outbox.forget(request.request_id)
            self._post(source, lambda: source.outgoing.returned(ticket.ticket_id))
            self._post(worker, lambda: worker.fetched(request))

        self._at(at, over)

    def _cut(self, request_id: str) -> None:
        """A growing ticket has ended because its request was preempted: who fetches gives up."""
        story = self._stories[request_id]
        early, story.early = story.early, None
        if early is not None:
            self._post(early.worker, lambda: early.worker.drop(early.request))


def phases(came: float, first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
    """Seconds per phase of a request that came at `came`, by the events of its legs (the same one
    twice, if it stayed)."""
    found = {
        "queue": first[SCHEDULED] - came,
        "prefill": first[FIRST_TOKEN] - first[SCHEDULED],
    }
    drawn = first[FIRST_TOKEN]
    if first is not last:
        begun = max(drawn, last[FETCH_STARTED])
        there = max(drawn, last[FETCHED])
        found["queue"] += begun - drawn
        found["transfer"] = there - begun
        found["wait"] = last[FIRST_TOKEN] - there
        drawn = last[FIRST_TOKEN]
    found["decode"] = last[FINISHED] - drawn
    return found
