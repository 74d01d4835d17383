"""Quantised matrices for tests, packed bit by bit as their formats' papers and tools describe, with
the matrix in float64 that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pdserve.kernels import QuantizedWeight

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_last(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[A, B] in 0..15 → [A, ⌈B / 8⌉] int32; nibble i of a word is its column order[i]."""
    numbers = values.numpy().astype(np.uint32)
    numbers = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % 8)))
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
    for place, column in enumerate(order):
        words |= numbers[:, column::8] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32).copy())


@dataclass(frozen=True)
class Nibbles:
    """A matrix of four bits, unpacked: W[n, k] = scales[g, n] (values[n, k] - zeros[g, n]), g being
    group_of[k]."""

    values: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group: int
    group_of: torch.Tensor

    @property
    def matrix(self) -> torch.Tensor:
        zeros, scales = self.zeros[self.group_of].t(), self.scales[self.group_of].t()
        return (self.values - zeros).double() * scales.double()

    def awq(self) -> dict[str, torch.Tensor]:
        return {
            "qweight": packed_last(self.values.t().contiguous(), AWQ_NIBBLES),
            "qzeros": packed_last(self.zeros, AWQ_NIBBLES),
            "scales": self.scales,
        }

    def gptq(self, version: int = 1) -> dict[str, torch.Tensor]:
        zeros = (self.zeros - 1) % 16 if version == 1 else self.zeros
        return {
            "qweight": packed_last(self.values).t().contiguous(),
            "qzeros": packed_last(zeros),
            "scales": self.scales,
            "g_idx": self.group_of.int(),
        }


def random_nibbles(
    rows: int,
    columns: int,
    group: int,
    *,
    scattered: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Nibbles:
    """scattered: the inputs of a group lie anywhere, as act-order leaves them."""
    groups = -(-columns // group)
    group_of = torch.arange(columns) // group
    return Nibbles(
        torch.randint(0, 16, (rows, columns)),
        torch.randint(0, 16, (groups, rows)),
        (torch.rand(groups, rows) / 8 + 0.01).to(dtype),
        group,
        group_of[torch.randperm(columns)] if scattered else group_of,
    )


def random_weight(
    kind: str, rows: int, columns: int, group: int = -1
) -> tuple[QuantizedWeight, torch.Tensor]:
    """A weight of "int8", "fp8", "awq", "gptq" (v1) or "gptq_v2", and its matrix in float64."""
    group = columns if group == -1 else group
    if kind in ("int8", "fp8"):
        values = torch.randint(-127, 128, (rows, columns)).to(torch.int8)
        if kind == "fp8":
            values = (torch.randn(rows, columns) * 30).to(torch.float8_e4m3fn)
            values.view(-1)[:2] = torch.tensor([448.0, -(2.0**-9)]).to(values.dtype)
        scales = torch.rand(-(-columns // group), rows) + 0.01
        spread = scales.t().repeat_interleave(group, dim=1)[:, :columns]
        weight = QuantizedWeight(
            packing="bytes", values=values, scales=scales, group=group, columns=columns
        )
        return weight, values.double() * spread.double()
    made = random_nibbles(rows, columns, group)
    tensors = made.awq() if kind == "awq" else made.gptq(2 if kind == "gptq_v2" else 1)
    weight = QuantizedWeight(
        packing="awq" if kind == "awq" else "gptq",
        values=tensors["qweight"],
        zeros=tensors["qzeros"],
        scales=tensors["scales"],
        group=group,
        columns=columns,
        zero_offset=1 if kind == "gptq" else 0,
    )
    return weight, made.matrix
