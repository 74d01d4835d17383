"""The life of a worker process, the same for every role.

    join Redis (new epoch) → load (thread) → engine, channels, HTTP face → ready
        → serve until SIGTERM, SIGINT, a fault of the engine, or a newer incarnation → leave

Exit codes: 0 told to stop, 1 fault, 2 cannot work with what it was given, 3 fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from pdserve.cluster.channel import ChannelServer
from pdserve.cluster.membership import Membership
from pdserve.cluster.options import EXIT_USAGE
from pdserve.cluster.placement import Placement
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.settings import WorkerSettings, worker_settings
from pdserve.protocol.errors import PdserveError
from pdserve.protocol.messages import ToWorker
from pdserve.worker.assembly import Assembly, Compose, Context
from pdserve.worker.http import HttpFace, create_app
from pdserve.worker.presence import Presence
from pdserve.worker.reporter import Reporter
from pdserve.worker.service import RouterService

log = logging.getLogger(__name__)

STUCK_S = 120.0
"""An engine whose loop has not come around for so long is no longer alive."""
EXIT_FAULT, EXIT_FENCED = 1, 3


def main(argv: Sequence[str], role: Role, compose: Compose) -> int:
    """Run one worker to its end; returns the exit code."""
    settings = worker_settings(argv, role)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {settings.worker_id} %(name)s: %(message)s",
    )
    try:
        claim_cores(settings)
        return asyncio.run(WorkerProcess(settings, compose).run())
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
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


class WorkerProcess:
    """One incarnation of one worker."""

    def __init__(self, settings: WorkerSettings, compose: Compose) -> None:
        self._settings = settings
        self._compose = compose
        self._stop = asyncio.Event()
        self._engine_alive = lambda: True

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
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
        service = RouterService(epoch, lambda: assembly.traffic() if assembly else (0, 0))

        def progress(share: float, what: str) -> None:
            loop.call_soon_threadsafe(lambda: presence.update(progress=share, detail=what))

        context = Context(self._settings, epoch, service.sink, progress)
        loading = asyncio.create_task(asyncio.to_thread(self._compose, context))
        if not await self._unless_stopped(loading):
            await presence.leave()
            os._exit(0)  # the loading thread cannot be interrupted, and owns nothing outside
        assembly = loading.result()
        stack.callback(assembly.close)
        engine = assembly.engine
        reporter = Reporter(
            self._placement(stack), self._settings.worker_id, epoch, assembly.model.block_size
        )
        service.attach(engine, reporter.note)
        engine.listen()
        engine.start()
        stack.callback(engine.stop)
        self._engine_alive = lambda: engine.alive and time.monotonic() - engine.last_turn < STUCK_S

        server = ChannelServer(
            secret=self._settings.secret,
            worker_id=self._settings.worker_id,
            epoch=epoch,
            receives=ToWorker,
            on_channel=service.on_channel,
            host=self._settings.host,
            port=self._settings.port,
        )
        await stack.enter_async_context(server)
        app = create_app(lambda: presence.record, lambda: service.status, self._settings.secret)
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
        reporting = asyncio.create_task(reporter.run())
        stack.push_async_callback(reporter.leave)
        stack.callback(reporting.cancel)
        log.info("Ready on %s:%d, epoch %d.", self._settings.host, server.port, epoch)
        return await self._serve(presence, service, assembly)

    def _placement(self, stack: AsyncExitStack) -> Placement:
        placement = Placement(self._settings.redis, self._settings.cluster)
        stack.push_async_callback(placement.close)
        return placement

    async def _unless_stopped(self, task: asyncio.Task[Assembly]) -> bool:
        """Wait for the task; False if a signal came first."""
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return task.done()

    async def _serve(self, presence: Presence, service: RouterService, assembly: Assembly) -> int:
        while not self._stop.is_set():
            if presence.fenced.is_set():
                return EXIT_FENCED
            if not assembly.engine.alive:
                log.critical("The engine is dead: %r.", assembly.engine.failure)
                return EXIT_FAULT
            presence.note(status=service.status, routes=assembly.routes())
            # asyncio.timeout, as Python 3.11's wait_for may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._stop.wait()
        log.info("Told to stop.")
        return 0
