"""Which processes a cluster consists of, and how each is started. Pure decisions."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cluster.cores import Share, thread_settings
from pdserve.cluster.options import ENVIRONMENT_PREFIX
from pdserve.cluster.process import Command
from pdserve.cluster.records import Role
from pdserve.cluster.router_settings import RouterSettings
from pdserve.cluster.settings import (
    UpSettings,
    WorkerSettings,
    arguments,
)

_MODULES = {
    Role.PREFILL: ["pdserve.prefill_worker"],
    Role.DECODE: ["pdserve.decode_worker"],
    Role.COLOCATED: ["pdserve.decode_worker", "--accept-prompts"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """The processes of a cluster, Redis apart."""

    workers: tuple[Command, ...]
    """Named by their worker ids."""
    routers: tuple[Command, ...]
    """All of them listen on one port."""


def cluster_secret(settings: UpSettings) -> str:
    """The secret that was given, or a fresh one."""
    return settings.router.secret or secrets.token_urlsafe(32)


def roles_of(settings: UpSettings) -> list[Role]:
    """One role per worker, in the order in which cores are given out."""
    return [
        *[Role.PREFILL] * settings.prefill,
        *[Role.DECODE] * settings.decode,
        *[Role.COLOCATED] * settings.colocated,
    ]


def plan_cluster(
    settings: UpSettings,
    shares: Sequence[Share],
    *,
    redis: str,
    secret: str,
    port: int,
    logs: Path,
    environment: Mapping[str, str],
) -> ClusterPlan:
    """The commands of all workers and routers. `shares`: one per worker, in `roles_of` order."""
    base = {
        name: value
        for name, value in environment.items()
        if not name.startswith(ENVIRONMENT_PREFIX)
    } | {"PYTHONUNBUFFERED": "1"}
    common: dict[str, Any] = {"redis": redis, "secret": secret}
    # Several launchers may share a Redis of the user's; in a private one short names are unique.
    suffix = f"-{socket.gethostname()}-{os.getpid()}" if settings.redis else ""
    own = {Role.PREFILL: settings.prefill_options, Role.DECODE: settings.decode_options}
    workers, counts = [], dict.fromkeys(Role, 0)
    for role, share in zip(roles_of(settings), shares, strict=True):
        worker = dataclasses.replace(
            dataclasses.replace(settings.worker, **dict(own.get(role, ()))),
            role=role,
            worker_id=f"{role}-{counts[role]}{suffix}",
            threads=share.threads,
            cpus=share.cpus,
            drain_timeout=0.0,  # who stops the whole cluster waits for nobody
            **common,
        )
        counts[role] += 1
        workers.append(worker_command(worker, logs, base))
    several = settings.routers > 1
    shared = several or settings.router.share_port
    router = dataclasses.replace(settings.router, port=port, share_port=shared, **common)
    names = [f"router-{index}" for index in range(settings.routers)] if several else ["router"]
    routers = tuple(router_command(router, name, logs, base) for name in names)
    return ClusterPlan(workers=tuple(workers), routers=routers)


def worker_command(settings: WorkerSettings, logs: Path, base: Mapping[str, str]) -> Command:
    argv, environment = arguments(settings)
    return Command(
        name=settings.worker_id,
        argv=[sys.executable, "-P", "-m", *_MODULES[settings.role], *argv],
        env={**base, **thread_settings(settings.threads), **environment},
        log=logs / f"{settings.worker_id}.log",
    )


def router_command(
    settings: RouterSettings, name: str, logs: Path, base: Mapping[str, str]
) -> Command:
    argv, environment = arguments(settings)
    return Command(
        name=name,
        argv=[sys.executable, "-P", "-m", "pdserve.router", *argv],
        env={**base, **environment},
        log=logs / f"{name}.log",
    )
