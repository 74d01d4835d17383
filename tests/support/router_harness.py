"""A router on a real socket with a real Redis and fake workers, in a thread of its own.

    with RedisProcess() as redis, RouterHarness(redis.url) as harness:
        worker = harness.add(Role.COLOCATED)
        harness.until_ready()
        httpx.get(harness.url + "/health")

Tests stay synchronous; `harness.run(coroutine)` runs something on the router's event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn
from fake_worker import SECRET, FakeWorker, Script
from redis import Redis
from redis.exceptions import RedisError

from pdserve.cluster.membership import Membership
from pdserve.cluster.records import Role
from pdserve.cluster.redis_server import find_redis_server
from pdserve.cluster.router_settings import RouterSettings
from pdserve.protocol.messages import Submit
from pdserve.router.app import Router, create_app
from pdserve.router.serving import protocol

WAIT_S = 10.0
TEXT = "Hello! A prefill worker reads the prompt, a decode worker writes the answer. 1 + 1 = 2 ☃ ok"
"""What fake workers answer."""

T = TypeVar("T")

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = BODY | {"max_tokens": 2000, "ignore_eos": True, "stream": True}


class RedisProcess:
    """A Redis of the tests' own, behind a Unix socket in a private folder."""

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="pdserve-redis-")
        self._path = Path(self._folder) / "redis.sock"
        self.url = f"unix://{self._path}"
        self.start()
        return self

    def start(self) -> None:
        """With nothing in it."""
        self._process = subprocess.Popen(
            [
                find_redis_server(),
                "--port",
                "0",
                "--unixsocket",
                str(self._path),
                "--save",
                "",
                "--dir",
                self._folder,
            ],
            stdout=subprocess.DEVNULL,
        )
        client = Redis.from_url(self.url)
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(RedisError):
                client.ping()
                break
            assert time.monotonic() < deadline and self._process.poll() is None, "no Redis"
            time.sleep(0.01)
        client.close()

    def stop(self) -> None:
        """As if it were killed."""
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class RouterHarness:
    """One router; every harness is a cluster of its own within the Redis, unless it is told one."""

    _numbers = itertools.count()

    def __init__(self, redis_url: str, **settings: Any) -> None:
        """`cluster`: that of another harness, for several routers of one cluster."""
        self._redis_url = redis_url
        self.cluster = settings.pop("cluster", f"test-{next(self._numbers)}")
        self.settings = RouterSettings(
            redis=redis_url,
            cluster=self.cluster,
            secret=SECRET,
            # Which way a prompt goes shall not depend on how long things took.
            **({"served_model_name": ("demo", "org/name"), "disaggregate": "always"} | settings),
        )
        self.workers: list[FakeWorker] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._app = create_app(self.settings)
        self.router: Router = self._app.state.router
        self._socket = socket.create_server(("127.0.0.1", 0))
        # asyncio leaves this to us for a socket that it did not make; without it an answer's second
        # packet waits 40 ms for the client's acknowledgement of the first.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self._app,
            http=protocol(self.settings),
            ws="none",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._membership = Membership(self._redis_url, self.cluster)
        self._thread.start()
        assert self._started.wait(WAIT_S)
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        for worker in self.workers:
            self.run(worker.__aexit__())
        leaked = self.router.dispatcher.in_flight
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        if error is None:
            assert leaked == 0, f"{leaked} answers are still in flight"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._loop.call_soon(self._started.set)
        await self._server.serve(sockets=[self._socket])
        await self._membership.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, run on the router's event loop."""
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(WAIT_S)

    def add(self, role: Role, script: Script | None = None, **options: Any) -> FakeWorker:
        """A further worker, serving when this returns (though the router may not know it yet)."""

        async def start() -> FakeWorker:
            worker = FakeWorker(self._membership, role, script or self.answer(TEXT), **options)
            return await worker.__aenter__()

        worker = self.run(start())
        self.workers.append(worker)
        return worker

    def answer(self, text: str) -> Script:
        """A script that says `text`, whatever is asked, and ends."""
        ids = self.router.model.tokenizer.encode(text, False)
        eos = self.router.model.eos_token_ids[0]

        def script(submit: Submit) -> list[int]:
            longest = submit.sampling.max_tokens
            if submit.sampling.ignore_eos:
                return (ids * (longest // len(ids) + 1))[:longest]
            return [*ids, eos]

        return script

    def wait(self, condition: Callable[[], bool], what: str = "") -> None:
        """Poll, from the test's thread, for what the router's loop brings about."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain {what or condition}"
            time.sleep(0.005)

    def until_connected(self, count: int | None = None) -> None:
        wanted = len([w for w in self.workers if not w.dead]) if count is None else count
        self.wait(lambda: len(self.router.pool.snapshot()) == wanted, "for workers")

    def until_idle(self) -> None:
        """Nothing is in flight at the router, nor running at a live worker."""
        self.wait(lambda: self.router.dispatcher.in_flight == 0, "for the router to be idle")
        self.wait(
            lambda: not any(w.running for w in self.workers if not w.dead), "for idle workers"
        )


def hold(worker: FakeWorker) -> None:
    worker.go.clear()


@contextlib.contextmanager
def asking(harness: RouterHarness, body: dict[str, Any]) -> Iterator[list[httpx.Response]]:
    """Post in a thread; the list holds the answer after the block."""
    found: list[httpx.Response] = []

    def post() -> None:
        found.append(httpx.post(harness.url + CHAT, json=body, timeout=10, trust_env=False))

    thread = threading.Thread(target=post)
    thread.start()
    try:
        yield found
    finally:
        thread.join(15)
