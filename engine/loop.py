"""The engine thread: takes commands, plans a step, runs it, gives out its tokens.

    submit / resume / abort / fetched / returned     (any thread → queue)
                 │
                 ▼
    take commands → expire deadlines → plan → start fetches → run → apply → sink
                 ▲                                                          │
                 └──────────────────────────────────────────────────────────┘

All state below is touched by the engine thread alone; others talk to it through `_post`. The sink
is called once per step (and in the middle of one, where a large prompt's ticket goes out), from
this thread, and must not wait.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from pdserve.engine.blocks import BlockPool
from pdserve.engine.grammar import Matcher
from pdserve.engine.measuring import Measuring
from pdserve.engine.outgoing import Outgoing
from pdserve.engine.pace import Pace
from pdserve.engine.ports import Chunk, ChunkResult, Exporter, Importer, Runner, Watcher
from pdserve.engine.refusal import Bounds, problem_with
from pdserve.engine.request import Request, State
from pdserve.engine.scheduler import Limits, Plan, Scheduler
from pdserve.protocol.blocks import root_hash
from pdserve.protocol.errors import ErrorCode, WorkerError
from pdserve.protocol.events import FINISHED, FIRST_TOKEN, RESUMED
from pdserve.protocol.messages import Continue, FinishReason, Output, Submit, WorkerStatus
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint
from pdserve.protocol.transfer import FetchReport

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
"""Longest sleep of an idle engine; a command wakes it at once."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step has for the outside: outputs by client, and the load afterwards."""

    step: int
    outputs: dict[object, list[Output]]
    status: WorkerStatus
    news: dict[bytes, bool] = field(default_factory=dict)
    """Route hashes that the prefix cache now holds (True) or has lost (False)."""


@dataclass(slots=True)
class _Bag:
    """Outputs collected for the next call of the sink."""

    outputs: dict[object, list[Output]] = field(default_factory=dict)

    def put(self, client: object, output: Output) -> None:
        self.outputs.setdefault(client, []).append(output)


