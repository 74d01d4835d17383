"""Where a request's outputs wait for the one task that serves its client."""

from __future__ import annotations

import asyncio

from pdserve.protocol.messages import Output


class Mailbox:
    """Outputs of a request's answers, for the one task that serves its client.

    However many outputs a step brings, the task wakes up once.
    """

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[int, Output]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, output: Output) -> None:
        self._items.append((index, output))
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[int, Output]]:
        """Everything that has come, at least one thing unless `wake` was called."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items
