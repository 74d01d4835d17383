"""`pdserve status`: who is in the cluster, as a table or as JSON."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdserve.cluster.membership import Membership, masked
from pdserve.cluster.options import EXIT_USAGE, load, option, options_of
from pdserve.cluster.records import WorkerRecord, WorkerState
from pdserve.cluster.requests import RequestRecords
from pdserve.cluster.target import TargetSettings, find_target
from pdserve.protocol.errors import PdserveError

_STORY = (
    "Prints the workers of a cluster: by default of the one that `pdserve up` runs on this machine."
)
HEADINGS = (
    "WORKER", "ROLE", "STATE", "EPOCH", "PID", "RUNNING", "WAITING", "FREE", "HELD", "TOTAL",
    "TRANSPORTS", "ADDRESS",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusSettings(TargetSettings):
    """What `pdserve status` can be told."""

    json: bool = option(False, "Print everything that is known, as JSON")


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is printed with --json."""

    cluster: str
    url: str
    """Of the router, if `pdserve up` runs on this machine."""
    redis: str
    workers: list[WorkerRecord]
    routers: dict[str, int] = {}
    """How many requests each carries."""


def status(argv: Sequence[str]) -> int:
    """Print the state of a cluster; returns the exit code."""
    values = load("pdserve status", _STORY, options_of(StatusSettings), argv)
    settings = StatusSettings(**values)
    try:
        snapshot = asyncio.run(_ask(settings))
    except PdserveError as error:
        print(f"pdserve status: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if settings.json:
        print(msgspec.json.format(msgspec.json.encode(snapshot), indent=2).decode())
    else:
        print(as_table(snapshot))
    return 0


async def _ask(settings: StatusSettings) -> Snapshot:
    target = find_target(settings)
    membership = Membership(target.redis, target.cluster)
    records = RequestRecords(target.redis, target.cluster)
    try:
        workers = await membership.workers()
        routers = await records.routers()
    finally:
        await membership.close()
        await records.close()
    return Snapshot(
        cluster=target.cluster,
        url=target.url,
        redis=masked(target.redis),
        workers=workers,
        routers=dict(routers),
    )


def as_table(snapshot: Snapshot) -> str:
    """One line per worker under the headings, blocks in KV blocks; then the routers."""
    rows = [HEADINGS, *map(_row, snapshot.workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    title = f"cluster {snapshot.cluster} at {snapshot.url or snapshot.redis}"
    carried = [f"{name}: {count} requests" for name, count in sorted(snapshot.routers.items())]
    return "\n".join([title, *(lines if snapshot.workers else ["no workers"]), *carried])


def _transports(record: WorkerRecord) -> str:
    """Those in use, by source, with the speed if known; before any block has come, those that there
    are."""
    if record.routes:
        return ",".join(_route(record, source) for source in sorted(record.routes))
    return ",".join(record.transports) or "-"


def _route(record: WorkerRecord, source: str) -> str:
    name = record.routes[source]
    speed = record.speeds.get(source, {}).get(name)
    return f"{source}:{name}" + (f"@{speed / 1e9:.2g}GB/s" if speed else "")


def _row(record: WorkerRecord) -> tuple[str, ...]:
    load = record.status
    state = str(record.state)
    if record.state is WorkerState.LOADING:
        state = f"{record.detail or state} {record.progress:.0%}"
    free = load.blocks_free + load.blocks_cached if load else "-"
    return (
        record.worker_id,
        str(record.role),
        state,
        str(record.epoch),
        str(record.pid),
        str(load.running + load.fetching if load else "-"),
        str(load.waiting if load else "-"),
        str(free),
        str(load.blocks_held if load else "-"),
        str(load.blocks_total if load else "-"),
        _transports(record),
        f"{record.host}:{record.port}" if record.port else "-",
    )
