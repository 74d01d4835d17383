"""The life of a worker process, the same for every role.

    join Redis (new epoch) → load (thread) → engine, channels, HTTP face → ready
        → serve until an order, a signal, a fault of the engine, or a newer incarnation
        → drain (departure.py) → leave

Exit codes: 0 left as it was told to, 1 fault, 2 cannot work with what it was given, 3 fenced, 143
ended by a signal in the middle of its work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import astuple, dataclass

from pdserve.cluster.channel import ChannelServer
from pdserve.cluster.cores import thread_settings
from pdserve.cluster.membership import Membership
from pdserve.cluster.options import EXIT_USAGE
from pdserve.cluster.placement import Placement
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.settings import WorkerSettings, worker_settings
from pdserve.protocol.errors import ErrorCode, PdserveError, WorkerError
from pdserve.protocol.messages import ToWorker
from pdserve.protocol.orders import Drain, Order, OrderDone
from pdserve.worker.assembly import Assembly, Context
from pdserve.worker.departure import Departure, Remains
from pdserve.worker.grammars import Compiling
from pdserve.worker.http import HttpFace, create_app
from pdserve.worker.presence import Presence
from pdserve.worker.reporter import Reporter
from pdserve.worker.service import RouterService

log = logging.getLogger(__name__)

EXIT_FAULT, EXIT_FENCED = 1, 3
NOBODY = 0
"""The epoch that whoever comes meets while no incarnation is registered."""
LOOK_S = 0.25
"""Between two looks at how things are; while it drains, a fifth of it."""


def main(argv: Sequence[str], role: Role) -> int:
    """Run one worker to its end; returns the exit code."""
    settings = worker_settings(argv, role)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {settings.worker_id} %(name)s: %(message)s",
    )
    try:
        claim_cores(settings)
        return asyncio.run(WorkerProcess(settings).run())
    except (PdserveError, OSError) as error:
        print(f"{settings.worker_id}: error: {error}", file=sys.stderr)
        return EXIT_USAGE


def claim_cores(settings: WorkerSettings) -> None:
    """Pin this process and size the libraries' thread pools, before any of them is loaded."""
    if settings.cpus:
        try:
            os.sched_setaffinity(0, settings.cpus)
        except (OSError, ValueError, OverflowError) as error:
            wanted = ",".join(map(str, settings.cpus))
            there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            raise PdserveError(
                f"--cpus {wanted} cannot be had; this process may run on the cores {there}."
            ) from error
    threads = settings.threads or len(os.sched_getaffinity(0))
    os.environ.update(thread_settings(threads))


