"""How long answers wait for a worker."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.router.waiting import WaitingRoom

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Guest:
    def __init__(self) -> None:
        self.placed = 0
        self.gave_up = asyncio.Event()

    def place(self) -> None:
        self.placed += 1

    def nobody_came(self) -> None:
        self.gave_up.set()


async def test_a_worker_that_comes_wakes_all() -> None:
    room, guests = WaitingRoom(lambda: False, 60.0), [Guest(), Guest()]
    for guest in guests:
        room.enter(guest)
        room.enter(guest)
    room.wake()
    room.wake()
    assert [guest.placed for guest in guests] == [1, 1]


async def test_nobody_comes() -> None:
    room, guest, other = WaitingRoom(lambda: False, 0.02), Guest(), Guest()
    room.enter(guest)
    room.enter(other)
    room.leave(other)
    async with asyncio.timeout(5):
        await guest.gave_up.wait()
    assert not guest.placed and not other.gave_up.is_set()


async def test_while_a_worker_loads_nobody_gives_up() -> None:
    looks: list[bool] = []

    def loading() -> bool:
        looks.append(True)
        return len(looks) < 5

    room, guest = WaitingRoom(loading, 0.01), Guest()
    room.enter(guest)
    async with asyncio.timeout(5):
        await guest.gave_up.wait()
    assert len(looks) == 5
