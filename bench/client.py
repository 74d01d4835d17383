"""The client side of a measurement: sends jobs when they are due, notes when each byte came.

While requests run, a chunk costs one reading of the clock; what was in it is looked at when its
request is over. Times count from the moment when a request was *due*: a client that falls behind
makes the server look worse, never better (the "coordinated omission" of closed measurements).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from pdserve.bench.arrivals import Arrivals, times
from pdserve.bench.undisturbed import undisturbed
from pdserve.bench.wire import Exchange, Wire, WireError
from pdserve.bench.workloads import Job

SPIN_S = 0.002
"""The last of the wait for a due time is spent asking, not sleeping: sleeps are this coarse."""
LOOK_S = 0.01
"""How often the client looks whether its own loop keeps up."""
ERROR_CHARS = 500


@dataclass(slots=True)
class Record:
    """One request. Times are seconds since the run began."""

    job: int
    due: float
    sent: float = 0.0
    ended: float = 0.0
    status: int = 0
    """HTTP status; 0: there was no answer."""
    prompt_len: int = 0
    token_times: list[float] = field(default_factory=list)
    """When each output token came; tokens of one chunk came together."""
    token_ids: list[int] = field(default_factory=list)
    """Of servers that send them."""
    cached_tokens: int | None = None
    """Prompt tokens that the server found in its cache, if it says so."""
    finish_reason: str = ""
    error: str = ""
    timings: dict[str, Any] | None = None
    """The `pdserve` member: what happened to the request inside the cluster."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def rejected(self) -> bool:
        """The server had no room for it and said so."""
        return self.status == 429

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.due

    @property
    def e2e(self) -> float:
        return self.token_times[-1] - self.due

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies (ITL) in seconds."""
        return [after - before for before, after in itertools.pairwise(self.token_times)]

    @property
    def tpot(self) -> float:
        """Time per output token after the first, in seconds; 0 of a single token."""
        count = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / count if count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a client saw."""

    records: list[Record]
    wall_s: float
    client_cpu_s: float
    """CPU seconds of this process."""
    loop_lags: list[float]
    """How late the client's loop came back to a timer, in seconds, every LOOK_S."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Whom to ask."""

    url: str
    """Without /v1."""
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    """Of one whole request."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further members of every body."""


Progress = Callable[[int, int], None]
"""Called with the numbers of requests that are done and under way."""


def measure(
    server: Server,
    jobs: Sequence[Job],
    arrivals: Arrivals,
    *,
    seed: int,
    progress: Progress = lambda done, running: None,
) -> Run:
    """Send every job once. Returns when all are answered, refused or given up."""
    with undisturbed(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive(server, jobs, arrivals, seed=seed, progress=progress))


async def drive(
    server: Server,
    jobs: Sequence[Job],
    arrivals: Arrivals,
    *,
    seed: int,
    progress: Progress = lambda done, running: None,
) -> Run:
    """As `measure`, beside other work of the caller's loop."""
    wire = Wire(server.url, {"accept-encoding": "identity", **server.headers})
    try:
        return await _Driver(wire, server, jobs, progress).run(arrivals, seed)
    finally:
        wire.close()


@dataclass(frozen=True, slots=True)
class _Letter:
    """A request that is ready to be sent."""

    job: int
    prompt: tuple[int, ...]
    request: bytes


