"""Slices: blocks cut by layers, so that some of a block can travel while the rest is computed.

A block holds its layers one after the other, so n equal parts of it are n groups of neighbouring
layers, each contiguous: the same memory seen as a pool of n times as many, smaller blocks.

    block i      │ layers 0 .. k-1 │ layers k .. 2k-1 │ ···
    finer pool   │ block i·n       │ block i·n + 1    │ ···

Nothing in a transport knows of slices: it works over the finer pool.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from pdserve.kv_transfer.memory import Pool
from pdserve.kv_transfer.missing import Units

MOST = 64
"""Slices of a block."""
USUAL = 4
"""More of them would each be small, and cost as many messages."""


class Sliceable(Protocol):
    def sliced(self, slices: int) -> Self | None:
        """The same over a pool of slices; None if it cannot work on such."""


Half = TypeVar("Half", bound=Sliceable)


@dataclass(frozen=True, slots=True)
class Cut(Generic[Half]):
    """A pool of slices (or of whole blocks, if a block has one), and what works on it."""

    pool: Pool
    halves: Mapping[str, Half]


class Cuts(Generic[Half]):
    """A pool with the transports' halves, best first, in every cut. Thread-safe."""

    def __init__(self, pool: Pool, halves: Mapping[str, Half]) -> None:
        self._lock = threading.Lock()
        self._whole = Cut(pool, halves)
        self._cuts = {1: self._whole}

    def can(self, slices: int) -> bool:
        """Whether a block has so many equal parts."""
        return 1 <= slices <= MOST and self._whole.pool.block_nbytes % slices == 0

    def of(self, slices: int) -> Cut[Half]:
        """With those halves that can work on such slices."""
        with self._lock:
            cut = self._cuts.get(slices)
            if cut is None:
                made = {name: half.sliced(slices) for name, half in self._whole.halves.items()}
                halves = {name: half for name, half in made.items() if half is not None}
                cut = self._cuts[slices] = Cut(self._whole.pool.sliced(slices), halves)
        return cut


def units(blocks: Units, slices: int) -> Units:
    """The numbers of all slices of these blocks."""
    if slices == 1:
        return blocks
    return (blocks[:, None] * slices + np.arange(slices)).ravel()


def slices_of(num_layers: int) -> int:
    """Slices for a model of so many layers: at most USUAL, all of the same size."""
    return max(count for count in range(1, USUAL + 1) if num_layers % count == 0)
