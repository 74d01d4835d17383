"""How long a stream pauses when its decode worker dies: `python -P -m pdserve.bench.recovery`.

Streams run over one prefill and two decode workers; in turn a decode worker is killed (SIGKILL: its
connections end, which is noticed at once), frozen (SIGSTOP: only its lease tells) or stuck (its
engine's thread is stopped, the rest of it lives and must notice; not everywhere possible). The
pause is the time from then to the next token at the client, of the streams that had a leg on that
worker; they are computed again by the other one. Limits:

    killed   one prefill + 0.5 s
    frozen   lease and the routers' looking + one prefill + 0.5 s
    stuck    the same

where one prefill is the time to the first token of a prompt as long as what must be computed again,
median of several, with nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from pdserve.bench.arrivals import BenchError
from pdserve.bench.figures import quantile
from pdserve.bench.halt import busiest_thread, halted
from pdserve.bench.machine import circumstances
from pdserve.bench.topology import NAME, Cluster, Topology, up
from pdserve.cluster.journal import Journal
from pdserve.cluster.membership import Membership
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.runfile import RunNote, running

KINDS = ("killed", "frozen", "stuck")
SHAPE = Topology(prefill=1, decode=2)
DETECTION_S = 3.0
"""A worker that stops renewing its lease is out within so long."""
SPARE_S = 0.5
BEFORE, AFTER = 40, 5
"""Tokens that every stream must have before the signal, and get after its pause."""
LONGEST_S = 60.0
KILLED_S, LOST_S = 1.0, 4.0
"""Looked at from outside, a worker that is stuck or frozen is lost."""
LOOK_S = 0.02


@dataclass(eq=False)
class Stream:
    """One client and what came to it."""

    url: str
    prompt: Sequence[int]
    answer_id: str = ""
    times: list[float] = field(default_factory=list)
    """When each token came, monotonic seconds."""

    async def run(self, tokens: int) -> None:
        """Until it has so many tokens, or is cancelled."""
        body = {
            "model": NAME, "prompt": self.prompt, "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        async with (
            httpx.AsyncClient(timeout=LONGEST_S, trust_env=False) as client,
            client.stream("POST", f"{self.url}/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise BenchError(f"A stream was refused: {(await response.aread())[:200]!r}.")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, object]) -> None:
        if "error" in event:
            raise BenchError(f"A stream broke: {event['error']}.")
        self.answer_id = str(event["id"])
        for choice in event["choices"]:  # type: ignore[attr-defined]
            self.times += [time.monotonic()] * len(choice.get("token_ids") or ())

    def pause_s(self, since: float) -> float:
        """From the signal to the end of the longest pause that was not over by then."""
        pairs = itertools.pairwise(self.times)
        longest = max((b - max(a, since), b) for a, b in pairs if b > since)
        return longest[1] - since


async def until(condition: Callable[[], bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Raises BenchError if it takes too long, and what a task raises."""
    end = time.monotonic() + LONGEST_S
    while not condition():
        for task in tasks:
            if task.done():
                task.result()
        if time.monotonic() > end:
            raise BenchError(f"Nothing happened for {LONGEST_S:g} s.")
        await asyncio.sleep(LOOK_S)


class Rounds:
    """Kills and freezes the decode workers of one cluster."""

    def __init__(self, cluster: Cluster, note: RunNote, args: argparse.Namespace) -> None:
        self._url = cluster.url
        self._membership = Membership(note.redis, note.cluster)
        self._journal = Journal(note.redis, note.cluster)
        self._args = args
        self._rng = random.Random(args.seed)
        self.lengths: list[int] = []
        """Tokens that were computed again."""

    async def close(self) -> None:
        await self._membership.close()
        await self._journal.close()

    def _stream(self, length: int) -> Stream:
        return Stream(self._url, self._rng.choices(range(10, self._args.vocab), k=length))

    async def prefill_s(self, length: int) -> float:
        """To the first token of a prompt of so many tokens; median of five."""
        found = []
        for _ in range(6):
            stream, began = self._stream(length), time.monotonic()
            await stream.run(1)
            found.append(stream.times[0] - began)
        return statistics.median(found[1:])

    async def once(self, kind: str) -> list[float]:
        """The pauses of the streams that have moved because their worker was `kind`."""
        streams = [self._stream(self._args.input_len) for _ in range(self._args.streams)]
        async with _running(streams, self._args.output_len) as tasks:
            await until(lambda: all(len(one.times) >= BEFORE for one in streams), tasks)
            victim, thread = await self._victim(kind)
            since = time.monotonic()
            with _trouble(kind, victim.pid, thread):
                # Tokens that were on their way come soon; those after them end the pause.
                await asyncio.sleep(KILLED_S if kind == "killed" else LOST_S)
                goals = [min(len(one.times) + AFTER, self._args.output_len) for one in streams]
                await until(
                    lambda: all(
                        len(one.times) >= goal for one, goal in zip(streams, goals, strict=True)
                    ),
                    tasks,
                )
        pauses = [one.pause_s(since) for one in streams if await self._moved(one, victim)]
        await self._back(victim)
        return pauses

    async def _victim(self, kind: str) -> tuple[WorkerRecord, int]:
        """A decode worker at random and, to be stuck, its engine's thread: one that computes."""
        workers = await self._decoders()
        self._rng.shuffle(workers)
        if kind != "stuck":
            return workers[0], 0
        for one in workers:
            with contextlib.suppress(BenchError):  # all streams are with others
                return one, busiest_thread(one.pid)
        raise BenchError("No decode worker computes.")

    async def _decoders(self) -> list[WorkerRecord]:
        records = await self._membership.workers()
        return [one for one in records if one.role is Role.DECODE]

    async def _moved(self, stream: Stream, victim: WorkerRecord) -> bool:
        """Whether it had a leg there that ended badly."""
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            record = await self._journal.find(stream.answer_id)
            if record is not None and record.state != "running":
                legs = record.answers[0].legs
                bad = [leg for leg in legs if leg.error and leg.epoch == victim.epoch]
                if bad:
                    self.lengths += [leg.chosen.tokens for leg in legs if leg.kind == "moved"]
                return bool(bad)
            await asyncio.sleep(LOOK_S)
        raise BenchError("A request has left no record.")

    async def _back(self, victim: WorkerRecord) -> None:
        """Until another incarnation serves."""
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            for one in await self._decoders():
                new = one.worker_id == victim.worker_id and one.epoch > victim.epoch
                if new and one.state is WorkerState.READY:
                    await asyncio.sleep(1.0)  # until the router has a channel to it
                    return
            await asyncio.sleep(LOOK_S)
        raise BenchError(f"{victim.worker_id} did not come back.")


