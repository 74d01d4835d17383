"""Prefixes and loads in a real Redis: batches and gaps, one-step choices, charges, and decay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from redis_for_tests import RedisForTests, redis_for_tests

from pdserve.cluster.membership import Membership, RedisUnavailable
from pdserve.cluster.placement import (
    LAST_S,
    UNKNOWN,
    Choice,
    LoadReport,
    Option,
    Placement,
    Price,
    Recall,
    ask,
    pack_options,
)
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.protocol.blocks import route_hashes, route_position
from pdserve.protocol.messages import WorkerStatus
from pdserve.router import candidates as candidates_module
from pdserve.router.candidates import CandidateSet
from pdserve.router.chooser import Chooser, Need, Verdict
from pdserve.router.placement import Candidate, Policy, WorkerLoad, by_cost, rank
from pdserve.worker.reporter import Reporter

Scenario = Callable[[RedisForTests, Placement], Awaitable[None]]
PROMPT = random.Random(0).choices(range(1000), k=2000)
IDLE = LoadReport(0, 0, 10**6)


def run(scenario: Scenario) -> None:
    async def main() -> None:
        async with redis_for_tests() as redis:
            placement = Placement(redis.url)
            try:
                async with asyncio.timeout(20):
                    await scenario(redis, placement)
            finally:
                await placement.close()

    asyncio.run(main())


async def choose(
    placement: Placement, *names: str, tokens: Sequence[int] = PROMPT, **more: Any
) -> Choice:
    price = more.pop("price", Price())
    options = pack_options([Option(name, 1, 0, price) for name in names])
    values: dict[str, Any] = {"charge_tokens": True, "random": 0}
    question = ask(options, route_hashes(tokens), len(tokens), **(values | more))
    return (await placement.choose([question]))[0]


def test_the_longest_prefix_is_found_whatever_its_length() -> None:
    async def scenario(_: RedisForTests, placement: Placement) -> None:
        hashes = route_hashes(PROMPT)
        for length in range(len(hashes) + 1):
            await placement.report("w", 1, length + 1, IDLE, hashes[:length], whole=True)
            choice = await choose(placement, "w")
            expected = route_position(length - 1) if length else 0
            assert choice.scores[0].cached_tokens == expected
        other = [*PROMPT[:100], 1001, *PROMPT[101:]]
        assert (await choose(placement, "w", tokens=other)).scores[0].cached_tokens == 96

    run(scenario)


def test_who_was_chosen_for_the_beginning_is_asked_about_again() -> None:
    """Though it is not among the options, for as long as it is the same incarnation."""

    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        longer = [*PROMPT, *range(1000)]
        for name in "abc":
            await placement.report(name, 1, 1, IDLE, [], whole=True)
        await choose(placement, "a", recall=Recall.STORE)
        await placement.report("a", 1, 2, IDLE, route_hashes(PROMPT))
        await placement.report("a", 1, 3, IDLE, [])
        others = {"tokens": longer, "recall": Recall.CONSIDER}
        found = await choose(placement, "b", "c", **others, charge_tokens=False)
        assert found.recalled is None, "what is fetched is another matter"
        found = await choose(placement, "a", "c", **others)
        assert found.index == 0 and found.recalled is None and len(found.scores) == 2
        found = await choose(placement, "b", "c", **others)
        assert (found.index, found.recalled) == (2, ("a", 1))
        assert found.scores[2].cached_tokens == 1920 and found.scores[1].cached_tokens == 0
        assert (await choose(placement, "b", "c", tokens=longer)).recalled is None
        price = Price(most_requests=0)
        found = await choose(placement, "b", "c", **others, price=price)
        assert all(score.full for score in found.scores), "limits are this request's"
        other = [*PROMPT[:100], 1001, *PROMPT[101:]]
        assert (await choose(placement, "b", tokens=other, recall=Recall.CONSIDER)).index == 0
        await placement.report("a", 2, 1, IDLE, route_hashes(PROMPT), whole=True)
        assert (await choose(placement, "b", "c", **others)).recalled is None
        raw = Redis.from_url(redis.url)
        async for key in raw.scan_iter("{pdserve}:last:*"):
            assert 0 < await raw.ttl(key) <= LAST_S
        await raw.aclose()

    run(scenario)


def test_of_many_workers_the_one_of_the_last_turn_is_among_those_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates_module, "MOST_ASKED", 2)

    def some(*names: str) -> CandidateSet:
        known = [WorkerLoad(worker_id=name, role=Role.PREFILL, epoch=1) for name in names]
        return CandidateSet([Candidate(one) for one in known])

    async def scenario(_: RedisForTests, placement: Placement) -> None:
        chooser = Chooser(placement, Policy.PREFIX, lambda name: None, random.Random(0))

        async def pick(among: CandidateSet, tokens: Sequence[int]) -> Verdict:
            done: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
            chooser.pick(among, Need(len(tokens), lambda: route_hashes(tokens)), done.set_result)
            return await done

        names = [f"w{number}" for number in range(40)]
        for name in names:
            await placement.report(name, 1, 1, IDLE, [], whole=True)
        tokens = PROMPT
        home = (await pick(some(*names), tokens)).candidate.worker.worker_id
        for turn in range(2, 6):
            held = route_hashes(tokens)
            await placement.report(home, 1, 2 * turn, IDLE, held, whole=True)
            await placement.report(home, 1, 2 * turn + 1, IDLE, [])
            tokens = [*tokens, *range(300)]
            verdict = await pick(some(*names), tokens)
            assert verdict.candidate.worker.worker_id == home, turn
            assert len(verdict.scores) == len(verdict.among) <= 3
        # It leaves: another one is chosen, and remembered in its stead.
        rest = some(*(name for name in names if name != home))
        verdict = await pick(rest, tokens)
        assert verdict.how == "redis" and verdict.candidate.worker.worker_id != home
        again = await choose(placement, home, tokens=tokens, recall=Recall.CONSIDER)
        assert again.recalled == (verdict.candidate.worker.worker_id, 1)

    run(scenario)


def test_batches_change_and_gaps_ask_for_everything() -> None:
    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        hashes = route_hashes(PROMPT)
        assert not await placement.report("w", 1, 1, IDLE, hashes)  # Redis knows nothing yet
        assert await placement.report("w", 1, 2, IDLE, hashes[:4], whole=True)
        assert await placement.report("w", 1, 3, IDLE, hashes[4:8], hashes[3:4])
        assert not await placement.report("w", 1, 5, IDLE, hashes[8:])  # 4 is missing
        raw = Redis.from_url(redis.url)
        held = await raw.smembers("{pdserve}:blocks:w#1")
        assert held == {*hashes[:3], *hashes[4:8]}
        assert 9000 < await raw.pttl("{pdserve}:blocks:w#1") <= 11000
        await raw.flushall()
        assert not await placement.report("w", 1, 4, IDLE, [])
        await placement.leave("w", 1)
        assert await placement.report("w", 1, 5, IDLE, hashes * 40, whole=True)  # long batches
        await placement.leave("w", 1)
        assert await raw.keys("*") == []
        await raw.aclose()

    run(scenario)


def test_an_old_incarnation_is_not_heard() -> None:
    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        membership = Membership(redis.url)
        old, new = await membership.next_epoch("w"), await membership.next_epoch("w")
        assert await placement.report("w", new, 1, IDLE, route_hashes(PROMPT)[:2], whole=True)
        assert await placement.report("w", old, 9, IDLE, route_hashes(PROMPT), whole=True)
        options = pack_options([Option("w", new)])
        question = ask(options, route_hashes(PROMPT), 2000, charge_tokens=True, random=0)
        assert (await placement.choose([question]))[0].scores[0].cached_tokens == 32
        await placement.leave("w", old)
        assert (await placement.choose([question]))[0].scores[0].cached_tokens == 32
        await membership.close()

    run(scenario)


def test_who_dies_leaves_no_load_and_no_charge() -> None:
    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        membership, raw = Membership(redis.url), Redis.from_url(redis.url)
        record = WorkerRecord(
            worker_id="w", epoch=1, role=Role.DECODE, state=WorkerState.READY, host="", port=1,
            http_port=1, pid=1,
        )  # fmt: skip
        await membership.publish(record, lease_s=0.2)
        await placement.report("w", 1, 1, IDLE, route_hashes(PROMPT), whole=True)
        await choose(placement, "w")
        assert await raw.hlen("{pdserve}:loads") == await raw.hlen("{pdserve}:charges") == 1
        while await membership.follow():
            await asyncio.sleep(0.01)
        assert await raw.hlen("{pdserve}:loads") == await raw.hlen("{pdserve}:charges") == 0
        await raw.aclose()
        await membership.close()

    run(scenario)


def test_choices_charge_until_the_second_report() -> None:
    async def scenario(_: RedisForTests, placement: Placement) -> None:
        for name in "ab":
            await placement.report(name, 1, 1, IDLE, [], whole=True)
        first = await choose(placement, "a", "b")
        second = await choose(placement, "a", "b")
        assert {first.index, second.index} == {0, 1}
        third = await choose(placement, "a", "b", charge_tokens=False)
        assert [score.queued_tokens for score in third.scores] == [2000, 2000]
        assert [score.requests for score in third.scores] == [1, 1]
        assert [score.free_tokens for score in third.scores] == [10**6 - 2000] * 2
        for number, left in ((2, 1), (3, 0)):
            await placement.report("b", 1, number, LoadReport(7, 0, 10**6), [])
            score = (await choose(placement, "b", "a", price=Price(token=9.0))).scores[0]
            assert score.requests == left + (number - 2)  # the last choice's own charge
        assert score.queued_tokens == 7 + 2000

    run(scenario)


def test_one_round_trip_places_many_without_piling_them_up() -> None:
    async def scenario(_: RedisForTests, placement: Placement) -> None:
        options = pack_options([Option(name, 1) for name in "abcd"])
        question = ask(options, (), 100, charge_tokens=True, random=5)
        choices = await placement.choose([question] * 40)
        counts = [sum(choice.index == i for choice in choices) for i in range(4)]
        assert counts == [10] * 4

    run(scenario)


def test_the_script_and_the_pure_function_choose_alike() -> None:
    """Random loads, prefixes, floors and rooms: Redis and `by_cost` take the same worker."""

    async def scenario(_: RedisForTests, placement: Placement) -> None:
        rng, hashes = random.Random(1), route_hashes(PROMPT)
        for turn in range(150):
            options, candidates = [], []
            for i in range(rng.randint(1, 6)):
                name, held = f"w{turn}-{i}", rng.randint(0, len(hashes))
                load = LoadReport(
                    rng.choice([0, 500, 1000]), rng.randint(0, 3),
                    rng.choice([UNKNOWN, 0, 1000, 5000]),
                )  # fmt: skip
                await placement.report(name, 1, 1, load, hashes[:held], whole=True)
                floor = rng.choice([0, 0, 1500])
                price = rng.choice([
                    Price(), Price(token=0.05),
                    Price(7.5, 0.003, 9.25, 0, 1234.5, 0.02, 3, 9000, 0.625),
                ])  # fmt: skip
                options.append(Option(name, 1, floor, price))
                worker = WorkerLoad(
                    worker_id=name, role=Role.DECODE, queued_tokens=load.queued_tokens,
                    requests=load.requests,
                    free_tokens=None if load.free_tokens == UNKNOWN else load.free_tokens,
                    cached_tokens=route_position(held - 1) if held else 0,
                )  # fmt: skip
                candidates.append(Candidate(worker, floor=floor, price=price))
            draw = rng.getrandbits(30)
            question = ask(
                pack_options(options), hashes, len(PROMPT), charge_tokens=True, random=draw
            )
            choice = (await placement.choose([question]))[0]
            assert choice.index == by_cost(candidates, len(PROMPT), draw)
            ranks = [rank(candidate, len(PROMPT)) for candidate in candidates]
            assert ranks == [(int(score.full), score.cost) for score in choice.scores]

    run(scenario)


def test_redis_away_is_a_sentence_and_its_return_is_noticed() -> None:
    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        assert (await choose(placement, "w")).index == 0
        await redis.stop()
        with pytest.raises(RedisUnavailable, match="does not answer"):
            await choose(placement, "w")
        await redis.start()  # empty: the scripts are gone, too
        assert (await choose(placement, "w")).index == 0

    run(scenario)


def status(**changes: int) -> WorkerStatus:
    zeros = dict.fromkeys(
        ("blocks_held", "waiting", "running", "fetching", "queued_tokens", "steps"), 0
    )
    return WorkerStatus(blocks_total=10, blocks_free=6, blocks_cached=4, **(zeros | changes))


def test_a_reporter_rebuilds_what_redis_has_lost() -> None:
    async def scenario(redis: RedisForTests, placement: Placement) -> None:
        hashes = route_hashes(PROMPT)
        reporter = Reporter(placement, "w", 1, 16)
        reporting = asyncio.create_task(reporter.run())

        async def until(cached: int) -> None:
            while True:
                try:
                    if (await choose(placement, "w")).scores[0].cached_tokens == cached:
                        return
                except RedisUnavailable:
                    pass
                await asyncio.sleep(0.01)

        reporter.note(status(), dict.fromkeys(hashes[:5], True))
        await until(5 * 16)
        await redis.stop()
        reporter.note(status(running=1), {hashes[4]: False})
        reporter.note(status(running=1), dict.fromkeys(hashes[5:6], True))
        await redis.start()
        await until(4 * 16)
        reporter.note(status(), {hashes[4]: True})
        await until(6 * 16)
        reporting.cancel()
        await reporter.leave()
        raw = Redis.from_url(redis.url)
        assert await raw.exists("{pdserve}:blocks:w#1") == 0
        await raw.aclose()

    run(scenario)