class _Driver:
    """One run. Owns its tasks."""

    def __init__(self, wire: Wire, server: Server, jobs: Sequence[Job], progress: Progress) -> None:
        self._wire, self._server, self._jobs = wire, server, jobs
        self._progress = progress
        self._records: list[Record] = []
        self._running = 0
        self._next = {job.follows: n for n, job in enumerate(jobs) if job.follows is not None}
        self._begin = 0.0

    async def run(self, arrivals: Arrivals, seed: int) -> Run:
        lags: list[float] = []
        watcher = asyncio.create_task(self._watch(lags))
        cpu, self._begin = time.process_time(), time.perf_counter()
        try:
            if arrivals.kind == "closed":
                await self._closed(arrivals.concurrency)
            else:
                await self._open(arrivals, seed)
        finally:
            watcher.cancel()
        return Run(
            records=sorted(self._records, key=lambda record: record.job),
            wall_s=self._now(),
            client_cpu_s=time.process_time() - cpu,
            loop_lags=lags,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _watch(self, lags: list[float]) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LOOK_S)
            lags.append(max(0.0, time.perf_counter() - before - LOOK_S))

    async def _closed(self, concurrency: int) -> None:
        first = iter([n for n, job in enumerate(self._jobs) if job.follows is None])

        async def one_after_the_other() -> None:
            for number in first:
                await self._conversation(self._prepare(number, ()), self._now())

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))

    async def _open(self, arrivals: Arrivals, seed: int) -> None:
        first = [n for n, job in enumerate(self._jobs) if job.follows is None]
        if arrivals.kind == "trace":
            dues = [(self._jobs[n].offset or 0.0) * arrivals.time_scale for n in first]
        else:
            dues = times(arrivals, len(first), seed)
        async with asyncio.TaskGroup() as tasks:
            for number, due in zip(first, dues, strict=True):
                letter = self._prepare(number, ())
                await self._connect()
                await self._until(due)
                tasks.create_task(self._conversation(letter, due))

    async def _connect(self) -> None:
        """A server that cannot be reached fails the request, not the run."""
        with contextlib.suppress(OSError):
            await self._wire.connect()

    async def _until(self, due: float) -> None:
        if (left := due - SPIN_S - self._now()) > 0:
            await asyncio.sleep(left)
        while self._now() < due:  # noqa: ASYNC110 - it is time that has to pass
            await asyncio.sleep(0)

    async def _conversation(self, letter: _Letter, due: float) -> None:
        """A job and those that follow it, one after the other."""
        while True:
            record = Record(job=letter.job, due=due, prompt_len=len(letter.prompt))
            await self._request(record, letter)
            self._records.append(record)
            number = self._next.get(letter.job)
            if number is None:
                return
            # Without the answer's tokens the conversation goes on as if it had been the prompt's.
            output_len = self._jobs[letter.job].output_len
            answer = record.token_ids or letter.prompt[:output_len]
            due = self._now() + self._jobs[number].think_s
            letter = self._prepare(number, (*letter.prompt, *answer))
            await self._until(due)

    def _prepare(self, number: int, said: tuple[int, ...]) -> _Letter:
        """Everything that can be done before a request is due."""
        job = self._jobs[number]
        prompt = said + job.prompt
        body = {
            "model": self._server.model,
            "prompt": prompt,
            "max_tokens": job.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **self._server.extra,
        }
        request = self._wire.post("/v1/completions", json.dumps(body).encode())
        return _Letter(number, prompt, request)

    async def _request(self, record: Record, letter: _Letter) -> None:
        self._running += 1
        self._progress(len(self._records), self._running)
        answer = Exchange()
        record.sent = self._now()
        try:
            async with asyncio.timeout(self._server.timeout_s):
                await self._wire.exchange(letter.request, answer)
        except TimeoutError:
            record.error = f"It took longer than {self._server.timeout_s:g} s."
        except (WireError, OSError) as error:
            record.error = f"{type(error).__name__}: {error}"
        record.ended, record.status = self._now(), answer.status
        chunks = [(moment - self._begin, chunk) for moment, chunk in answer.chunks]
        read(record, chunks, self._jobs[letter.job].output_len)
        self._running -= 1
        self._progress(len(self._records) + 1, self._running)


def read(record: Record, chunks: Sequence[tuple[float, bytes]], output_len: int) -> None:
    """Take down what an answer's chunks (time, bytes) say. An event counts at the time of the chunk
    that completed it."""
    if record.status and record.status != 200:
        text = b"".join(chunk for _, chunk in chunks).decode(errors="replace")
        record.error = f"HTTP {record.status}: {text[:ERROR_CHARS]}"
        return
    rest = b""
    for moment, chunk in chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                _note(record, moment, event[6:])
    count = len(record.token_times)
    if not record.error and count != output_len and record.finish_reason != "stop":
        record.error = f"{count} tokens came instead of {output_len}."


def _note(record: Record, moment: float, text: bytes) -> None:
    try:
        event = json.loads(text)
    except ValueError:
        record.error = f"The server sent an event that is no JSON: {text[:ERROR_CHARS]!r}"
        return
    if "error" in event:
        record.error = str(event["error"])[:ERROR_CHARS]
        return
    if usage := event.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens")
    record.timings = event.get("pdserve", record.timings)
    for choice in event.get("choices", ()):
        ids = choice.get("token_ids")
        count = len(ids) if ids is not None else int(bool(choice.get("text")))
        record.token_ids += ids or ()
        record.token_times += [moment] * count
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
