"""What is known of workers without a channel."""

from __future__ import annotations

import random

from pdserve.cluster.placement import LoadReport
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.router.survey import MOST_SURVEYED, Survey, sample, unlinked


def record(name: str, state: WorkerState = WorkerState.READY) -> WorkerRecord:
    return WorkerRecord(
        worker_id=name, epoch=1, role=Role.PREFILL, state=state, host="", port=1, http_port=1, pid=1
    )


def test_who_was_not_looked_at_is_like_those_who_were() -> None:
    reports = {"a": LoadReport(100, 4, 50, 2), "b": LoadReport(300, 6, 70, 4)}
    found = Survey(reports, of=10)
    assert found.waiting == 30
    known, usual = found.load_of(record("a"), False), found.load_of(record("c"), True)
    assert (known.queued_tokens, known.requests, known.free_tokens) == (100, 4, 50)
    assert (usual.queued_tokens, usual.requests, usual.free_tokens) == (200, 5, None)
    assert usual.shunned and not known.shunned


def test_nothing_seen_is_nothing_to_do() -> None:
    load = Survey().load_of(record("a"), False)
    assert (load.queued_tokens, load.requests, load.free_tokens) == (0, 0, None)
    assert Survey().waiting == Survey({}, of=5).waiting == 0


def test_a_look_is_bounded_and_about_those_without_a_channel() -> None:
    records = [record(f"w{number}") for number in range(1000)]
    there = unlinked([*records, record("x", WorkerState.DRAINING)], {"w7": object()})
    assert len(there) == 999 and records[7] not in there
    chosen = sample(there, random.Random(0))
    assert len({one.worker_id for one in chosen}) == MOST_SURVEYED
    assert len(sample(there[:3], random.Random(0))) == 3
