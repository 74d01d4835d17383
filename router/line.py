"""Who goes next when not all can go at once: fair among keys, by priority within a key. No effects.

Deficit round robin (Shreedhar and Varghese 1996): each key's turn is worth QUANTUM tokens, and what
it does not use it keeps for its next turn while it has something waiting. So over time keys that
always have something waiting get equal shares of tokens, however many requests each of them sends.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

QUANTUM = 2048
"""Tokens per turn."""

T = TypeVar("T")


@dataclass(slots=True, order=True)
class Place(Generic[T]):
    """A place in the line."""

    priority: int
    number: int
    """In order of arrival."""
    key: str = field(compare=False)
    cost: int = field(compare=False)
    item: T = field(compare=False)
    left: bool = field(default=False, compare=False)
    """It was served or has gone away."""


@dataclass(slots=True)
class _Queue(Generic[T]):
    """What one key has waiting."""

    heap: list[Place[T]] = field(default_factory=list)
    waiting: int = 0
    deficit: int = 0


class FairLine(Generic[T]):
    """Requests that wait. Memory: what waits, and nothing for keys without anything waiting."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, _Queue[T]] = OrderedDict()
        """The first key has the turn."""
        self._numbers = itertools.count()
        self._length = 0
        self.tokens = 0
        """Cost of all that wait."""

    def __len__(self) -> int:
        return self._length

    def push(self, key: str, priority: int, cost: int, item: T) -> Place[T]:
        """Get in line. `priority`: lower ones go first among those of the same key. `cost`: ≥ 1, in
        tokens."""
        place = Place(priority, next(self._numbers), key, cost, item)
        queue = self._queues.setdefault(key, _Queue())
        heapq.heappush(queue.heap, place)
        queue.waiting += 1
        self._length += 1
        self.tokens += cost
        return place

    def pop(self) -> T | None:
        """Whoever is next leaves the line; None if nobody waits."""
        while self._queues:
            key, queue = next(iter(self._queues.items()))
            while queue.heap and queue.heap[0].left:
                heapq.heappop(queue.heap)
            if not queue.heap:
                del self._queues[key]
            elif queue.heap[0].cost <= queue.deficit:
                place = heapq.heappop(queue.heap)
                queue.deficit -= place.cost
                self._forget(place, queue)
                return place.item
            else:
                self._next_turn(key, queue)
        return None

    def _next_turn(self, key: str, queue: _Queue[T]) -> None:
        """The turn goes on to the next key; those that wait for theirs have more to spend then."""
        self._queues.move_to_end(key)
        # A lone key with a long prompt would otherwise come around many times.
        short = queue.heap[0].cost - queue.deficit
        turns = -(-short // QUANTUM) if len(self._queues) == 1 else 1
        queue.deficit += turns * QUANTUM

    def remove(self, place: Place[T]) -> bool:
        """Leave the line without being served; False if it has left already."""
        if place.left:
            return False
        queue = self._queues[place.key]
        self._forget(place, queue)
        if len(queue.heap) > 2 * queue.waiting + 8:
            queue.heap = [one for one in queue.heap if not one.left]
            heapq.heapify(queue.heap)
        return True

    def _forget(self, place: Place[T], queue: _Queue[T]) -> None:
        place.left = True
        self._length -= 1
        self.tokens -= place.cost
        queue.waiting -= 1
        if not queue.waiting:
            del self._queues[place.key]


class Pace:
    """How fast a line moves, from the moments at which somebody was let in while others waited."""

    SMOOTHING = 0.1
    """Weight of the newest interval."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval: float | None = None

    def passed(self, now: float, others_wait: bool) -> None:
        """Somebody was let in at `now`; `others_wait`: the next interval tells of the pace, too."""
        if self._last is not None:
            took = now - self._last
            known = self._interval
            self._interval = took if known is None else known + self.SMOOTHING * (took - known)
        self._last = now if others_wait else None

    def wait_s(self, now: float, ahead: int) -> float:
        """Predicted wait behind `ahead` others; 0 while nothing is known."""
        if self._interval is None or not ahead:
            return 0.0
        since = now - self._last if self._last is not None else 0.0
        return ahead * max(self._interval, since / (ahead + 1))
