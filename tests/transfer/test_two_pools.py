"""Random interleavings of everything over real sockets and real pools (support/two_pools.py)."""

from __future__ import annotations

import logging

import pytest
from transfer_rig import Rig
from two_pools import TwoPools

from pdserve.kv_transfer.faults import Faults

CALM = Faults()
ROUGH = Faults(seed=1, drop=0.06, truncate=0.06, duplicate=0.08, reorder=0.08, flip=0.12)


def drive(seed: int, faults: Faults, steps: int) -> TwoPools:
    world = TwoPools(seed, faults)
    try:
        for _ in range(steps):
            world.step()
        world.finish()
    finally:
        world.close()
    return world


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong on purpose is logged; thousands of lines help nobody."""
    caplog.set_level(logging.CRITICAL, "pdserve")


@pytest.mark.parametrize("faults", [CALM, ROUGH], ids=["calm", "rough"])
@pytest.mark.parametrize("seed", range(4))
def test_two_pools_agree(rig: Rig, seed: int, faults: Faults) -> None:
    world = drive(seed, faults, steps=2500)
    assert world.epoch > 1, "the source was never restarted"
    assert world.seen["ok"] > 50 and world.seen["failed"] > 5 and world.seen["sealed"] > 20
    assert world.meddler.count["withdrawn in a send"] and world.meddler.count["early"]
    # How many fetches there are depends on how busy the machine is, so not each kind of each seed.
    assert len(world.dice.count) >= 3 if faults is ROUGH else not world.dice.count


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("faults", [CALM, ROUGH], ids=["calm", "rough"])
@pytest.mark.parametrize("seed", range(100, 110))
def test_two_pools_agree_for_long(rig: Rig, seed: int, faults: Faults) -> None:
    drive(seed, faults, steps=50_000)
