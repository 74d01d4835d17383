"""One simulated worker: the engine's loop over simulated time, with its scheduler, its block pool
and its half of the outbox.

    submit, resume, fetched, returned (commands, taken between steps)
                 │
                 ▼
    begin: plan → fetches to start, time of the step ──time──► finish: apply → what came of it

A step of single tokens is followed by equal ones until somebody is done or something arrives. Such
a row of steps is one event; whatever arrives ends it after the step that is being computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec

from pdserve.bench.simulation.profile import Profile, StepTimes
from pdserve.bench.simulation.row import Content, Row
from pdserve.bench.simulation.texts import ROOT, Prompt, Tokens
from pdserve.cluster.records import Role
from pdserve.engine.blocks import BlockPool
from pdserve.engine.outgoing import Outgoing
from pdserve.engine.ports import Chunk
from pdserve.engine.request import Request, State
from pdserve.engine.scheduler import FetchOrder, Limits, Plan, Scheduler
from pdserve.protocol.events import FINISHED, FIRST_TOKEN
from pdserve.protocol.sampling import SamplingParams
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport
from pdserve.router.placement import COMPUTE, FETCH, Candidate, WorkerLoad

FOREVER = math.inf
LEASE_S = 30.0


@dataclass(slots=True)
class Clock:
    now: float = 0.0


class Simulated(Request):
    """A request whose events happen in simulated time."""

    __slots__ = ("at", "clock")

    clock: Clock
    at: dict[str, float]
    """Event → when it first happened."""

    def mark(self, name: str) -> None:
        self.at.setdefault(name, self.clock.now)


@functools.lru_cache(maxsize=8192)
def _sampling(output_len: int) -> SamplingParams:
    return SamplingParams(seed=0, max_tokens=output_len, ignore_eos=True, temperature=0.0)


def request_of(
    prompt: Prompt, output_len: int, number: int, clock: Clock, *,
    hand_off: bool = False, ticket: KVTicket | None = None, drawn: int = 0,
) -> Simulated:  # fmt: skip
    """A leg of request `number`, `drawn` tokens of whose answer are there already."""
    found = Simulated.__new__(Simulated)
    found.clock, found.at = clock, {}
    Simulated.__init__(
        found,
        request_id=str(number),
        token_ids=cast("list[int]", Tokens(prompt, number, drawn)),
        prompt_len=prompt.length,
        sampling=_sampling(output_len),
        deadline=FOREVER,
        root=ROOT,
        hand_off=hand_off,
        ticket=ticket,
        awaits_token=ticket is not None and ticket.growing,
        hashes=list(prompt.hashes),
        routes=list(prompt.routes),
        received=clock.now,
    )
    return found


@dataclass(slots=True)
class Offer:
    """What of a ticket's prompt is there, for whoever fetches it."""

    ticket: KVTicket
    last: int = 0
    """Blocks that came with the last step."""


