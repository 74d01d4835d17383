"""What the next step computes: continuous batching with chunked prefill. No tensors.

One rule for both phases: a request has `num_uncomputed` tokens; a step computes some of them under
one token budget. Decodes (one uncomputed token) come first, so that prompts never hold them up by
more than one step; prompts then share what is left, oldest first, cut into chunks.

When blocks run out, the youngest running request is preempted: it gives back its blocks and later
computes its tokens again (its full blocks often still lie in the prefix cache).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.engine.blocks import BlockPool
from pdserve.engine.overlap import takes_early
from pdserve.engine.ports import Chunk
from pdserve.engine.request import Request, State
from pdserve.protocol.blocks import block_hashes, num_routes, route_hashes
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.events import FETCH_STARTED, FETCHED, PREEMPTED, RECOMPUTED, SCHEDULED
from pdserve.protocol.transfer import FetchReport


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step."""

    max_num_batched_tokens: int
    """Tokens computed in one step, prompts and decodes together."""
    max_num_seqs: int
    """Requests that own blocks at the same time."""
    max_model_len: int


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Fetch the ticket's blocks `wanted` into our blocks `targets`."""

    request: Request
    wanted: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: chunks to compute and fetches to start."""

    chunks: list[Chunk] = field(default_factory=list)
    fetches: list[FetchOrder] = field(default_factory=list)


class Scheduler:
    """Owns the queues and, through the pool, every request's blocks. Engine thread only."""

    def __init__(self, pool: BlockPool, limits: Limits, let_go: Callable[[Request], None]) -> None:
        """`let_go` frees a request's blocks, or keeps them from being used while others read."""
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise PdserveError(
                f"max_num_batched_tokens ({limits.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({limits.max_num_seqs}): each running request needs a token a step."
            )
        self.pool = pool
        self.limits = limits
        self._let_go = let_go
        self.waiting: deque[Request] = deque()
        self.fetching: dict[str, Request] = {}
        """FETCHING and ARRIVED."""
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Wait behind all of the same or a lower priority. Whoever has run already (it was
        preempted, or its fetch failed) stays in front: its client has seen it begin."""
        place = len(self.waiting)
        while place and request.priority < self.waiting[place - 1].priority:
            if self.waiting[place - 1].cached_tokens is not None:
                break
            place -= 1
        self.waiting.insert(place, request)

    def __iter__(self) -> Iterator[Request]:
        """Every unfinished request."""
        yield from self.running
        yield from self.fetching.values()
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.fetching) + len(self.waiting)

    def plan(self) -> Plan:
        """Decide a step; blocks for it are allocated when this returns."""
        plan = Plan()
        budget = self.limits.max_num_batched_tokens
        before = self.preemptions
        for decoding in (True, False):
            for request in [r for r in self.running if (r.num_uncomputed == 1) is decoding]:
                if not budget:
                    break
                if request.state is State.RUNNING:  # not preempted for an earlier one
                    budget -= self._extend(plan, request, budget)
        # A preempted request's chunk may have been planned before it lost its blocks.
        plan.chunks[:] = [c for c in plan.chunks if c.request.state is State.RUNNING]
        if self.preemptions == before:
            self._admit(plan, budget)
        return plan

    def _extend(self, plan: Plan, request: Request, budget: int) -> int:
        """Plan the next tokens of a running request; returns how many."""
        length = min(request.num_uncomputed, budget)
        while not self._grow(request, request.num_computed + length):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return 0
        samples = length == request.num_uncomputed
        plan.chunks.append(Chunk(request, request.num_computed, length, samples))
        return length

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens`; False if there are too few blocks."""
        missing = self.pool.blocks_for(num_tokens) - len(request.block_table)
        blocks = self.pool.allocate(max(missing, 0))
        if blocks is None:
            return False
        request.block_table += blocks
        return True

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        request.preemptions += 1
        request.mark(PREEMPTED)
        self.running.remove(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        """Take a request's blocks and put it first in line."""
        self.free(request)
        if not request.num_output:
            request.prompt_logprobs.clear()  # they will be computed again, all of them
        request.state = State.WAITING
        self.waiting.appendleft(request)

    def _admit(self, plan: Plan, budget: int) -> None:
        """Let waiting requests in, first come first served, while tokens and blocks last. One that
        awaits its token lets others pass."""
        passed = 0
        while passed < len(self.waiting) and self._places_taken < self.limits.max_num_seqs:
            request = self.waiting[passed]
            if request.awaits_token and not self._takes_early(request):
                passed += 1
                continue
            if request.ticket is None and not budget:
                return
            if not self._reserve(request):
                if not request.awaits_token:
                    return
                passed += 1
                continue
            del self.waiting[passed]
            if request.ticket is not None:
                plan.fetches.append(self._start_fetch(request))
            else:
                self._start(request)
                budget -= self._extend(plan, request, budget)

    @property
    def _places_taken(self) -> int:
        return len(self.running) + len(self.fetching)

    def _takes_early(self, request: Request) -> bool:
        assert request.ticket is not None
        return takes_early(
            self.pool.num_available,
            self.pool.blocks_for(request.ticket.num_tokens),
            self.pool.num_blocks,
            self._places_taken,
            self.limits.max_num_seqs,
        )

    def _reserve(self, request: Request) -> bool:
        """Pin what the cache has of the prompt and check (for a ticket: take) the room for the
        rest. False, with nothing changed, if the room is missing."""
        pool = self.pool
        request.hashes = block_hashes(
            request.token_ids, pool.block_size, request.root, request.hashes
        )
        cached = pool.match(self._readable(request))
        pool.pin(cached)
        known = request.num_tokens if request.ticket is None else request.ticket.num_tokens
        # One block of room beyond the prompt keeps a request from being preempted at once.
        needed = pool.blocks_for(known) - len(cached)
        spare = 1 if self.running or self.fetching else 0
        if pool.num_available < needed + spare:
            pool.release(cached)
            return False
        request.block_table = cached
        if request.ticket is not None:
            request.block_table = cached + (pool.allocate(needed) or [])
        request.num_registered = len(cached)
        if request.cached_tokens is None:
            hit = len(cached) * pool.block_size
            request.cached_tokens = min(hit, request.prompt_len)
        return True

    def _readable(self, request: Request) -> list[bytes]:
        """The hashes under which the prefix cache may be read for this request.

        At least one token must be computed, else there are no logits to draw from; and prompt
        log-probabilities need every position.
        """
        if request.ticket is not None:
            return request.hashes[: request.ticket.num_tokens // self.pool.block_size]
        if request.sampling.prompt_logprobs is not None and not request.num_output:
            return []
        return request.hashes[: (request.num_tokens - 1) // self.pool.block_size]

    def _start(self, request: Request) -> None:
        request.state = State.RUNNING
        request.num_computed = len(request.block_table) * self.pool.block_size
        request.mark(SCHEDULED)
        self.running.append(request)

    def _start_fetch(self, request: Request) -> FetchOrder:
        request.state = State.FETCHING
        request.mark(FETCH_STARTED)
        self.fetching[request.request_id] = request
        held = request.num_registered
        return FetchOrder(
            request=request,
            wanted=tuple(range(held, len(request.block_table))),
            targets=tuple(request.block_table[held:]),
        )

    def fetched(self, request: Request, report: FetchReport) -> None:
        """The transfer is done with the request's blocks: run it (once its token has come), or
        compute it here instead."""
        ticket = request.ticket
        assert ticket is not None
        request.ticket = None
        if report.ok:
            request.num_computed = ticket.num_tokens
            request.state = State.ARRIVED
            request.mark(FETCHED)
            self._register_full_blocks(request)
            if not request.awaits_token:
                self.resume(request)
            return
        del self.fetching[request.request_id]
        # Blocks before the first bad one are sound; in the cache they survive the recomputation.
        request.num_computed = min(report.failed) * self.pool.block_size
        self._register_full_blocks(request)
        if not request.awaits_token:
            request.mark(RECOMPUTED)
        self._requeue(request)

    def resume(self, request: Request) -> None:
        """Its blocks are here and its token is known."""
        del self.fetching[request.request_id]
        request.state = State.RUNNING
        self.running.append(request)

    def computed(self, chunk: Chunk) -> None:
        """A chunk's KV is in the pool."""
        chunk.request.num_computed = chunk.start + chunk.length
        self._register_full_blocks(chunk.request)

    def _register_full_blocks(self, request: Request) -> None:
        full = request.num_computed // self.pool.block_size
        if full <= request.num_registered:
            return
        request.hashes = block_hashes(
            request.token_ids, self.pool.block_size, request.root, request.hashes
        )
        size = self.pool.block_size
        for index in range(request.num_registered, full):
            routes: Sequence[bytes] = ()
            if self.pool.listening:
                first, end = num_routes(index * size), num_routes((index + 1) * size)
                if end > len(request.routes):
                    known = request.token_ids[: full * size]
                    request.routes = route_hashes(known, request.salt, request.routes)
                routes = request.routes[first:end]
            self.pool.register(request.block_table[index], request.hashes[index], routes)
        request.num_registered = full

    def free(self, request: Request) -> None:
        """Give back all blocks. Never while the transfer writes into them (state FETCHING)."""
        self._let_go(request)
        request.block_table = []
        request.num_computed = 0
        request.num_registered = 0

    def remove(self, request: Request) -> None:
        """Take a request out and free its blocks."""
        assert request.state is not State.FETCHING, "The transfer still owns its blocks."
        if request.state is State.RUNNING:
            self.running.remove(request)
        elif request.state is State.ARRIVED:
            del self.fetching[request.request_id]
        else:
            self.waiting.remove(request)
        self.free(request)
        request.state = State.FINISHED

    def part(self, request: Request) -> None:
        """Take a running request out; what becomes of its blocks is the caller's affair."""
        self.running.remove(request)
        request.state = State.FINISHED

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed here."""
        waiting = sum(r.num_uncomputed for r in self.waiting if r.ticket is None)
        return waiting + sum(r.num_uncomputed for r in self.running if r.num_uncomputed > 1)
