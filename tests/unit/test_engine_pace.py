"""When an engine counts as stuck."""

from __future__ import annotations

from pdserve.engine.pace import FACTOR, KNOWN_TURNS, LEAST_S, MOST_S, Pace


class Hand:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def turns(pace: Pace, clock: Hand, took: float, count: int = 1) -> None:
    for _ in range(count):
        clock.now += took
        pace.turn()


def test_unknown_engines_get_the_benefit_of_the_doubt() -> None:
    pace = Pace(clock := Hand())
    clock.now += MOST_S
    assert not pace.stuck
    clock.now += 1
    assert pace.stuck


def test_what_is_allowed_follows_the_longest_turn() -> None:
    pace = Pace(clock := Hand())
    turns(pace, clock, 0.01, KNOWN_TURNS)
    assert pace.allowed_s == LEAST_S
    turns(pace, clock, 2.0)
    assert pace.allowed_s == 2.0 * FACTOR
    turns(pace, clock, 2.0 * FACTOR - 1)
    assert pace.allowed_s == MOST_S


def test_a_freeze_teaches_nothing() -> None:
    pace = Pace(clock := Hand())
    turns(pace, clock, 0.01, KNOWN_TURNS)
    clock.now += LEAST_S + 1
    assert pace.stuck
    pace.turn()
    assert not pace.stuck and pace.allowed_s == LEAST_S
