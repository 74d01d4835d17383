"""Which workers and pairs are left alone, on a clock moved by hand."""

from __future__ import annotations

import pytest

from pdserve.router.breaker import (
    FAILURES,
    LONGEST_PAUSE_S,
    PAUSE_S,
    TRIAL_S,
    WINDOW_S,
    Breaker,
    Pairs,
)


class Hand:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def breaker(clock: Hand) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.failure()


def test_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.success()
    fail(breaker, FAILURES - 1)
    assert not breaker.shuns, "an answer came in between"
    breaker.failure()
    assert breaker.shuns


def test_lost_connections_within_a_while(breaker: Breaker, clock: Hand) -> None:
    for between_s in (WINDOW_S, WINDOW_S, WINDOW_S, 1.0):
        clock.now += between_s
        breaker.loss()
        breaker.success()  # it came back and worked
        assert not breaker.shuns
    clock.now += 1.0
    breaker.loss()
    assert breaker.shuns


def test_one_tries_after_the_pause(breaker: Breaker, clock: Hand) -> None:
    fail(breaker)
    breaker.success()
    assert breaker.shuns, "that was an answer to an earlier request"
    clock.now += PAUSE_S
    assert not breaker.shuns
    breaker.sent()
    assert breaker.shuns, "the others wait for how it goes"
    breaker.success()
    assert not breaker.shuns
    breaker.failure()
    assert not breaker.shuns, "all is forgotten"


def test_pauses_grow_to_a_limit(breaker: Breaker, clock: Hand) -> None:
    fail(breaker)
    pause_s = PAUSE_S
    for _ in range(8):
        clock.now += pause_s - 0.1
        assert breaker.shuns
        clock.now += 0.1
        assert not breaker.shuns
        breaker.sent()
        breaker.loss()
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def test_a_trial_that_is_never_answered_does_not_last(breaker: Breaker, clock: Hand) -> None:
    fail(breaker)
    clock.now += PAUSE_S
    breaker.sent()
    clock.now += TRIAL_S
    assert not breaker.shuns


def test_a_pair_does_not_condemn_its_halves(clock: Hand) -> None:
    pairs = Pairs(clock)
    for _ in range(FAILURES):
        pairs.note("p0", "d0", arrived=False)
        pairs.note("p0", "d1", arrived=True)
        pairs.note("p1", "d0", arrived=True)
    assert pairs.shunned("p0") == {"d0"} and pairs.shunned("p1") == set()
    clock.now += PAUSE_S
    assert pairs.shunned("p0") == set()
    pairs.sent("p0", "d0")
    assert pairs.shunned("p0") == {"d0"}
    pairs.note("p0", "d0", arrived=True)
    assert pairs.shunned("p0") == set()


def test_pairs_are_bounded(clock: Hand) -> None:
    pairs = Pairs(clock, most=10)
    for number in range(50):
        for _ in range(FAILURES):
            pairs.note("p0", f"d{number}", arrived=False)
    assert len(pairs.shunned("p0")) == 10