class Engine:
    """Runs requests of one worker on one thread."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        limits: Limits,
        runner: Runner,
        fingerprint: LayoutFingerprint,
        vocab_size: int,
        sink: Callable[[StepOutcome], None],
        exporter: Exporter | None = None,
        importer: Importer | None = None,
        pace: Pace | None = None,
        measuring: Measuring | None = None,
    ) -> None:
        """`pace`: one that has learnt from a warm-up; by default one that knows nothing."""
        self._pool = pool
        self._limits = limits
        self._outgoing = Outgoing(pool, exporter, fingerprint.token_nbytes)
        self._scheduler = Scheduler(pool, limits, self._outgoing.let_go)
        self._runner = runner
        self._fingerprint = fingerprint
        self._layout = fingerprint.digest()
        self._vocab_size = vocab_size
        self._sink = sink
        self._exporter = exporter
        self._importer = importer
        self._requests: dict[str, Request] = {}
        self._successors: dict[str, list[Callable[[], None]]] = {}
        """What has come under the id of a request whose fetch is still being cancelled."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bag = _Bag()
        self._stopping = False
        self._changed = True
        self.pace = pace or Pace()
        """Tells an engine that is alive but stuck."""
        self.measuring = measuring or Measuring()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None
        """Why the thread ended, if it was not told to."""

    # What other threads may call ---------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def listen(self) -> None:
        """From now on steps report which route hashes the prefix cache holds. Before `start`."""
        self._pool.listening = True

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the thread after the step in progress."""
        self._post(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, message: Submit, client: object, matcher: Matcher | None = None) -> None:
        """Queue a request; whatever happens to it comes out of the sink under `client`. `matcher`
        follows its constraint, if it has one, and has seen its outputs so far."""
        received = time.monotonic()  # the step in progress may take a while yet
        self._post(lambda: self._submit(message, client, matcher, received))

    def resume(self, message: Continue) -> None:
        """The first tokens of a request that came with a growing ticket; unknown ids are
        ignored."""
        self._post(lambda: self._resume(message))

    def abort(self, request_id: str) -> None:
        """End a request in whatever state; unknown ids are ignored. Nothing comes out."""
        self._post(lambda: self._abort(request_id))

    def abort_client(self, client: object) -> None:
        """End everything that `client` submitted: it is gone."""
        self._post(lambda: self._abort_client(client))

    def returned(self, ticket_id: str) -> None:
        """The outbox has given back the ticket's blocks. Exactly once per ticket."""
        self._post(lambda: self._outgoing.returned(ticket_id))

    def call(self, function: Callable[[Engine], None]) -> None:
        """Run something on the engine thread between two steps (tests, integrity probes)."""
        self._post(lambda: function(self))

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    # The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.step(self._take_commands)
        except BaseException as error:
            self.failure = error
            log.exception("The engine thread ends because of a fault.")
            raise

    def step(self, take: Callable[[bool], None] | None = None) -> bool:
        """One turn of the loop; True if it computed or started something.

        `take(wait)` runs the commands; tests that drive the engine without its thread leave it
        out and get every command that is queued.
        """
        self.pace.turn()
        (take or self._drain)(False)
        self._expire()
        preemptions = self._scheduler.preemptions
        plan = self._scheduler.plan()
        self._start_fetches(plan)
        if plan.chunks:
            self._compute(plan)
        worked = bool(plan.chunks or plan.fetches)
        if worked or self._changed:
            self._flush()
        elif self._scheduler.preemptions == preemptions and take is not None:
            take(True)
        return worked

    def _drain(self, wait: bool) -> None:
        while not self._commands.empty():
            self._do(self._commands.get())

    def _take_commands(self, wait: bool) -> None:
        """Run all queued commands; if `wait`, sleep until there is one or a deadline passes."""
        if wait:
            try:
                self._do(self._commands.get(timeout=self._until_next_deadline()))
            except queue.Empty:
                return
        self._drain(False)

    def _do(self, command: Callable[[], None]) -> None:
        self._changed = True
        command()

    def _until_next_deadline(self) -> float:
        # One whose fetch is being cancelled may be past its deadline: its report wakes the loop.
        deadlines = [r.deadline for r in self._requests.values() if not r.abort_requested]
        nearest = min(deadlines, default=float("inf")) - time.monotonic()
        return min(IDLE_WAIT_S, max(nearest, 0.001))

    def _flush(self) -> None:
        """Tell the outside; an engine that has just become idle checks its accounts first."""
        if not self._requests:
            self.check_integrity()
        self._changed = False
        outputs, self._bag.outputs = self._bag.outputs, {}
        status = self.status()
        self._sink(StepOutcome(status.steps, outputs, status, self._pool.take_news()))

    def _stop(self) -> None:
        self._stopping = True

    # Commands ----------------------------------------------------------------------------------

    def _submit(
        self, message: Submit, client: object, matcher: Matcher | None, received: float
    ) -> None:
        dying = self._requests.get(message.request_id)
        if dying is not None and dying.abort_requested:
            self._successors[message.request_id] = [
                lambda: self._submit(message, client, matcher, received)
            ]
            return
        tokens = message.prompt_token_ids + message.output_token_ids
        problem = self._problem_with(message, tokens)
        if problem:
            self._bag.put(client, _error(message.request_id, ErrorCode.INVALID_REQUEST, problem))
            return
        request = Request(
            request_id=message.request_id,
            token_ids=tokens,
            prompt_len=message.prompt_len,
            sampling=message.sampling,
            deadline=time.monotonic() + message.timeout_s,
            root=root_hash(self._layout, message.cache_salt),
            hand_off=message.hand_off,
            ticket=message.ticket,
            matcher=matcher,
            awaits_token=message.ticket is not None and message.ticket.growing,
            client=client,
            salt=message.cache_salt,
            priority=message.priority,
            received=received,
        )
        self._requests[request.request_id] = request
        self._scheduler.add(request)
        if request.ticket is not None:
            assert self._importer is not None
            self._importer.keep(request.ticket)

    def _problem_with(self, message: Submit, tokens: Sequence[int]) -> str:
        """A sentence if the request can never run here, else the empty string."""
        if message.request_id in self._requests:
            return f"The request id {message.request_id} is in use."
        limits = Bounds(
            max_model_len=self._limits.max_model_len,
            vocab_size=self._vocab_size,
            num_blocks=self._pool.num_blocks,
            layout=self._fingerprint,
        )
        if problem := problem_with(message, tokens, limits):
            return problem
        if message.hand_off and self._exporter is None:
            return "This worker cannot hand requests over: it is not a prefill worker."
        if message.ticket is not None and self._importer is None:
            return "This worker cannot fetch KV blocks: it is not a decode worker."
        return ""

    def _resume(self, message: Continue) -> None:
        request = self._requests.get(message.request_id)
        if message.request_id in self._successors:
            self._successors[message.request_id].append(lambda: self._resume(message))
            return
        if request is None or not request.awaits_token or request.abort_requested:
            return
        tokens = message.output_token_ids
        if not 0 < len(tokens) < request.sampling.max_tokens:
            problem = f"{len(tokens)} tokens came of at most {request.sampling.max_tokens}."
        elif min(tokens) < 0 or max(tokens) >= self._vocab_size:
            problem = f"Token ids must be between 0 and {self._vocab_size - 1}."
        else:
            request.awaits_token = False
            request.token_ids += tokens
            if request.matcher is not None:
                request.matcher.follow(tokens)
            request.mark(RESUMED)
            if request.state is State.ARRIVED:
                self._scheduler.resume(request)
            elif request.state is State.WAITING:  # by now the ticket is like any other
                assert request.ticket is not None
                request.ticket = msgspec.structs.replace(request.ticket, growing=False)
            return
        self._fail(request, ErrorCode.INVALID_REQUEST, problem)

    def _abort(self, request_id: str) -> None:
        self._successors.pop(request_id, None)
        request = self._requests.get(request_id)
        if request is None:
            self._outgoing.withdraw(lambda held: held.request_id == request_id)
        elif request.state is State.FETCHING:
            request.abort_requested = True
            assert self._importer is not None
            self._importer.cancel(request_id)
        else:
            self._finish(request)

    def _abort_client(self, client: object) -> None:
        for request in [r for r in self._requests.values() if r.client is client]:
            self._abort(request.request_id)
        self._outgoing.withdraw(lambda held: held.client is client)

    def _fetched(self, report: FetchReport) -> None:
        request = self._requests[report.request_id]
        if not report.ok:
            log.warning("Fetching KV for %s failed: %s", report.request_id, report.reason)
        self.measuring.fetched(report, called_off=request.abort_requested)
        self._scheduler.fetched(request, report)
        if request.abort_requested:
            self._finish(request)
            for command in self._successors.pop(request.request_id, ()):
                command()
        elif request.awaits_token and not report.ok:
            # Whoever computes the prompt will have a ticket for all of it, or has failed.
            self._fail(request, ErrorCode.KV_LOST, f"The early transfer failed: {report.reason}")

    # A step ------------------------------------------------------------------------------------

    def _expire(self) -> None:
        now = time.monotonic()
        late = [r for r in self._requests.values() if r.deadline <= now and not r.abort_requested]
        for request in late:
            self._changed = True
            self._fail(
                request,
                ErrorCode.DEADLINE,
                f"The request's time ran out on this worker in state {request.state.name}.",
            )

    def _fail(self, request: Request, code: ErrorCode, message: str) -> None:
        self._bag.put(request.client, _error(request.request_id, code, message, request))
        self._abort(request.request_id)

    def _start_fetches(self, plan: Plan) -> None:
        for order in plan.fetches:
            request = order.request
            assert self._importer is not None
            assert request.ticket is not None
            self._importer.fetch(
                request.ticket,
                order.wanted,
                order.targets,
                request.deadline,
                lambda report: self._post(lambda: self._fetched(report)),
            )

    def _compute(self, plan: Plan) -> None:
        tokens = sum(chunk.length for chunk in plan.chunks)
        self.measuring.steps.add(tokens)
        self.pace.compute(tokens)
        try:
            results = self._runner.execute(plan.chunks, self._watcher(plan.chunks))
        except Exception as error:
            log.exception(
                "Step %d failed; its %d requests end.", self.measuring.steps.count, len(plan.chunks)
            )
            for chunk in plan.chunks:
                self._fail(chunk.request, ErrorCode.INTERNAL, f"The engine step failed: {error}.")
            return
        for chunk, result in zip(plan.chunks, results, strict=True):
            self._scheduler.computed(chunk)
            if result.corrupted and not chunk.request.corrupted:
                chunk.request.corrupted = True
                self.measuring.corrupted()
            if not chunk.request.num_output:
                chunk.request.prompt_logprobs += result.prompt_logprobs
            if chunk.samples:
                self._accept_or_fail(chunk.request, result)
            elif chunk.request.hand_off:
                self._offer_early(chunk)

    def _watcher(self, chunks: Sequence[Chunk]) -> Watcher | None:
        """Who offers what of the chunks is computed while the step goes on."""
        leaving = [chunk for chunk in chunks if self._outgoing.goes_by_layers(chunk)]
        if not leaving:
            return None

        def tell(slices: int, computed: Callable[[], None] | None) -> None:
            for chunk in leaving:
                ticket = self._outgoing.advance(chunk, slices, computed)
                self._put_ticket(chunk.request, ticket)
            if self._bag.outputs:
                self._flush()

        return Watcher(self._outgoing.slices, tell)

    def _offer_early(self, chunk: Chunk) -> None:
        self._put_ticket(chunk.request, self._outgoing.grow(chunk))

    def _put_ticket(self, request: Request, ticket: KVTicket | None) -> None:
        if ticket is not None:
            self._bag.put(request.client, Output(request_id=request.request_id, ticket=ticket))

    def _accept_or_fail(self, request: Request, result: ChunkResult) -> None:
        """A grammar that runs out of its limits ends its own request and no other."""
        matcher = request.matcher
        if matcher is not None and matcher.error:
            self._fail(request, ErrorCode.INVALID_REQUEST, matcher.error)
        else:
            self._accept(request, result)

    def _accept(self, request: Request, result: ChunkResult) -> None:
        """Append the drawn token, decide whether the request goes on, and put out the news."""
        token = result.token_id
        assert token is not None
        first = not request.answered
        if first:
            request.answered = True
            request.mark(FIRST_TOKEN)
        prompt_logprobs = None
        if request.sampling.prompt_logprobs is not None and not request.num_output:
            prompt_logprobs = [None, *request.prompt_logprobs]
        request.token_ids.append(token)
        if request.matcher is not None:
            request.matcher.follow([token])
        reason = self._reason_to_finish(request, token)
        ticket = None
        if reason is None and request.hand_off:
            ticket = self._hold(request)
        elif reason is not None:
            self._finish(request)
        stopped_by_client = token in request.sampling.stop_token_ids
        self._bag.put(
            request.client,
            Output(
                request_id=request.request_id,
                token_ids=[token],
                logprobs=None if result.logprobs is None else [result.logprobs],
                finish_reason=reason,
                stop_token_id=token if reason is FinishReason.STOP and stopped_by_client else None,
                ticket=ticket,
                prompt_logprobs=prompt_logprobs,
                cached_tokens=request.cached_tokens if first else None,
                events=tuple(request.events) if reason or ticket else (),
            ),
        )

    def _reason_to_finish(self, request: Request, token: int) -> FinishReason | None:
        if token in request.ending or (request.matcher is not None and request.matcher.finished):
            return FinishReason.STOP
        if request.num_output >= request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _hold(self, request: Request) -> KVTicket:
        """Pass the blocks to the outbox; returns the ticket."""
        del self._requests[request.request_id]
        self._scheduler.part(request)
        return self._outgoing.hand_over(request, request.num_computed)

    def _finish(self, request: Request) -> None:
        request.mark(FINISHED)
        if request.ticket is not None:
            assert self._importer is not None
            self._importer.drop(request.request_id)
        self._scheduler.remove(request)
        del self._requests[request.request_id]

    # Numbers -----------------------------------------------------------------------------------

    def status(self) -> WorkerStatus:
        """The load now. Engine thread only."""
        pool, scheduler = self._pool, self._scheduler
        return WorkerStatus(
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_evictable,
            blocks_held=self._outgoing.num_blocks,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            fetching=len(scheduler.fetching),
            queued_tokens=scheduler.queued_tokens,
            steps=self.measuring.steps.count,
            step_tokens=int(self.measuring.steps.total),
            preemptions=scheduler.preemptions,
            tickets=len(self._outgoing.blocks),
            tickets_early=self._outgoing.num_early,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block is accounted for. Engine thread only."""
        tables: Sequence[Sequence[int]] = [request.block_table for request in self._scheduler]
        self._pool.check_integrity(tables, self._outgoing.blocks)


def _error(
    request_id: str, code: ErrorCode, message: str, request: Request | None = None
) -> Output:
    return Output(
        request_id=request_id,
        finish_reason=FinishReason.ERROR,
        error=WorkerError(code=code, message=message),
        events=tuple(request.events) if request else (),
    )
