"""In which order waiting requests start."""

from __future__ import annotations

import time

from pdserve.engine.blocks import BlockPool
from pdserve.engine.request import Request
from pdserve.engine.scheduler import Limits, Scheduler
from pdserve.protocol.blocks import root_hash
from pdserve.protocol.sampling import SamplingParams


def scheduler(seqs: int = 1) -> Scheduler:
    return Scheduler(BlockPool(64, 4), Limits(64, seqs, 256), lambda _: None)


def request(name: str, priority: int = 0) -> Request:
    return Request(
        request_id=name, token_ids=[1, 2, 3, len(name)], prompt_len=4,
        sampling=SamplingParams(seed=0, max_tokens=4), deadline=time.monotonic() + 60,
        root=root_hash("t"), priority=priority,
    )  # fmt: skip


def names(found: Scheduler) -> list[str]:
    return [one.request_id for one in found.waiting]


def test_lower_priorities_start_first_and_equal_ones_in_order_of_arrival() -> None:
    found = scheduler()
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", -1)):
        found.add(request(name, priority))
    assert names(found) == ["d", "f", "a", "c", "b", "e"]
    plan = found.plan()
    assert [chunk.request.request_id for chunk in plan.chunks] == ["d"]


def test_whoever_has_run_already_is_not_overtaken() -> None:
    found = scheduler()
    first = request("first", 3)
    found.add(first)
    found.plan()
    found._preempt(first)
    found.add(request("urgent", -100))
    found.add(request("later", 0))
    assert names(found) == ["first", "urgent", "later"]
