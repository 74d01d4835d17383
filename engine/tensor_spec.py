"""What a checkpoint must hold under a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    shapes: tuple[tuple[int, ...], ...]
    """Those that it may have."""
    dtypes: tuple[torch.dtype, ...] = ()
    """One of them, and the tensor is left as it lies in the file, on the host; (): any floating
    type, and it is brought to the engine's dtype and device."""
    itemsize: int = 0
    """Bytes per element, at least, once it is on the device; 0: as the engine's dtype."""
    required: bool = True
    """Whether a checkpoint without it is not whole."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes on the device of an engine with this dtype."""
        return math.prod(self.shapes[0]) * (self.itemsize or dtype.itemsize)


Specs = Mapping[str, TensorSpec]
