"""What a fetch still misses, in arrays: a long prompt has thousands of blocks, and a step of the
interpreter for each costs more than copying them between two GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Units: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of blocks, or of slices of them (`slices.py`)."""


def units_of(numbers: Sequence[int]) -> Units:
    if isinstance(numbers, range):
        return np.arange(numbers.start, numbers.stop, numbers.step, dtype=np.int64)
    return np.fromiter(numbers, np.int64, len(numbers))


def rising(numbers: Units) -> bool:
    """Whether each is greater than the one before it."""
    return not np.count_nonzero(numbers[1:] <= numbers[:-1])


class Missing:
    """Units of a ticket that have not arrived intact, ascending, and where each goes in the own
    pool. Of one thread at a time."""

    def __init__(self, units: Units, targets: Units) -> None:
        self.units, self.targets = units, targets

    def __len__(self) -> int:
        return len(self.units)

    def targets_of(self, units: Units) -> Units:
        """Where these go; all of them are missing."""
        if len(units) == len(self.units):
            return self.targets
        return self.targets[np.searchsorted(self.units, units)]

    def arrived(self, units: Units) -> None:
        """These, all of which were missing, are not any more."""
        if len(units) == len(self.units):
            self.units, self.targets = units[:0], units[:0]
            return
        left = np.ones(len(self.units), bool)
        left[np.searchsorted(self.units, units)] = False
        self.units, self.targets = self.units[left], self.targets[left]
