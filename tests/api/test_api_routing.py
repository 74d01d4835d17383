"""Where requests go under each routing policy: a real router, a real Redis, fake workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_worker import FakeWorker
from router_harness import RouterHarness

from pdserve.cluster.placement import LoadReport, Placement
from pdserve.cluster.records import Role
from pdserve.protocol.blocks import route_hashes
from pdserve.protocol.messages import LifeEvent
from pdserve.router.predict import LegFacts

Start = Callable[..., RouterHarness]
PROMPT = [5 + i % 900 for i in range(800)]


def three(start: Start, **settings: Any) -> tuple[RouterHarness, list[FakeWorker]]:
    harness = start(**settings)
    workers = [harness.add(Role.COLOCATED) for _ in range(3)]
    harness.until_connected()
    return harness, workers


def report(harness: RouterHarness, worker: FakeWorker, cached: int, load: LoadReport) -> None:
    """Tell Redis, for a worker, that it holds the first `cached` tokens of PROMPT."""

    async def tell() -> None:
        placement = Placement(harness.settings.redis, harness.cluster)
        hashes = route_hashes(PROMPT[:cached])
        await placement.report(worker.worker_id, worker.epoch, 1, load, hashes, whole=True)
        await placement.close()

    harness.run(tell())


def ask(harness: RouterHarness, prompt: list[int] = PROMPT, session: str = "") -> None:
    headers = {"x-session-id": session} if session else {}
    body = {"model": "demo", "prompt": prompt, "max_tokens": 2}
    answer = httpx.post(f"{harness.url}/v1/completions", json=body, headers=headers, timeout=10)
    assert answer.status_code == 200, answer.text


def counts(workers: list[FakeWorker]) -> list[int]:
    return [len(worker.submits) for worker in workers]


def test_prompts_go_where_their_prefix_lies(start: Start) -> None:
    harness, workers = three(start)
    for worker, cached in zip(workers, (100, 700, 0), strict=True):
        report(harness, worker, cached, LoadReport(0, 0, 10**6))
    # Each is charged 160 missing tokens and itself; at the next best worker 704 are missing.
    for _ in range(3):
        ask(harness)
    assert counts(workers) == [0, 3, 0]


def test_unless_there_is_too_much_to_do(start: Start) -> None:
    harness, workers = three(start)
    for worker, cached, queued in zip(workers, (100, 700, 0), (0, 4000, 4000), strict=True):
        report(harness, worker, cached, LoadReport(queued, 0, 10**6))
    ask(harness)
    assert counts(workers) == [1, 0, 0]


def test_least_load_does_not_look_at_prefixes(start: Start) -> None:
    harness, workers = three(start, routing_policy="least-load")
    for worker, cached, queued in zip(workers, (700, 0, 0), (90, 90, 10), strict=True):
        report(harness, worker, cached, LoadReport(queued, 0, 10**6))
    ask(harness)
    assert counts(workers) == [0, 0, 1]


def test_round_robin(start: Start) -> None:
    harness, workers = three(start, routing_policy="round-robin")
    for _ in range(6):
        ask(harness)
    assert counts(workers) == [2, 2, 2]


def test_round_robin_over_pairs(start: Start) -> None:
    harness = start(routing_policy="round-robin")
    workers = [harness.add(role) for role in [Role.PREFILL] * 2 + [Role.DECODE] * 2]
    harness.until_connected()
    for _ in range(6):
        ask(harness)
    assert counts(workers) == [3, 3, 3, 3]


@pytest.mark.parametrize("session", ["alice", "bob", "carol"])
def test_a_session_stays_at_its_worker(start: Start, session: str) -> None:
    harness, workers = three(start, routing_policy="session")
    for turn in range(5):
        ask(harness, PROMPT[turn:], session)
    assert sorted(counts(workers)) == [0, 0, 5]


def test_the_body_says_which_session_it_is(start: Start) -> None:
    """Over the header, which every request has differently."""
    harness, workers = three(start, routing_policy="session")
    for turn in range(5):
        body = {"prompt": PROMPT[turn:], "max_tokens": 2, "session_id": "mine"}
        headers = {"x-session-id": f"other {turn}"}
        answer = harness.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
    assert sorted(counts(workers)) == [0, 0, 5]


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_decode_workers_serve_by_themselves_if_they_may(start: Start, mode: str) -> None:
    harness = start(disaggregate=mode)
    decode = harness.add(Role.DECODE)
    harness.until_connected()
    ask(harness)
    assert [submit.hand_off for submit in decode.submits] == [False]
    prefill = harness.add(Role.PREFILL)
    harness.until_connected()
    ask(harness)
    assert counts([prefill]) == [1 if mode == "auto" else 0]  # nothing has been measured yet
    assert decode.submits[-1].ticket is None or mode == "auto"


def test_decode_workers_do_not_serve_by_themselves_if_prompts_are_always_handed_over(
    start: Start,
) -> None:
    harness = start(disaggregate="always")
    harness.add(Role.DECODE)
    harness.until_connected()
    assert harness.client.get("/health").status_code == 503


def test_a_stream_that_moves_goes_back_to_where_its_prompt_is_cached(start: Start) -> None:
    """Of 800 tokens 768 lie at the prefill worker: fetching them costs less than the rest."""
    harness = start(disaggregate="auto")
    prefill = harness.add(Role.PREFILL)
    decodes = [harness.add(Role.DECODE) for _ in range(2)]
    harness.until_connected()
    events = [("scheduled", 0.0), ("first_token", 0.4), ("held", 0.4)]
    for length in (100, 800) * 6:  # half a millisecond per token, and ten for a hand-over
        facts = LegFacts(
            worker_id=prefill.worker_id, length=length, cached=0, drawn=1, requests=0,
            hand_over_s=0.01,
            events=tuple(LifeEvent(name, at * length / 800) for name, at in events),
        )  # fmt: skip
        harness.router.dispatcher.predictor.learn(facts)
        fetch = ("fetch_started", 0.0), ("fetched", 0.01)
        facts = dataclasses.replace(facts, events=tuple(LifeEvent(*one) for one in fetch))
        harness.router.dispatcher.predictor.learn(facts)
    report(harness, prefill, 800, LoadReport(0, 0, 10**6))

    def only_one_dies() -> None:
        for worker in decodes:
            worker.die_at = None

    for worker in decodes:
        worker.die_at, worker.on_death = 3, only_one_dies
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 20, "return_token_ids": True}
    answer = httpx.post(f"{harness.url}/v1/completions", json=body, timeout=10).json()
    assert answer["choices"][0]["token_ids"] == prefill.script(prefill.submits[0])[:20]
    assert [submit.hand_off for submit in prefill.submits] == [True, True]
    assert len(prefill.submits[1].output_token_ids) >= 3
    (survivor,) = [worker for worker in decodes if not worker.dead]
    assert survivor.submits[-1].ticket is not None