class Outbox:
    """Stands for the transfer's source (engine.ports.Exporter): tickets without bytes. Blocks leave
    chunk by chunk, not layer by layer."""

    slices = 1

    def __init__(
        self, worker_id: str, fingerprint: LayoutFingerprint, on_cut: Callable[[str], None]
    ) -> None:
        """`on_cut(request)`: a growing ticket has ended, nobody may read its blocks any more."""
        self._worker_id, self._fingerprint, self._on_cut = worker_id, fingerprint, on_cut
        self._minted = 0
        self.offers: dict[str, Offer] = {}
        """By request."""

    def _mint(
        self, request_id: str, num_tokens: int, names: Sequence[bytes], growing: bool
    ) -> Offer:
        self._minted += 1
        ticket = KVTicket(
            ticket_id=f"{self._worker_id}/{self._minted}",
            request_id=request_id,
            source=self._worker_id,
            epoch=1,
            host="",
            port=1,
            transports=("shm",),
            fingerprint=self._fingerprint,
            num_tokens=num_tokens,
            num_blocks=-(-num_tokens // self._fingerprint.block_size),
            block_hashes=tuple(names),
            lease_s=LEASE_S,
            growing=growing,
        )
        self.offers[request_id] = offer = Offer(ticket)
        return offer

    def offer(
        self,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        block_hashes: Sequence[bytes],
    ) -> KVTicket:
        return self._mint(request_id, num_tokens, block_hashes, growing=False).ticket

    def open(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        *,
        sliced: bool = False,
    ) -> KVTicket:
        return self._mint(request_id, num_tokens, block_hashes, growing=True).ticket

    def extend(self, request_id: str, block_ids: Sequence[int]) -> None:
        self.offers[request_id].last = len(block_ids)

    def seal(self, request_id: str, block_ids: Sequence[int]) -> KVTicket:
        self.extend(request_id, block_ids)
        return msgspec.structs.replace(self.offers[request_id].ticket, growing=False)

    def cut(self, request_id: str) -> bool:
        self.forget(request_id)
        self._on_cut(request_id)
        return True  # simulated readers stop at once

    def forget(self, request_id: str) -> None:
        """The ticket has been used, or has ended."""
        del self.offers[request_id]

    def advance(
        self,
        ticket_id: str,
        block_ids: Sequence[int],
        slices: int,
        computed: Callable[[], None] | None = None,
    ) -> None:
        raise AssertionError("No chunk goes by layers where there is one slice.")

    def withdraw(self, request_id: str) -> None:
        raise AssertionError("Nobody leaves in a simulation.")


@dataclass(slots=True)
class Happened:
    """What a step brought for one request."""

    request: Simulated
    first: bool = False
    """Its first token of this leg."""
    done: bool = False
    ticket: KVTicket | None = None
    """Growing: it is still being computed. Else it has left this worker."""


@dataclass(slots=True)
class Tally:
    busy_s: float = 0.0
    steps: int = 0
    computed: int = 0
    """Prompt tokens."""
    served: int = 0


class Worker:
    """One worker."""

    def __init__(
        self, index: int, role: Role, profile: Profile, fingerprint: LayoutFingerprint,
        clock: Clock, on_cut: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`on_cut`: see Outbox."""
        self.role = role
        self.name = f"{role}-{index}"
        self._profile, self._clock = profile, clock
        self._times = profile.alone
        self.pool = BlockPool(profile.num_blocks, profile.block_size)
        self.pool.listening = True
        self.outbox = Outbox(self.name, fingerprint, on_cut)
        self.outgoing = Outgoing(self.pool, self.outbox, 0)
        limits = Limits(profile.max_num_batched_tokens, profile.max_num_seqs, profile.max_model_len)
        self.scheduler = Scheduler(self.pool, limits, self.outgoing.let_go)
        self.routes: set[bytes] = set()
        """Route hashes that its prefix cache holds, as it would report them."""
        self.tally = Tally()
        self.row: Row | None = None
        """What is being computed."""
        self.ends_at = FOREVER
        """Of that."""
        self._plan = Plan()
        self._began = 0.0
        self._owed = 0.0
        """Seconds that requests have cost beside steps, before the next one."""
        self._tight = False
        """Within the row its room may become too little for somebody."""
        self._settled = True
        """Nobody was preempted for the step, so that the next plan finds what this one found."""
        self._commands: list[Callable[[], None]] = []
        self._fingerprint = fingerprint.digest()
        self._price = FETCH if role is Role.DECODE else COMPUTE
        self._candidates: dict[int, Candidate] = {}

    # what is asked of it

    def submit(self, request: Simulated) -> None:
        if self.role is Role.DECODE and not self.idle:
            self._owed += self._profile.request_s
        self.scheduler.add(request)
        self._candidates.clear()

    def post(self, command: Callable[[], None]) -> None:
        """Do something between two steps."""
        self._commands.append(command)

    @property
    def idle(self) -> bool:
        return self.ends_at == FOREVER

    def interrupt(self) -> bool:
        """Something has come: a row of steps ends with the one that is being computed. Whether
        `ends_at` has changed."""
        if self.row is None or not self.row.stop(self._clock.now):
            return False
        self.ends_at = self.row.ends_at()
        return True

    def turn(self, times: StepTimes) -> None:
        """From now on a step takes as long as `times` says."""
        self._times = times
        if self.row is not None:
            self.row.turn(self._clock.now, times)
            self.ends_at = self.row.ends_at()

    # its loop

    def begin(self) -> list[FetchOrder]:
        """Take the commands, plan a step and start it."""
        for command in self._commands:
            command()
        self._commands.clear()
        self._candidates.clear()
        fetches: list[FetchOrder] = []
        while True:
            before = self.scheduler.preemptions
            plan = self.scheduler.plan()
            fetches += plan.fetches
            if plan.chunks or self.scheduler.preemptions == before:
                break
        self._plan, self._began = plan, self._clock.now
        self._settled = self.scheduler.preemptions == before
        self.ends_at = FOREVER
        if plan.chunks:
            self._start(plan)
        return fetches

    def _start(self, plan: Plan) -> None:
        tokens = prompts = context = 0
        pairs = 0.0
        for chunk in plan.chunks:
            if chunk.length > 1:
                tokens += chunk.length
                pairs += chunk.length * (chunk.start + chunk.length / 2)
                prompts += 1
            else:
                context += chunk.start
        self._tight = False
        self.tally.computed += tokens
        content = Content(tokens, pairs, prompts, len(plan.chunks) - prompts, context)
        steps = 1 if prompts else self._steps(plan)
        self.row = Row(content, steps, self._times, self._began + self._owed)
        self._owed = 0.0
        self.ends_at = self.row.ends_at()

    def _steps(self, plan: Plan) -> int:
        """How many equal steps can follow each other: until one has its last token, or blocks run
        out."""
        pool, requests = self.pool, [chunk.request for chunk in plan.chunks]
        if len(requests) < len(self.scheduler.running) or not self._settled:
            return 1  # the next plan may start somebody
        if any(FIRST_TOKEN not in cast(Simulated, request).at for request in requests):
            return 1  # it has to be known when that came
        steps = min(r.prompt_len + r.sampling.max_tokens - r.num_tokens for r in requests)
        while steps > 1:
            needed = sum(
                pool.blocks_for(r.num_computed + steps) - len(r.block_table) for r in requests
            )
            if needed <= pool.num_available:
                left = (pool.num_available - needed) * pool.block_size
                self._tight = left < self._profile.max_model_len
                break
            steps //= 2
        return max(1, steps)

    def finish(self) -> list[Happened]:
        """The step, or the row of steps, is over."""
        self._candidates.clear()
        assert self.row is not None
        tally, steps = self.tally, self.row.steps
        tally.busy_s += self.ends_at - self._began
        tally.steps += steps
        found: list[Happened] = []
        if steps > 1:  # blocks are taken before any are given back
            for chunk in self._plan.chunks:
                self._cover(chunk.request, chunk.start + steps)
        for chunk in self._plan.chunks:
            request = cast(Simulated, chunk.request)
            if steps > 1:
                cast(Tokens, request.token_ids).grow(steps - 1)
                chunk = Chunk(request, chunk.start, steps, samples=True)
            self.scheduler.computed(chunk)
            if chunk.samples:
                self._accept(request, found)
            elif request.hand_off:
                ticket = self.outgoing.grow(chunk)
                if ticket is not None:
                    found.append(Happened(request, ticket=ticket))
        self.row, self.ends_at = None, FOREVER
        for route, here in self.pool.take_news().items():
            (self.routes.add if here else self.routes.discard)(route)
        return found

    def _cover(self, request: Request, num_tokens: int) -> None:
        missing = self.pool.blocks_for(num_tokens) - len(request.block_table)
        if missing > 0:
            blocks = self.pool.allocate(missing)
            assert blocks is not None, "The row of steps was planned for the blocks that are there."
            request.block_table += blocks

    def _accept(self, request: Simulated, found: list[Happened]) -> None:
        """Its token is drawn (as Engine._accept)."""
        first = FIRST_TOKEN not in request.at
        if first:
            request.mark(FIRST_TOKEN)
        cast(Tokens, request.token_ids).grow(1)
        if request.num_output >= request.sampling.max_tokens:
            request.mark(FINISHED)
            self.scheduler.remove(request)
            self.tally.served += 1
            found.append(Happened(request, first=first, done=True))
        elif request.hand_off:
            self.scheduler.part(request)
            ticket = self.outgoing.hand_over(request, request.num_computed)
            found.append(Happened(request, first=first, ticket=ticket))
        elif first:
            found.append(Happened(request, first=True))

    def fetched(self, request: Simulated) -> None:
        self.scheduler.fetched(request, FetchReport(request_id=request.request_id))

    def resume(self, request: Simulated) -> None:
        """The first token of a request that came with a growing ticket (as Engine._resume)."""
        request.awaits_token = False
        cast(Tokens, request.token_ids).grow(1)
        if request.state is State.ARRIVED:
            self.scheduler.resume(request)
        elif request.state is State.WAITING:
            assert request.ticket is not None
            request.ticket = msgspec.structs.replace(request.ticket, growing=False)

    def drop(self, request: Simulated) -> None:
        """End a request that awaits its token: its ticket has ended."""
        if request.state is State.FETCHING:
            self.fetched(request)
        self.scheduler.remove(request)

    # what routers see

    def load(self, cached: int = 0) -> WorkerLoad:
        scheduler, pool = self.scheduler, self.pool
        return WorkerLoad(
            worker_id=self.name,
            role=self.role,
            fingerprint=self._fingerprint,
            queued_tokens=scheduler.queued_tokens,
            requests=len(scheduler),
            free_tokens=(pool.num_available - self._taken()) * pool.block_size,
            cached_tokens=cached,
        )

    def _taken(self) -> int:
        """Blocks that the steps of a row have taken so far beyond those of its first: the pool
        hears of them when the row is over."""
        if self.row is None or self.row.steps < 2:
            return 0
        steps = self.row.over(self._clock.now) + 1
        pool, chunks = self.pool, self._plan.chunks
        return sum(
            pool.blocks_for(chunk.start + steps) - len(chunk.request.block_table)
            for chunk in chunks
        )

    def candidate(self, like: Candidate, held: Sequence[tuple[int, bytes]]) -> Candidate:
        """Itself as it stands, for a prompt with these route hashes (position, hash). `like` says
        everything else, the same for all prompts."""
        routes, cached = self.routes, 0
        for position, route in held:
            if route not in routes:
                break
            cached = position
        found = self._candidates.get(cached)
        if found is None:
            found = Candidate(self.load(cached), like.hand_off, like.floor, like.price)
            if not self._tight:
                self._candidates[cached] = found
        return found
