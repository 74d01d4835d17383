"""Who is refused and who goes first, without a router."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.admission import LONGEST_RETRY_S, Demand, Limits, Situation, decide
from pdserve.router.line import QUANTUM, FairLine, Pace


def situation(**changes: float | None) -> Situation:
    values = {"in_flight": 0, "waiting": 0, "ttft_s": None, "itl_s": None} | changes
    return Situation(**values)  # type: ignore[arg-type]


def reason(limits: Limits, demand: Demand, now: Situation) -> str:
    refusal = decide(limits, demand, now)
    return refusal.reason if refusal else ""


def test_limits() -> None:
    limits = Limits(in_flight=10, waiting=4, ttft_s=2.0)
    one = Demand(tokens=100)
    assert reason(limits, one, situation()) == ""
    assert reason(limits, one, situation(in_flight=9)) == ""
    assert reason(limits, one, situation(in_flight=10)) == "max_queue"
    assert reason(limits, Demand(answers=2), situation(in_flight=9)) == "max_queue"
    assert reason(limits, one, situation(waiting=3)) == ""
    assert reason(limits, one, situation(waiting=4)) == "max_waiting"
    assert reason(limits, one, situation(ttft_s=2.0)) == ""
    assert reason(limits, one, situation(ttft_s=2.1)) == "ttft"
    assert reason(Limits(in_flight=10), one, situation(waiting=9, ttft_s=99.0)) == ""


def test_targets_of_the_request() -> None:
    limits = Limits(in_flight=10)
    assert reason(limits, Demand(ttft_s=0.5), situation(ttft_s=0.6)) == "ttft"
    assert reason(limits, Demand(itl_s=0.02), situation(itl_s=0.03)) == "itl"
    assert reason(limits, Demand(ttft_s=0.5, itl_s=0.02), situation()) == ""  # nothing is known
    assert reason(limits, Demand(), situation(itl_s=9.0)) == ""


def test_when_to_come_again() -> None:
    def seconds(ttft_s: float | None, limit: float) -> int:
        now = situation(in_flight=1, ttft_s=ttft_s)
        refusal = decide(Limits(in_flight=2, ttft_s=limit), Demand(), now)
        assert refusal is not None
        return refusal.retry_after_s

    assert seconds(7.2, 2.0) == 6
    assert seconds(2.001, 2.0) == 1
    assert seconds(1e9, 2.0) == LONGEST_RETRY_S
    full = decide(Limits(in_flight=1), Demand(), situation(in_flight=1, ttft_s=3.5))
    assert full is not None and full.retry_after_s == 4
    assert "--max-queue" in full.message


def drain(line: FairLine[str]) -> list[str]:
    found = []
    while (item := line.pop()) is not None:
        found.append(item)
    return found


def test_one_key_is_served_by_priority_then_in_order() -> None:
    line: FairLine[str] = FairLine()
    for name, priority in (("a", 0), ("b", 0), ("c", -5), ("d", 9), ("e", -5)):
        line.push("k", priority, 10, name)
    assert drain(line) == ["c", "e", "a", "b", "d"] and len(line) == line.tokens == 0


def test_a_flood_of_one_key_does_not_hold_up_another() -> None:
    line: FairLine[str] = FairLine()
    for _ in range(500):
        line.push("flood", -100, 1000, "flood")
    for _ in range(5):
        line.push("quiet", 0, 1000, "quiet")
    order = drain(line)
    assert order.index("quiet") <= 4
    assert [i for i, name in enumerate(order) if name == "quiet"][-1] <= 14


def test_keys_get_equal_shares_of_tokens_whatever_the_size_of_their_requests() -> None:
    rng, line = random.Random(0), FairLine[tuple[str, int]]()
    sizes = {"short": (10, 50), "long": (3000, 9000), "mixed": (10, 9000)}
    served: Counter[str] = Counter()

    def fill(key: str) -> None:
        cost = rng.randint(*sizes[key])
        line.push(key, 0, cost, (key, cost))

    for key in sizes:
        for _ in range(200):
            fill(key)
    for _ in range(20_000):
        found = line.pop()
        assert found is not None
        served[found[0]] += found[1]
        fill(found[0])
    assert max(served.values()) < 1.05 * min(served.values()) + 2 * (9000 + QUANTUM)


def test_those_who_leave_are_not_served_and_leave_no_trace() -> None:
    line: FairLine[int] = FairLine()
    places = [line.push(f"k{number % 3}", 0, 100, number) for number in range(300)]
    for place in places[:299]:
        assert line.remove(place) and not line.remove(place)
    assert len(line) == 1 and line.tokens == 100
    assert len(line._queues) == 1 and sum(len(q.heap) for q in line._queues.values()) < 20
    assert line.pop() == 299 and line.pop() is None and not line._queues
    assert not line.remove(places[299])


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.integers(1, 9000), st.booleans()),
        max_size=60,
    )
)
def test_everybody_is_served_once_or_leaves(pushes: list[tuple[str, int, int, bool]]) -> None:
    line: FairLine[int] = FairLine()
    staying, served = [], []
    for number, (key, priority, cost, leaves) in enumerate(pushes):
        place = line.push(key, priority, cost, number)
        if leaves:
            line.remove(place)
        else:
            staying.append(number)
        if number % 7 == 6 and (found := line.pop()) is not None:
            served.append(found)
    while (found := line.pop()) is not None:
        served.append(found)
    assert sorted(served) == staying and len(line) == line.tokens == 0 and not line._queues


def test_pace() -> None:
    pace = Pace()
    assert pace.wait_s(0.0, 5) == 0.0
    for moment in range(20):
        pace.passed(moment * 0.5, others_wait=True)
    assert pace.wait_s(9.5, 4) == 2.0
    assert pace.wait_s(9.5, 0) == 0.0
    assert pace.wait_s(109.5, 4) == 80.0  # it has come to a halt
    pace.passed(9.5, others_wait=False)
    pace.passed(1000.0, others_wait=True)  # nobody waited in between
    assert pace.wait_s(1000.0, 1) < 1.0
