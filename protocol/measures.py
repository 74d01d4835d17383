"""What workers measure besides their load: told with heartbeats, shown by routers to Prometheus.

A worker has one of these for its life; routers show what it said last, under its name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
TRANSFER_BYTES = tuple(2.0**power for power in range(11, 35, 2))
TRANSFER_BLOCKS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)
RESIDENCE_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600,
    1200, 1800,
)  # fmt: skip
"""Bounds of buckets: those of vLLM's histograms of the same things."""


class Spread(msgspec.Struct, frozen=True, array_like=True):
    """Values by size."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets but the last, which takes the rest."""
    counts: tuple[int, ...]
    """How many values lie in each bucket."""
    total: float
    """Sum of all values."""


class Tally:
    """Counts values for a `Spread`. One thread adds; any may read, and may miss the newest."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total: float = 0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.total += value

    def spread(self) -> Spread:
        return Spread(self._bounds, tuple(self._counts), self.total)


class Residence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lives of cached blocks that made room for others, in seconds; of a sample."""

    lifetime: Spread
    """From its allocation."""
    idle: Spread
    """From its last use."""
    reuse_gap: Spread
    """Between its last uses."""


class Measures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Since the worker's start."""

    step_tokens: Spread
    """Tokens that each engine step computed, of prompts and of answers."""
    transfer_s: Spread
    """Of fetches that brought KV: see `FetchReport`; and so the next three."""
    post_s: Spread
    transfer_bytes: Spread
    transfer_blocks: Spread
    failed_transfers: int = 0
    """Fetches that did not bring what they were to bring; those that were called off aside."""
    failed_releases: int = 0
    """Sources that were told in vain that their blocks are not needed any more."""
    expired_tickets: int = 0
    """Offers that nobody fetched within their lease."""
    corrupted_requests: int | None = None
    """Requests with logits that are not numbers; None: nobody looks."""
    residence: Residence | None = None
    """None: nobody looks."""
