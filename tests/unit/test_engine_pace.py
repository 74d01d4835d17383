"""When an engine counts as stuck."""

from __future__ import annotations

import pytest

from pdserve.engine.pace import FACTOR, LEAST_S, MOST_S, STEP_TOKENS, Pace


class Hand:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def pace(clock: Hand) -> Pace:
    return Pace(clock=clock)


def turns(pace: Pace, clock: Hand, took: float, tokens: int = 1, count: int = 1) -> None:
    for _ in range(count):
        pace.compute(tokens)
        clock.now += took
        pace.turn()


def test_unknown_engines_get_the_benefit_of_the_doubt(pace: Pace, clock: Hand) -> None:
    clock.now += MOST_S
    assert not pace.stuck
    clock.now += 1
    assert pace.stuck


def test_a_token_must_come_soon_and_a_long_chunk_may_take_its_time(pace: Pace, clock: Hand) -> None:
    turns(pace, clock, 0.065)  # a millisecond per token, the step itself included
    pace.compute(1)
    assert pace.allowed_s == LEAST_S
    pace.compute(2000)
    assert pace.allowed_s == pytest.approx(FACTOR * (STEP_TOKENS + 2000) * 0.001)
    pace.compute(100_000)
    assert pace.allowed_s == MOST_S


def test_what_is_slow_again_and_again_counts_for_a_while(pace: Pace, clock: Hand) -> None:
    turns(pace, clock, 0.01)
    turns(pace, clock, 2.0)
    assert pace.allowed_s < 5.0, "once may be chance"
    turns(pace, clock, 2.0, count=20)
    slow = FACTOR * 2.0 / (STEP_TOKENS + 1) * STEP_TOKENS
    assert 0.95 * slow < pace.allowed_s <= slow
    turns(pace, clock, 0.01, count=100)
    assert 0.85 * slow < pace.allowed_s < 0.95 * slow
    turns(pace, clock, 0.01, count=3000)
    assert pace.allowed_s == LEAST_S


def test_a_freeze_and_idle_turns_teach_nothing(pace: Pace, clock: Hand) -> None:
    turns(pace, clock, 0.01)
    clock.now += LEAST_S + 1
    assert pace.stuck
    pace.turn()
    assert not pace.stuck and pace.allowed_s == LEAST_S
    clock.now += 0.5  # it slept until somebody wanted something
    pace.turn()
    assert pace.allowed_s == LEAST_S


def test_each_layer_is_progress(pace: Pace, clock: Hand) -> None:
    """A step of many tokens may take long, but none of its layers may, unless they all do."""

    def step(layers: int, took: float) -> None:
        pace.compute(512)
        for _ in range(layers):
            clock.now += took
            assert not pace.stuck
            pace.advance()
        pace.turn()

    step(8, 0.15)
    pace.compute(512)
    assert pace.allowed_s == LEAST_S
    clock.now += 0.15
    pace.advance()
    clock.now += LEAST_S + 0.1
    assert pace.stuck
    pace.advance()
    pace.turn()
    for _ in range(30):
        step(24, 1.0)  # 24 s in all
    pace.compute(512)
    assert pace.allowed_s == pytest.approx(FACTOR * 1.0, rel=0.01)
