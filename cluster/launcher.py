"""`pdserve up`: one cluster on one machine, from nothing to `ready`, and back to nothing.

    check what can be checked ─► Redis ─► workers and router, all at once ─► every worker ready
        ─► two tokens through the router ─► "ready" ─► watch, restart ─► SIGTERM: stop all

Every process is under a Supervisor. The launcher itself loads no torch and does next to nothing
once the cluster runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pdserve.cluster.console import Console
from pdserve.cluster.cores import divide, own_cores, own_quota
from pdserve.cluster.membership import Membership, RedisUnavailable, masked
from pdserve.cluster.model_files import check_model, resolve_model
from pdserve.cluster.options import EXIT_USAGE
from pdserve.cluster.plan import ClusterPlan, cluster_secret, plan_cluster, roles_of
from pdserve.cluster.process import Child, Command, stop
from pdserve.cluster.records import WorkerRecord, WorkerState
from pdserve.cluster.redis_server import (
    PrivateRedis,
    RedisServerError,
    private_folder,
    private_redis,
    until_answering,
)
from pdserve.cluster.runfile import RunNote, own_age_s, running, start_ticks, write_note
from pdserve.cluster.settings import UpSettings, up_settings
from pdserve.cluster.supervisor import GaveUp, Supervisor
from pdserve.cluster.tls import TlsError, server_context
from pdserve.protocol.errors import PdserveError

if TYPE_CHECKING:
    from pdserve.cluster.probe import Probe, Proof

PlanMaker = Callable[..., ClusterPlan]
"""`plan_cluster`, or what tests put in its place."""
EXIT_FAULT = 1
GRACE_S = 3.0
"""From SIGTERM to SIGKILL for workers and router; then Redis gets REDIS_GRACE_S."""
REDIS_GRACE_S = 1.0
LOOK_S = 0.05
"""Between two looks at the workers' records while they start."""
WATCH_S = 0.5
WEDGED_S = 5.0
"""A worker without a lease is killed and replaced after so long: it is frozen, or its engine makes
no progress."""
PROBE_S = 60.0
"""From the last worker's readiness to the first tokens."""


def up(argv: Sequence[str], make_plan: PlanMaker = plan_cluster) -> int:
    """Run a cluster until it is told to stop; returns the exit code."""
    settings = up_settings(argv)
    console = Console(sys.stdout)
    try:
        check_tls(settings)
        with_model = find_model(settings)
        reserved = reserve_port(settings.router.host, settings.router.port)
    except PdserveError as error:
        return _complain(error, EXIT_USAGE)
    with reserved:
        try:
            with Scene.make(with_model) as scene:
                port = reserved.number
                return asyncio.run(Launcher(with_model, scene, port, console, make_plan).run())
        except GaveUp as error:
            return _complain(error, error.exit_code)
        except (RedisUnavailable, RedisServerError, SceneError) as error:
            return _complain(error, EXIT_USAGE)
        except PdserveError as error:
            return _complain(error, EXIT_FAULT)


def _complain(error: PdserveError, code: int) -> int:
    print(f"pdserve up: error: {error}", file=sys.stderr)
    return code


def check_tls(settings: UpSettings) -> None:
    """Raises TlsError."""
    server_context(settings.router)
    if settings.router.ssl_cert_reqs == "2":
        raise TlsError(
            "--ssl-cert-reqs 2 demands a certificate of every client, and `pdserve up` has none "
            "to ask for its first tokens with; give 1, or start the processes one by one."
        )


def find_model(settings: UpSettings) -> UpSettings:
    """Settings in which the model is a folder that exists, downloaded if need be.

    A model of the hub keeps its name towards clients. Raises ModelError.
    """
    model = settings.router.model
    folder = resolve_model(model)
    check_model(folder, weights=settings.worker.load_format != "dummy")
    if not model or Path(model).expanduser().is_dir():
        return settings
    names = settings.router.served_model_name or (model,)
    found: dict[str, Any] = {"model": str(folder), "served_model_name": names}
    return dataclasses.replace(
        settings,
        router=dataclasses.replace(settings.router, **found),
        worker=dataclasses.replace(settings.worker, **found),
    )


class SceneError(PdserveError):
    """Something around the cluster is not as it must be: a port, a folder."""


@dataclass(frozen=True, slots=True)
class ReservedPort:
    """A port that is ours, as a context.

    Its socket is bound and never listens: so the system gives the port to nobody who asks for any,
    while the router starts or restarts. But until the router listens, it lets others bind it as
    well; among launchers a name in the abstract namespace of Unix sockets, which only one process
    can have and which ends with it, says whose the port is."""

    number: int
    _socket: socket.socket
    _lock: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._lock.close()


