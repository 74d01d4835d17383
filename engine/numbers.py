"""Numbers on their way to a device: one copy for many arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ALIGNED = 16
"""Bytes. Every tensor begins at a multiple, as those that torch makes do: Triton compiles a kernel
again for pointers that do not."""


def to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[torch.Tensor]:
    """Tensors of the same shapes. arrays: at least one, of one dtype, contiguous; on the CPU the
    tensors share their memory.

    Not to be made `non_blocking`: with this copy the host waits for all earlier steps, whose blocks
    a watcher then offers."""
    if torch.device(device).type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    together, begins = packed(arrays)
    there = torch.from_numpy(together).to(device)
    return [
        there[begin : begin + array.size].view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]


def packed(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """All of them one after the other, and where each begins."""
    step = ALIGNED // arrays[0].itemsize
    begins, end = [], 0
    for array in arrays:
        begins.append(end)
        end += -(-array.size // step) * step
    together = np.zeros(end, dtype=arrays[0].dtype)
    for begin, array in zip(begins, arrays, strict=True):
        together[begin : begin + array.size] = array.ravel()
    return together, begins