def _compose(context: Context) -> Assembly:
    """Imported on the loading thread, so that the record is in Redis before torch is loaded."""
    from pdserve.worker.compose import compose

    return compose(context)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a worker that serves consists of."""

    presence: Presence
    service: RouterService
    server: ChannelServer
    reporter: Reporter
    assembly: Assembly


class WorkerProcess:
    """One incarnation of one worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._departure = Departure(settings.drain_timeout)
        self._engine_alive = lambda: True

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._departure.signal)
        async with AsyncExitStack() as stack:
            membership = Membership(self._settings.redis, self._settings.cluster)
            stack.push_async_callback(membership.close)
            epoch = await membership.next_epoch(self._settings.worker_id)
            presence = Presence(membership, self._first_record(epoch), self._alive)
            renewing = asyncio.create_task(presence.run())
            stack.callback(renewing.cancel)
            stack.push_async_callback(presence.leave)
            return await self._live(stack, presence, epoch)

    def _first_record(self, epoch: int) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self._settings.worker_id,
            epoch=epoch,
            role=self._settings.role,
            state=WorkerState.LOADING,
            host=self._settings.host,
            port=0,
            http_port=0,
            pid=os.getpid(),
            detail="starting",
            cpus=tuple(sorted(os.sched_getaffinity(0))),
        )

    def _alive(self) -> bool:
        return self._engine_alive()

    async def _live(self, stack: AsyncExitStack, presence: Presence, epoch: int) -> int:
        loop = asyncio.get_running_loop()
        assembly: Assembly | None = None
        service = RouterService(
            epoch,
            lambda: assembly.traffic() if assembly else (0, 0, 0),
            self._alive,
            measures=lambda: assembly.measures() if assembly else None,
        )

        def progress(share: float, what: str) -> None:
            loop.call_soon_threadsafe(lambda: presence.update(progress=share, detail=what))

        context = Context(self._settings, epoch, service.sink, progress)
        loading = asyncio.create_task(asyncio.to_thread(_compose, context))
        while not loading.done():
            await asyncio.wait({loading}, timeout=LOOK_S / 5)
            if self._departure.begun:
                await presence.leave()
                # The loading thread cannot be interrupted, and owns nothing outside.
                os._exit(self._departure.code(Remains(0, 0)))
        assembly = loading.result()
        stack.callback(assembly.close)
        engine = assembly.engine
        reporter = Reporter(
            self._placement(stack), self._settings.worker_id, epoch, assembly.model.block_size
        )
        executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        service.attach(
            engine,
            reporter.note,
            lambda order, answer: self._obey(order, answer, presence),
            Compiling(assembly.grammars, executor),
        )
        engine.listen()
        engine.start()
        stack.callback(engine.stop)
        self._engine_alive = lambda: engine.alive and not engine.pace.stuck

        server = await self._open(stack, presence, service, assembly)
        reporting = asyncio.create_task(reporter.run())
        stack.push_async_callback(reporter.leave)
        stack.callback(reporting.cancel)
        log.info("Ready on %s:%d, epoch %d.", self._settings.host, server.port, epoch)
        return await self._serve(_Parts(presence, service, server, reporter, assembly))

    async def _open(
        self, stack: AsyncExitStack, presence: Presence, service: RouterService, assembly: Assembly
    ) -> ChannelServer:
        """Channels and HTTP face; from now on the record says where they are."""
        server = ChannelServer(
            secret=self._settings.secret,
            worker_id=self._settings.worker_id,
            epoch=presence.record.epoch,
            receives=ToWorker,
            on_channel=service.on_channel,
            host=self._settings.host,
            port=self._settings.port,
        )
        await stack.enter_async_context(server)
        app = create_app(
            lambda: presence.record, lambda: service.status, self._alive, self._settings.secret
        )
        face = HttpFace(app, self._settings.host, self._settings.http_port)
        await face.start()
        stack.push_async_callback(face.close)
        presence.update(
            state=WorkerState.READY,
            port=server.port,
            http_port=face.port,
            progress=1.0,
            detail="ready",
            model=assembly.model,
            transports=assembly.transports,
        )
        return server

    def _placement(self, stack: AsyncExitStack) -> Placement:
        placement = Placement(self._settings.redis, self._settings.cluster)
        stack.push_async_callback(placement.close)
        return placement

    def _obey(self, order: Order, answer: Callable[[OrderDone], None], presence: Presence) -> None:
        """An operator's order."""
        log.info("Ordered: %s.", order)
        if isinstance(order, Drain) and not 0 <= order.timeout_s < float("inf"):
            text = f"A drain takes a number of seconds of at least 0; given: {order.timeout_s}."
            answer(OrderDone(error=WorkerError(code=ErrorCode.INVALID_REQUEST, message=text)))
        elif isinstance(order, Drain):
            self._departure.order(
                order.timeout_s,
                lambda left: answer(OrderDone(requests=left.requests, tickets=left.tickets)),
            )
        elif self._departure.begun:
            text = "This worker is leaving; its role cannot be changed any more."
            answer(OrderDone(error=WorkerError(code=ErrorCode.DRAINING, message=text)))
        else:
            presence.update(role=order.role)
            answer(OrderDone())

    async def _lapse(self, parts: _Parts) -> None:
        """The lease has lapsed: routers have moved what was here, or learn now, by the end of their
        channels, that they must. If the engine makes progress again, end all of it, tickets
        included, and register as another incarnation; until then, and until Redis gives out its
        number, this is to be called again."""
        if not self._alive():
            await parts.server.begin(NOBODY)
        epoch = await parts.presence.next_epoch() if self._alive() else None
        if epoch is None:
            await self._departure.news(LOOK_S)
            return
        log.warning("Begin anew with epoch %d; requests and tickets so far end.", epoch)
        parts.service.begin(epoch)
        parts.assembly.begin_epoch(epoch)
        await parts.server.begin(epoch)
        parts.reporter.begin(epoch)
        parts.presence.begin(epoch)

    async def _serve(self, parts: _Parts) -> int:
        presence, service, assembly = parts.presence, parts.service, parts.assembly
        departure = self._departure
        while True:
            if presence.fenced.is_set():
                return EXIT_FENCED
            if not assembly.engine.alive:
                log.critical("The engine is dead: %r.", assembly.engine.failure)
                return EXIT_FAULT
            if presence.lapsed and not departure.begun:
                await self._lapse(parts)
                continue
            presence.note(status=service.status, routes=assembly.routes(), speeds=assembly.speeds())
            if not departure.begun:
                await departure.news(LOOK_S)
                continue
            if presence.record.state is not WorkerState.DRAINING:
                log.info("Draining.")
                service.drain()
                presence.update(state=WorkerState.DRAINING, detail="draining")
            remains = await service.remains(LOOK_S)
            if departure.at_once or not remains:
                log.info("Leaving with %d requests and %d tickets.", *astuple(remains))
                await presence.leave()
                departure.say_farewell(remains)
                return departure.code(remains)
            await departure.news(LOOK_S / 5)