def reserve_port(host: str, port: int) -> ReservedPort:
    """Take the port (0: any free one). Raises SceneError if it cannot be had."""
    in_use = (
        f"Port {port} on {host} is in use: stop what listens there, or give another --port (0 "
        "takes any free one)."
    )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
    except OSError as error:
        raise SceneError(f"--host {host} is no address: {error.strerror}.") from None
    reserved = socket.socket(family, kind, protocol)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        reasons = {
            errno.EADDRINUSE: in_use,
            errno.EACCES: f"Port {port} may not be used by this user; give a --port above 1023.",
            errno.EADDRNOTAVAIL: f"--host {host} is not an address of this machine.",
        }
        text = f"Port {port} on {host} cannot be had: {error.strerror}."
        raise SceneError(reasons.get(error.errno or 0, text)) from None
    name, number = reserved.getsockname()[:2]
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0pdserve-up-{name}-{number}")
    except OSError:
        reserved.close()
        lock.close()
        raise SceneError(in_use) from None
    return ReservedPort(number, reserved, lock)


@dataclass(frozen=True, slots=True)
class Scene:
    """The folders of one run; as a context it leaves nothing behind."""

    folder: Path
    """Private and temporary: the socket of Redis."""
    logs: Path

    @staticmethod
    def make(settings: UpSettings) -> Scene:
        running()  # cleans up behind launchers that were killed
        folder = private_folder()
        logs = Path(settings.log_dir).expanduser().resolve() if settings.log_dir else folder
        try:
            logs.mkdir(parents=True, exist_ok=True)
            probe = logs / f".pdserve-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SceneError(f"--log-dir {logs} cannot be written: {error.strerror}.") from None
        return Scene(folder, logs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Launcher:
    """One run of `pdserve up`."""

    def __init__(
        self,
        settings: UpSettings,
        scene: Scene,
        port: int,
        console: Console,
        make_plan: PlanMaker = plan_cluster,
    ) -> None:
        self._settings = settings
        self._scene = scene
        self._console = console
        scheme = "https" if settings.router.ssl_certfile else "http"
        self._url = f"{scheme}://{_reachable(settings.router.host)}:{port}"
        self._private: PrivateRedis | None = None
        if not settings.redis:
            self._private = private_redis(scene.folder, scene.logs / "redis.log")
        self._redis_url = self._private.url if self._private else settings.redis
        self._secret = cluster_secret(settings)
        self._plan = make_plan(
            settings,
            divide(own_cores(), len(roles_of(settings)), own_quota()),
            redis=self._redis_url,
            secret=self._secret,
            port=port,
            logs=scene.logs,
            environment=os.environ,
        )
        self._redis: Supervisor | None = None
        self._workers: list[Supervisor] = []
        self._routers: list[Supervisor] = []
        self._seen_at: dict[str, float] = {}
        """When a worker's lease was last seen (monotonic)."""
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Until a signal (0), or raises what made it impossible."""
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, told)
        note = write_note(self._note())
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(told.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            return 0
        finally:
            await _end([stopping, serving])
            self._console.settle()
            await self._stop_all()
            note.unlink(missing_ok=True)

    def _on_signal(self, told: asyncio.Event) -> None:
        """The first signal asks, the second one does not."""
        if told.is_set():
            for supervisor in self._all():
                supervisor.kill()
        else:
            self._console.say("Stopping.")
        told.set()

    def _note(self) -> RunNote:
        return RunNote(
            pid=os.getpid(),
            started=start_ticks(os.getpid()) or 0,
            url=self._url,
            redis=self._redis_url,
            cluster=self._settings.router.cluster,
            log_dir=str(self._scene.logs),
            folder=str(self._scene.folder),
            secret=self._secret,
        )

    # starting

    async def _serve(self) -> None:
        """Start everything and watch it; ends only by an exception."""
        membership = Membership(self._redis_url, self._settings.router.cluster)
        probe: Probe | None = None
        try:
            await self._start_redis(membership)
            self._workers = [self._supervise(command, True) for command in self._plan.workers]
            self._routers = [self._supervise(command) for command in self._plan.routers]
            await asyncio.sleep(0)  # the processes start now; what follows overlaps with theirs
            probe = _make_probe(self._url, self._settings.router.api_key)
            watching = asyncio.create_task(self._watch(membership, probe))
            self._tasks.append(watching)
            # A supervisor whose worker has left ends without an exception; the rest go on.
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            await _end(self._tasks)
            if probe is not None:
                await probe.close()
            await membership.close()

    async def _start_redis(self, membership: Membership) -> None:
        if self._private is None:
            await membership.workers()
            self._console.say(f"Redis: {masked(self._redis_url)}")
            return
        self._redis = self._supervise(self._private.command)
        await asyncio.sleep(0)  # lets its supervisor start it
        child = self._redis.child
        if child is None:
            raise RedisServerError(f"{self._private.command.argv[0]} cannot be started.")
        await until_answering(self._private.url, child)
        self._redis.mark_ready()

    def _supervise(self, command: Command, may_leave: bool = False) -> Supervisor:
        supervisor = Supervisor(command, self._console.say, may_leave=may_leave)
        self._tasks.append(asyncio.create_task(supervisor.run()))
        return supervisor

    def _all(self) -> list[Supervisor]:
        redis = [] if self._redis is None else [self._redis]
        return [*self._workers, *self._routers, *redis]

    # watching

    async def _watch(self, membership: Membership, probe: Probe) -> None:
        """Wait for readiness and say so; then see restarted processes become ready again."""
        deadline = time.monotonic() + self._settings.start_timeout_s
        while not all(worker.ready or worker.left for worker in self._workers):
            await self._look(membership)
            if time.monotonic() > deadline:
                raise GaveUp(self._too_late(), EXIT_FAULT)
            await asyncio.sleep(LOOK_S)
        self._console.show("router", "waiting for it")
        while not all(router.ready for router in self._routers):
            await self._look_at_routers(probe)
            if time.monotonic() > deadline:
                raise GaveUp(self._too_late(), EXIT_FAULT)
            await asyncio.sleep(LOOK_S)
        self._console.show("router", "asking for a first token")
        proof = await probe.two_tokens(PROBE_S)
        self._console.show("router", "ready")
        self._announce(proof, own_age_s())
        while True:
            await asyncio.sleep(WATCH_S)
            await self._look(membership)
            if not all(router.ready for router in self._routers):
                await self._look_at_routers(probe)

    async def _look_at_routers(self, probe: Probe) -> None:
        """Ask whoever answers at the port; with several routers that is now this one, now that."""
        pid = await probe.healthy()
        for router in self._routers:
            if pid is not None and router.child is not None and pid in (0, router.child.pid):
                router.mark_ready()

    async def _look(self, membership: Membership) -> None:
        """Read the records and tell who became ready."""
        try:
            records = {record.worker_id: record for record in await membership.workers()}
        except RedisUnavailable:
            self._seen_at.clear()  # without Redis nobody can renew
            return  # its supervisor is at work, or it is the user's and comes back
        if self._redis is not None:
            self._redis.mark_ready()
        for worker in self._workers:
            record = records.get(worker.name)
            if record is None or worker.child is None or record.pid != worker.child.pid:
                self._end_if_wedged(worker)
                continue
            self._seen_at[worker.name] = time.monotonic()
            if not worker.ready:
                self._show(record)
                if record.state is not WorkerState.LOADING:
                    worker.mark_ready()

    def _end_if_wedged(self, worker: Supervisor) -> None:
        """A worker that was ready has no lease: after a while its supervisor replaces it."""
        now = time.monotonic()
        if worker.ready and now - self._seen_at.setdefault(worker.name, now) > WEDGED_S:
            del self._seen_at[worker.name]
            self._console.say(f"{worker.name} has not renewed its lease for {WEDGED_S:g} s.")
            worker.kill()

    def _show(self, record: WorkerRecord) -> None:
        if record.state is WorkerState.LOADING:
            self._console.show(record.worker_id, record.detail, record.progress or None)
        else:
            self._console.show(record.worker_id, str(record.state))

    def _too_late(self) -> str:
        waiting = [w.name for w in self._workers if not (w.ready or w.left)] or [
            router.name for router in self._routers if not router.ready
        ]
        return (
            f"The cluster was not ready within {self._settings.start_timeout_s:g} s; still waiting "
            f"for {', '.join(waiting)}. Give more time with --start-timeout-s."
        )

    def _announce(self, proof: Proof, took_s: float) -> None:
        """Exactly one line begins with `ready`."""
        self._console.settle()
        body = (
            f'{{"model": "{proof.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        )
        certificate = self._settings.router.ssl_certfile
        trust = f" --cacert {certificate}" if certificate else ""
        key = ' -H "Authorization: Bearer $API_KEY"' if self._settings.router.api_key else ""
        self._console.say(f"Up after {took_s:.1f} s; model {proof.model}; try:")
        self._console.say(
            f"  curl{trust} {self._url}/v1/chat/completions "
            f"-H 'Content-Type: application/json'{key} -d '{body}'"
        )
        self._console.say(f"Logs: {self._scene.logs}; `pdserve status` shows the workers.")
        self._console.say(f"ready {self._url}")

    # stopping

    async def _stop_all(self) -> None:
        """Workers and router first, so that they can take their leave in Redis."""
        redis = self._redis.stop() if self._redis is not None else None
        others = [s.stop() for s in self._all() if s is not self._redis]
        await stop([child for child in others if child is not None], GRACE_S)
        remaining: list[Child] = [] if redis is None else [redis]
        await stop(remaining, REDIS_GRACE_S)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended. Once may not be enough: Python 3.11's wait_for, which
    libraries use, swallows a cancellation that comes together with its result."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.1)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen; what matters was raised already


def _make_probe(url: str, api_keys: tuple[str, ...]) -> Probe:
    """Imported late: the processes of the cluster start meanwhile."""
    from pdserve.cluster.probe import Probe

    return Probe(url, api_keys)


def _reachable(host: str) -> str:
    """How a client on this machine addresses a server that listens on `host`."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if ":" in host:
        return "[::1]" if host == "::" else f"[{host}]"
    return host
