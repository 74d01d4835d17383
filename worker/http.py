"""The worker's HTTP face: health for orchestrators, metrics for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pdserve.cluster.records import WorkerRecord
from pdserve.protocol.messages import WorkerStatus

COUNTERS = {
    "steps",
    "step_tokens",
    "preemptions",
    "tickets_early",
    "bytes_in",
    "bytes_out",
    "bytes_early",
}
HELP = {
    "blocks_total": "KV blocks of this worker.",
    "blocks_free": "KV blocks in the free list.",
    "blocks_cached": "KV blocks in the prefix cache that nobody uses.",
    "blocks_held": "KV blocks in the outbox, waiting to be fetched.",
    "tickets": "Finished prefills in the outbox, waiting to be fetched.",
    "tickets_early": "Tickets that left while their prompt was still being computed.",
    "waiting": "Requests not yet started.",
    "running": "Requests in prefill or decode.",
    "fetching": "Requests whose KV blocks are on their way.",
    "queued_tokens": "Prompt tokens not yet computed.",
    "steps": "Engine steps.",
    "step_tokens": "Tokens that they computed.",
    "preemptions": "Requests that lost their blocks and are computed again.",
    "bytes_in": "KV bytes fetched from other workers.",
    "bytes_out": "KV bytes that other workers fetched.",
    "bytes_early": "Those of them whose prompt was still being computed.",
}


class StatusCollector:
    """Turns the last WorkerStatus into Prometheus families when asked."""

    def __init__(
        self, record: Callable[[], WorkerRecord], status: Callable[[], WorkerStatus | None]
    ) -> None:
        self._record = record
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        if status is None:
            return
        labels = {"worker": self._record().worker_id, "role": str(self._record().role)}
        for name, text in HELP.items():
            kind = CounterMetricFamily if name in COUNTERS else GaugeMetricFamily
            family = kind(f"pdserve_worker_{name}", text, labels=list(labels))
            family.add_metric(list(labels.values()), getattr(status, name))
            yield family


def create_app(
    record: Callable[[], WorkerRecord],
    status: Callable[[], WorkerStatus | None],
    alive: Callable[[], bool],
    secret: str,
) -> FastAPI:
    """/health and /metrics for anyone who reaches the port, /status for holders of the secret.
    `alive()`: whether the engine makes progress."""
    app = FastAPI(title="pdserve worker", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(record, status))

    @app.get("/health")
    def health() -> Response:
        ready = record().state == "ready" and alive()
        return Response(status_code=200 if ready else 503, headers={} if ready else RETRY)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/status")
    def status_(request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), secret.encode()):
            return Response('{"error":"Unauthorized"}', 401, media_type="application/json")
        full = msgspec.structs.replace(record(), status=status())
        return Response(msgspec.json.encode(full), media_type="application/json")

    return app


RETRY = {"Retry-After": "1"}


class HttpFace:
    """A uvicorn server inside a running event loop, which leaves signals alone."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self._socket = socket.create_server((host, port))
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        self._server = _QuietServer(config)
        self._task: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
