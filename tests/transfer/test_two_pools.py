"""Random interleavings of everything over real sockets and real pools (support/two_pools.py)."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from transfer_rig import Rig
from two_pools import TwoPools

from pdserve.kv_transfer.faults import Faults

CALM = Faults()
ROUGH = Faults(drop=0.06, truncate=0.06, duplicate=0.08, reorder=0.08, flip=0.12)
STEPS = 200
"""Of one run of the machine, from new pools to the last block free again."""
SEEDS = st.integers(0, 2**16 - 1)
ACTIONS = [
    name
    for name, weight in {
        "admit": 18, "compute": 40, "compute_layers": 12, "fetch": 26, "settle": 26,
        "finish_one": 22, "abort": 7, "preempt": 2, "ask_again": 3, "expire": 1, "renew": 2,
        "restart_source": 1, "restart_sink": 1,
    }.items()
    for _ in range(weight)
]  # fmt: skip
"""One rule for all of them: hypothesis leaves out rules at random, and little happens without any
of these."""


def machine(faults: Faults, seen: Counter[str]) -> type[RuleBasedStateMachine]:
    """A machine whose worlds have these faults and add up in `seen` what happened in them."""

    class TwoPoolsMachine(RuleBasedStateMachine):
        """What hypothesis draws never depends on how far the threads are, so that it can be drawn
        again."""

        world: TwoPools | None = None
        broken = False

        @initialize(seed=SEEDS)
        def start(self, seed: int) -> None:
            self.world = TwoPools(seed, faults)

        @rule(name=st.sampled_from(ACTIONS), seed=SEEDS)
        def act(self, name: str, seed: int) -> None:
            world = self.world
            assert world is not None
            seen["steps"] += 1
            seen[name] += 1
            try:
                world.act(getattr(world, name), seed + seen["steps"])
            except BaseException:
                self.broken = True
                raise

        def teardown(self) -> None:
            world, self.world = self.world, None
            if world is None:
                return
            try:
                if not self.broken:
                    world.finish()
            finally:
                world.close()
            for counter in (world.seen, world.meddler.count, world.dice.count):
                seen.update(counter)

    return TwoPoolsMachine


def drive(faults: Faults, examples: int, derandomize: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(faults, seen),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=[Phase.generate],  # threads do not repeat themselves: nothing can be shrunk
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert seen["ok"] > 2 * examples and seen["failed"] > examples / 4, seen
    assert seen["sealed"] > examples and seen["by layers"] > examples / 4, seen
    assert seen["withdrawn in a send"] and seen["early"], seen
    assert seen["restart_source"] and seen["restart_sink"], seen
    happened = [name for name in ("drop", "truncate", "duplicate", "reorder", "flip") if seen[name]]
    assert len(happened) == (5 if faults is ROUGH else 0), seen
    return seen


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong on purpose is logged; thousands of lines help nobody."""
    caplog.set_level(logging.CRITICAL, "pdserve")


@pytest.mark.parametrize("faults", [CALM, ROUGH], ids=["calm", "rough"])
def test_two_pools_agree(rig: Rig, faults: Faults) -> None:
    assert drive(faults, examples=60, derandomize=True)["steps"] >= 10_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("faults", [CALM, ROUGH], ids=["calm", "rough"])
def test_two_pools_agree_for_long(rig: Rig, faults: Faults) -> None:
    assert drive(faults, examples=2600, derandomize=False)["steps"] >= 500_000
