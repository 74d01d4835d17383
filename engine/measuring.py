"""What an engine measures for `protocol.measures`. The engine's thread adds, any may ask."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from pdserve.protocol.measures import (
    RESIDENCE_SECONDS,
    STEP_TOKENS,
    TRANSFER_BLOCKS,
    TRANSFER_BYTES,
    TRANSFER_SECONDS,
    Measures,
    Residence,
    Tally,
)
from pdserve.protocol.transfer import FetchReport

USES = 4
"""Last uses of a block that are remembered."""


class BlockLives:
    """How long a sample of the prefix cache's blocks lives, from allocation to eviction. What a
    block was used for before it was allocated anew is another life."""

    def __init__(
        self,
        sample: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`sample`: share of the allocations that are followed, above 0 and up to 1."""
        self._sample, self._clock, self._draw = sample, clock, draw
        self._lives: dict[int, tuple[float, deque[float]]] = {}
        """Block → when it was allocated, and when it was last used again."""
        self._lifetime, self._idle, self._gap = (Tally(RESIDENCE_SECONDS) for _ in range(3))

    def allocated(self, blocks: Sequence[int]) -> None:
        now = self._clock()
        for block in blocks:
            self._lives.pop(block, None)
            if self._draw() < self._sample:
                self._lives[block] = now, deque(maxlen=USES)

    def used(self, block: int) -> None:
        """Another request found it in the cache."""
        if block in self._lives:
            self._lives[block][1].append(self._clock())

    def evicted(self, block: int) -> None:
        if block not in self._lives:
            return
        now, (born, uses) = self._clock(), self._lives.pop(block)
        self._lifetime.add(now - born)
        self._idle.add(now - (uses[-1] if uses else born))
        for one, following in pairwise(uses):
            self._gap.add(following - one)

    def residence(self) -> Residence:
        return Residence(
            lifetime=self._lifetime.spread(),
            idle=self._idle.spread(),
            reuse_gap=self._gap.spread(),
        )


class Measuring:
    """One engine's."""

    def __init__(self, lives: BlockLives | None = None, *, nans: bool = False) -> None:
        """`nans`: the runner looks for logits that are not numbers."""
        self._lives = lives
        self.steps = Tally(STEP_TOKENS)
        """Steps, by the tokens that they compute."""
        self._took, self._asking = Tally(TRANSFER_SECONDS[1:]), Tally(TRANSFER_SECONDS)
        self._nbytes, self._blocks = Tally(TRANSFER_BYTES), Tally(TRANSFER_BLOCKS)
        self._failed = 0
        self._corrupted = 0 if nans else None

    def fetched(self, report: FetchReport, *, called_off: bool) -> None:
        if not report.ok and not called_off:
            self._failed += 1
        if report.nbytes:
            self._took.add(report.took_s)
            self._asking.add(report.asking_s)
            self._nbytes.add(report.nbytes)
            self._blocks.add(report.blocks)

    def corrupted(self) -> None:
        """The first time that a request's logits are not numbers."""
        self._corrupted = (self._corrupted or 0) + 1

    def measures(self, *, failed_releases: int = 0, expired_tickets: int = 0) -> Measures:
        return Measures(
            step_tokens=self.steps.spread(),
            transfer_s=self._took.spread(),
            post_s=self._asking.spread(),
            transfer_bytes=self._nbytes.spread(),
            transfer_blocks=self._blocks.spread(),
            failed_transfers=self._failed,
            failed_releases=failed_releases,
            expired_tickets=expired_tickets,
            corrupted_requests=self._corrupted,
            residence=None if self._lives is None else self._lives.residence(),
        )
