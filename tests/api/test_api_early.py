"""Hand-overs that begin while the prompt is still being computed, as the router sees them."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_worker import FakeWorker
from router_harness import BODY, CHAT, LONG, TEXT, RouterHarness, asking, hold

from pdserve.cluster.records import Role
from pdserve.protocol.errors import ErrorCode, WorkerError

Start = Callable[..., RouterHarness]
Early = Callable[..., tuple[RouterHarness, FakeWorker, list[FakeWorker]]]


@pytest.fixture
def early(start: Start) -> Early:
    """`early(2)`: a prefill worker that holds its first token back, and two decode workers."""

    def make(decodes: int = 1) -> tuple[RouterHarness, FakeWorker, list[FakeWorker]]:
        harness = start()
        prefill = harness.add(Role.PREFILL, early=True)
        workers = [harness.add(Role.DECODE) for _ in range(decodes)]
        harness.until_connected()
        hold(prefill)
        return harness, prefill, workers

    return make


def taken_early(harness: RouterHarness, worker: FakeWorker) -> None:
    """Until a decode worker has the request without a token."""
    harness.run(worker.until(lambda: len(worker.submits) == 1))
    (submit,) = worker.submits
    assert submit.ticket is not None and submit.ticket.growing and not submit.output_token_ids


def whoever(harness: RouterHarness, workers: list[FakeWorker]) -> FakeWorker:
    harness.wait(lambda: any(worker.submits for worker in workers), "for an early leg")
    return next(worker for worker in workers if worker.submits)


def says(found: list[Any]) -> str:
    assert found[0].status_code == 200, found[0].text
    return str(found[0].json()["choices"][0]["message"]["content"])


def test_the_first_token_follows_the_blocks(early: Early) -> None:
    harness, prefill, (decode,) = early()
    with asking(harness, BODY) as found:
        taken_early(harness, decode)
        prefill.go.set()
    assert says(found) == TEXT
    assert len(decode.submits) == 1, "the leg was not sent twice"
    (message,) = decode.continues
    assert message.request_id == decode.submits[0].request_id == prefill.submits[0].request_id
    assert len(message.output_token_ids) == 1
    harness.until_idle()


def test_the_client_sees_the_first_token_before_the_decode_worker_says_anything(
    early: Early,
) -> None:
    harness, prefill, (decode,) = early()
    hold(decode)

    async def go_on() -> None:
        await decode.until(lambda: len(decode.submits) == 1)
        prefill.go.set()

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        going = other.submit(lambda: harness.run(go_on()))
        with harness.client.stream("POST", CHAT, json=LONG) as answer:
            assert next(answer.iter_lines()).startswith("data:")
            going.result()
    for worker in (prefill, decode):
        harness.run(worker.until(lambda worker=worker: len(worker.aborts) == 1))
    harness.until_idle()


def test_an_answer_of_one_token_ends_the_early_leg(early: Early) -> None:
    harness, prefill, (decode,) = early()
    with asking(harness, BODY | {"max_tokens": 1}) as found:
        taken_early(harness, decode)
        prefill.go.set()
    assert found[0].json()["choices"][0]["finish_reason"] == "length"
    harness.run(decode.until(lambda: len(decode.aborts) == 1))
    harness.until_idle()


def test_a_client_that_leaves_ends_both(early: Early) -> None:
    harness, prefill, (decode,) = early()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(harness.url + CHAT, json=BODY, timeout=0.5, trust_env=False)
    taken_early(harness, decode)
    for worker in (prefill, decode):
        harness.run(worker.until(lambda worker=worker: len(worker.aborts) == 1))
    harness.until_idle()


def test_a_decode_worker_that_dies_early_is_replaced_before_the_token(early: Early) -> None:
    harness, prefill, decodes = early(2)
    with asking(harness, BODY) as found:
        first = whoever(harness, decodes)
        (other,) = [worker for worker in decodes if worker is not first]
        harness.run(first.die())
        taken_early(harness, other)
        prefill.go.set()
    assert says(found) == TEXT
    assert len(other.continues) == 1 and len(other.submits) == 1
    assert len(prefill.submits) == 1, "the prompt was computed once"
    harness.until_idle()


@pytest.mark.parametrize("code", [ErrorCode.KV_LOST, ErrorCode.INVALID_REQUEST])
def test_a_failed_early_transfer_costs_nothing_but_time(early: Early, code: ErrorCode) -> None:
    harness, prefill, (decode,) = early()
    with asking(harness, BODY) as found:
        taken_early(harness, decode)
        harness.run(decode.lose(code))
        harness.wait(lambda: all(link.legs < 2 for link in harness.router.pool.links))
        prefill.go.set()
    assert says(found) == TEXT
    early_leg, late_leg = decode.submits
    assert early_leg.ticket.growing and not late_leg.ticket.growing
    assert len(late_leg.output_token_ids) == 1 and not decode.continues
    assert len(prefill.submits) == 1
    harness.until_idle()


def test_another_ticket_takes_the_place_of_the_growing_one(early: Early) -> None:
    """The prompt was preempted: the growing ticket has ended, and a new one came at the end. The
    early leg, which perhaps still waits for room, makes way under the same id."""
    harness, prefill, (decode,) = early()
    prefill.preempted = True
    with asking(harness, BODY) as found:
        taken_early(harness, decode)
        prefill.go.set()
    assert decode.aborts[0] == decode.submits[0].request_id == decode.submits[1].request_id
    assert says(found) == TEXT
    assert [submit.ticket.ticket_id.split("-")[0] for submit in decode.submits] == [
        "ticket",
        "second",
    ]
    harness.until_idle()


def test_a_prefill_worker_that_dies_takes_the_early_leg_along(early: Early) -> None:
    harness, prefill, (decode,) = early()
    other = harness.add(Role.PREFILL)
    with asking(harness, BODY) as found:
        whoever(harness, [prefill, other])
        if prefill.submits:
            taken_early(harness, decode)
            harness.run(prefill.die())
            harness.run(decode.until(lambda: len(decode.aborts) == 1))
    assert says(found) == TEXT
    harness.until_idle()


def test_a_decode_worker_that_refuses_is_not_asked_early_again(early: Early) -> None:
    harness, prefill, decodes = early(2)
    overloaded = WorkerError(code=ErrorCode.OVERLOADED, message="It is full.")
    for worker in decodes:
        worker.refuse = [overloaded] * 5
    with asking(harness, BODY) as found:
        harness.wait(lambda: sum(len(worker.submits) for worker in decodes) == 4)
        for worker in decodes:
            worker.refuse = []
        prefill.go.set()
    assert says(found) == TEXT
    harness.until_idle()


def test_a_choice_that_comes_after_the_token_is_not_carried_out(
    early: Early, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness, prefill, decodes = early(2)
    chooser = harness.router.dispatcher.chooser
    pick, late = chooser.pick, []

    def pick_late(candidates: Any, need: Any, done: Any) -> None:
        if need.fetches and not late:
            late.append(lambda: pick(candidates, need, done))
        else:
            pick(candidates, need, done)

    monkeypatch.setattr(chooser, "pick", pick_late)
    with asking(harness, BODY) as found:
        harness.wait(lambda: bool(late), "for the early choice")
        prefill.go.set()
    assert says(found) == TEXT

    async def choose() -> None:
        late[0]()

    harness.run(choose())
    harness.until_idle()
    assert sum(len(worker.submits) for worker in decodes) == 1
