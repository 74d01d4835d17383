"""`pdserve drain` and `pdserve role`: orders to a running worker.

The command finds the worker's record in Redis, opens a channel to the worker itself, and proves
that it knows the cluster's secret. So an order reaches any host that routers reach, nobody who can
merely write to Redis can give one, and the worker's heartbeats tell how far it is.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pdserve.cluster.channel import Channel, connect
from pdserve.cluster.membership import Membership
from pdserve.cluster.options import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    load,
    one_of,
    option,
    options_of,
    seconds,
)
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.target import Target, TargetSettings, find_target
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.messages import ToOperator
from pdserve.protocol.orders import Drain, Order, OrderDone, SwitchRole

EXIT_UNFINISHED = 1
"""The worker has left, but its time was over before it had finished."""
ANSWER_S = 10.0
"""For everything but draining itself."""
LOOK_S = 0.1
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "both": Role.COLOCATED}

_SECRET = option(
    "", "Secret of the cluster, if --redis is given", secret=True, shown="that of `pdserve up`"
)
_WORKER = "Id of the worker, as `pdserve status` shows it"


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainSettings(TargetSettings):
    """What `pdserve drain` can be told."""

    timeout: float = option(
        600.0,
        "The worker leaves after so long even if it has not finished; its requests go on elsewhere",
        parse=seconds(0.0),
        unit="seconds",
    )
    secret: str = _SECRET


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSettings(TargetSettings):
    """What `pdserve role` can be told."""

    secret: str = _SECRET


def drain(argv: Sequence[str]) -> int:
    """Let a worker finish and leave; returns the exit code."""
    values = load(
        "pdserve drain",
        "Lets a worker finish what it has and what others must still fetch from it, and leave.",
        options_of(DrainSettings),
        argv,
        words={"worker": _WORKER},
    )
    worker_id = values.pop("worker")
    settings = DrainSettings(**values)

    async def run(target: Target, membership: Membership) -> int:
        return await _drain(target, membership, worker_id, settings.timeout)

    return _operate("pdserve drain", settings, settings.secret, run)


def role(argv: Sequence[str]) -> int:
    """Give a running worker another role; returns the exit code."""
    values = load(
        "pdserve role",
        "Switches a running worker to another role without loading anything; what it has goes on. "
        "A worker that is started again has the role of its command line.",
        options_of(RoleSettings),
        argv,
        words={"worker": _WORKER, "role": f"The new role: {', '.join(ROLES)}"},
    )
    worker_id, name = values.pop("worker"), values.pop("role")
    settings = RoleSettings(**values)

    async def run(target: Target, membership: Membership) -> int:
        try:
            chosen = ROLES[one_of(tuple(ROLES))(name)]
        except ValueError as error:
            raise PdserveError(f"ROLE {error}.") from None
        return await _switch(target, membership, worker_id, chosen, name)

    return _operate("pdserve role", settings, settings.secret, run)


def _operate(
    program: str,
    settings: TargetSettings,
    secret: str,
    run: Callable[[Target, Membership], Awaitable[int]],
) -> int:
    async def main() -> int:
        target = find_target(settings, secret)
        if not target.secret:
            raise PdserveError(
                "PDSERVE_SECRET is not set; workers take orders only from those who know the "
                "secret of their cluster."
            )
        membership = Membership(target.redis, target.cluster)
        try:
            return await run(target, membership)
        finally:
            await membership.close()

    try:
        return asyncio.run(main())
    except (PdserveError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; an order that was given is carried out all the same.")
        return EXIT_INTERRUPTED


async def _drain(target: Target, membership: Membership, worker_id: str, timeout_s: float) -> int:
    record = await _find(membership, worker_id)
    channel = await _open(target, record)
    try:
        order = Drain(epoch=record.epoch, timeout_s=timeout_s)
        done = await _carried_out(channel, order, timeout_s + ANSWER_S, _Progress(worker_id).show)
    finally:
        await channel.close()
    if done.requests or done.tickets:
        left = _count(done.requests, done.tickets)
        print(f"{worker_id} has left after {timeout_s:g} s with {left} unfinished.")
        return EXIT_UNFINISHED
    print(f"{worker_id} has finished and left.")
    return 0


async def _switch(
    target: Target, membership: Membership, worker_id: str, chosen: Role, name: str
) -> int:
    record = await _find(membership, worker_id)
    channel = await _open(target, record)
    try:
        order = SwitchRole(epoch=record.epoch, role=chosen)
        await _carried_out(channel, order, ANSWER_S, lambda requests, tickets: None)
    finally:
        await channel.close()
    deadline = time.monotonic() + ANSWER_S
    while (await _find(membership, worker_id)).role is not chosen:
        if time.monotonic() > deadline:
            raise PdserveError(f"{worker_id} took the order, but its record does not show it.")
        await asyncio.sleep(LOOK_S)
    print(f"{worker_id} has the role {name} now.")
    return 0


async def _find(membership: Membership, worker_id: str) -> WorkerRecord:
    """The worker's record. Raises PdserveError if there is none, or it takes no orders yet."""
    workers = await membership.workers()
    for record in workers:
        if record.worker_id == worker_id:
            if record.state is WorkerState.LOADING or not record.port:
                raise PdserveError(
                    f"{worker_id} is still loading and takes no orders; wait until it is ready, "
                    f"or stop its process {record.pid} on {record.host}."
                )
            return record
    known = ", ".join(record.worker_id for record in workers) or "none"
    raise PdserveError(f"There is no worker {worker_id!r} in this cluster; there: {known}.")


async def _open(target: Target, record: WorkerRecord) -> Channel:
    """A channel to the incarnation that the record means."""
    channel = await connect(
        record.host,
        record.port,
        secret=target.secret,
        name=f"operator-{socket.gethostname()}-{os.getpid()}",
        receives=ToOperator,
    )
    if (channel.peer, channel.epoch) != (record.worker_id, record.epoch):
        await channel.close()
        raise PdserveError(f"{record.worker_id} has just been started again; repeat the command.")
    return channel


async def _carried_out(
    channel: Channel, order: Order, within_s: float, progress: Callable[[int, int], None]
) -> OrderDone:
    """Give the order and wait for its end; `progress(requests, tickets left)` hears of each status.
    Raises PdserveError if it was refused, or the worker says nothing more."""
    channel.send(order)
    try:
        async with asyncio.timeout(within_s):
            async for message in channel:
                if isinstance(message, OrderDone):
                    if message.error is not None:
                        raise PdserveError(f"{channel.peer} refused: {message.error.message}")
                    return message
                status = message.status
                if status is not None and status.draining:
                    progress(status.running + status.waiting + status.fetching, status.tickets)
    except TimeoutError:
        raise PdserveError(f"{channel.peer} did not answer within {within_s:g} s.") from None
    raise PdserveError(
        f"{channel.peer} ended before it had carried out the order; `pdserve status` shows whether "
        "it is still there."
    )


class _Progress:
    """Prints what is left whenever that changes."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._shown = ""

    def show(self, requests: int, tickets: int) -> None:
        text = f"{self._worker_id}: {_count(requests, tickets)} left"
        if text != self._shown:
            self._shown = text
            print(text, flush=True)


def _count(requests: int, tickets: int) -> str:
    return f"{requests} request{'s' * (requests != 1)} and {tickets} ticket{'s' * (tickets != 1)}"