@contextlib.contextmanager
def _trouble(kind: str, pid: int, thread: int) -> Iterator[None]:
    """What happens to a worker; one that is frozen or stuck goes on afterwards."""
    if kind == "stuck":
        with halted(thread):
            yield
        return
    os.kill(pid, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    try:
        yield
    finally:
        if kind == "frozen":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def _running(
    streams: Sequence[Stream], tokens: int
) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(stream.run(tokens)) for stream in streams]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(
    cluster: Cluster, args: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Pauses in seconds by what happened, and the time of one prefill."""
    note = next(one for one in running() if one.pid == cluster.process.pid)
    rounds = Rounds(cluster, note, args)
    try:
        found: dict[str, list[float]] = {kind: [] for kind in args.kinds.split(",")}
        for number in range(args.rounds):
            for name, pauses in found.items():
                pauses += await rounds.once(name)
                print(f"round {number + 1}: {name}, {len(pauses)} streams so far", file=sys.stderr)
        length = round(statistics.fmean(rounds.lengths)) if rounds.lengths else args.input_len
        return found, await rounds.prefill_s(length)
    finally:
        await rounds.close()


def told(name: str, pauses: Sequence[float], prefill_s: float) -> str:
    limit = prefill_s + SPARE_S + (0.0 if name == "killed" else DETECTION_S)
    ordered = sorted(pauses)
    p50, p99 = quantile(ordered, 0.5), quantile(ordered, 0.99)
    verdict = "within" if p99 <= limit else "OVER"
    return (
        f"  {name:<8}{len(ordered):>4} streams  p50 {p50:.3f}  p99 {p99:.3f}  worst "
        f"{ordered[-1]:.3f}  {verdict} the limit of {limit:.3f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m pdserve.bench.recovery", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--model", default="", help="folder or hub name (default: the demo model)")
    parser.add_argument("--input-len", type=int, default=200, help="tokens (default: 200)")
    parser.add_argument("--output-len", type=int, default=3000, help="tokens (default: 3000)")
    parser.add_argument("--streams", type=int, default=6, help="at a time (default: 6)")
    parser.add_argument("--rounds", type=int, default=10, help="of each kind (default: 10)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"what happens (default: {','.join(KINDS)})"
    )
    parser.add_argument("--vocab", type=int, default=1000, help="prompt token ids lie under this")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and victims (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file for figures and circumstances")
    args, more = parser.parse_known_args(argv)
    if unknown := set(args.kinds.split(",")) - set(KINDS):
        parser.error(f"--kinds takes {', '.join(KINDS)}; given: {', '.join(sorted(unknown))}.")
    model = [f"--model={args.model}"] if args.model else []
    with up([*SHAPE.options(), *model, *more]) as cluster:
        pauses, prefill_s = asyncio.run(measure(cluster, args))
    print(f"one prefill {prefill_s:.3f} s; seconds from the signal to the next token at the client")
    for name, values in pauses.items():
        print(told(name, values, prefill_s) if values else f"  {name:<8}nobody was there")
    if args.out:
        asked = {name: str(value) for name, value in vars(args).items()}
        result = {"arguments": asked, "circumstances": circumstances(), "pauses_s": pauses}
        args.out.write_text(json.dumps(result | {"prefill_s": prefill_s}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
