"""Weights of a product in fewer bits than its activations: what is stored, and what it stands for.

Legend: N rows (outputs), K columns (inputs), G groups of columns. What is stored, and the matrix
that is meant:

    S[n, k] = scales[k // group, n] · (values[n, k] − zeros[k // group, n])
    W[n, order[k]] = S[n, k]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pdserve.kernels import checks
from pdserve.kernels.checks import KernelError

Packing = Literal["bytes", "awq", "gptq"]
NIBBLES = 8
"""Values of four bits in an int32."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight columns the i-th nibble of an AWQ word holds, lowest bits first."""
_ORDERS: dict[str, Sequence[int]] = {"awq": AWQ_ORDER, "gptq": range(NIBBLES)}
SMALLEST_GROUP = 16
LARGEST_E4M3 = 448.0
BYTE_DTYPES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A matrix W [N, K] as the formula above. Checked when made: KernelError is a sentence.

    bytes: values [N, K] int8 or float8_e4m3fn, no zeros.
    gptq (Frantar et al. 2022, arXiv:2210.17323): values [⌈K / 8⌉, N] int32, eight inputs in a word,
    the first in the lowest bits; zeros [G, N / 8] int32, eight outputs in a word.
    awq (Lin et al. 2023, arXiv:2306.00978): values [K, N / 8] int32, eight outputs in a word in
    AWQ_ORDER; zeros [G, N / 8] int32, likewise.

    All tensors are contiguous and on one device. Values must be finite.
    """

    packing: Packing
    values: torch.Tensor
    scales: torch.Tensor
    """[G, N], floating."""
    group: int
    """Columns that share a scale: a power of two from 16 on, or K for one scale per output."""
    columns: int
    """K; a last group may be shorter than the others."""
    zeros: torch.Tensor | None = None
    zero_offset: int = 0
    """Added to each stored zero point, modulo 16: 1 in GPTQ's first format, which stores z - 1."""
    order: torch.Tensor | None = None
    """[K] int64, which column of W each column of S is; None: W = S."""

    def __post_init__(self) -> None:
        checks.dtype("scales", self.scales, checks.FLOATS)
        checks.shape("scales", self.scales, [None, None])
        groups, rows = self.scales.shape
        if self.packing == "bytes":
            checks.dtype("values", self.values, BYTE_DTYPES)
            checks.shape("values", self.values, [rows, self.columns])
        elif self.packing in ("awq", "gptq"):
            self._check_nibbles(groups, rows)
        else:
            raise KernelError(f"packing must be bytes, awq or gptq, not {self.packing!r}.")
        self._check_groups(groups)
        if self.order is not None:
            checks.dtype("order", self.order, (torch.int64,))
            checks.shape("order", self.order, [self.columns])
        for name in ("scales", "zeros", "order"):
            tensor = getattr(self, name)
            if tensor is not None:
                checks.same_device(name, tensor, "values", self.values)
        for name in ("values", "scales", "zeros", "order"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                raise KernelError(f"{name} must be contiguous.")

    def _check_nibbles(self, groups: int, rows: int) -> None:
        if rows % NIBBLES:
            raise KernelError(
                f"Weights of four bits need a multiple of {NIBBLES} outputs, not {rows}."
            )
        if self.zeros is None:
            raise KernelError(f"The packing {self.packing} needs zeros.")
        words = (-(-self.columns // NIBBLES), rows)
        if self.packing == "awq":
            words = (self.columns, rows // NIBBLES)
        checks.dtype("values", self.values, (torch.int32,))
        checks.shape("values", self.values, words)
        checks.dtype("zeros", self.zeros, (torch.int32,))
        checks.shape("zeros", self.zeros, [groups, rows // NIBBLES])

    def _check_groups(self, groups: int) -> None:
        size, columns = self.group, self.columns
        if size != columns and (size < SMALLEST_GROUP or size & (size - 1)):
            raise KernelError(
                f"group must be a power of two from {SMALLEST_GROUP} on, or all {columns} columns; "
                f"not {size}."
            )
        if groups != -(-columns // max(1, size)):
            raise KernelError(
                f"scales has {groups} groups, but {columns} columns in groups of {size} make "
                f"{-(-columns // max(1, size))}."
            )

    @property
    def rows(self) -> int:
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        parts = (self.values, self.scales, self.zeros, self.order)
        return sum(part.nbytes for part in parts if part is not None)


def stored_matrix(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """S [N, K], rounded once to `dtype`."""
    if weight.packing != "bytes":
        wide = _nibbles(weight).float()
    elif weight.values.dtype == torch.int8:
        wide = weight.values.float()
    else:
        wide = _from_e4m3(weight.values)
    return wide.mul_(_spread(weight.scales.float(), weight)).to(dtype)


def _nibbles(weight: QuantizedWeight) -> torch.Tensor:
    """values − zeros of a weight of four bits: [N, K] int8."""
    assert weight.zeros is not None
    zeros = unpack(weight.zeros.t(), weight.packing).add_(weight.zero_offset).bitwise_and_(15)
    if weight.packing == "awq":
        values = unpack(weight.values.t().contiguous(), "awq")
    else:
        values = unpack(weight.values, "gptq")[: weight.columns].t().contiguous()
    return values - _spread(zeros.t(), weight)


def _spread(per_group: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """[G, N] → [N, K] (or [N, 1] for a single group)."""
    if per_group.shape[0] == 1:
        return per_group.view(-1, 1)
    wide = per_group.t().unsqueeze(-1).expand(-1, -1, weight.group)
    return wide.reshape(weight.rows, -1)[:, : weight.columns]


def _from_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Finite e4m3 → float32 by moving sign, exponent and mantissa to where float16 has them, whose
    exponents are 8 higher. Five times as fast as torch's conversion on a CPU."""
    wide = values.view(torch.int8).short()
    half = ((wide & 0x7F) << 7).bitwise_or_(wide & -0x8000)
    return half.view(torch.float16).float().mul_(256)


def unpack(words: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[W, A] int32 → [8 W, A] int8 in 0..15: the values of a word one below the other, in the order
    of the outputs or inputs that they belong to."""
    values = words.new_empty((words.shape[0], NIBBLES, words.shape[1]), dtype=torch.int8)
    for place, index in enumerate(_ORDERS[packing]):
        values[:, index] = (words >> (4 * place)) & 15
    return values.flatten(0, 1)


def pack(values: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The inverse of `unpack`: [8 W, A] integers in 0..15 → [W, A] int32."""
    lanes = values.int().unflatten(0, (-1, NIBBLES))
    words = torch.zeros_like(lanes[:, 0])
    for place, index in enumerate(_ORDERS[packing]):
        words |= lanes[:, index] << (4 * place)  # the sign bit is the highest nibble's
    return words


def sort_groups(
    values: torch.Tensor, group_of: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring the inputs of each group of a GPTQ matrix together ("act-order" leaves them scattered).

    values: [K / 8, N] int32, K a multiple of 8; group_of: [K] integers, the group of each input.
    Returns values and `order` for a `QuantizedWeight` (None if they were in order already). Raises
    KernelError where the groups do not have `group` inputs each, the last one perhaps fewer.
    """
    columns = group_of.shape[0]
    checks.shape("values", values, [columns // NIBBLES, None])
    counted = torch.arange(columns, device=group_of.device) // group
    wide = group_of.long()
    if torch.equal(wide, counted):
        return values, None
    groups, order = wide.sort(stable=True)
    if not torch.equal(groups, counted):
        raise KernelError(
            f"Every group must have {group} inputs, but group {int(groups[groups != counted][0])} "
            "has more or fewer."
        )
    return pack(unpack(values, "gptq")[order], "gptq"), order


def quantize(weight: torch.Tensor, kind: Literal["int8", "fp8"]) -> QuantizedWeight:
    """Round W [N, K] to int8 or e4m3 with one scale per output, so that the largest magnitude of a
    row becomes 127 or 448."""
    checks.shape("weight", weight, [None, None])
    checks.dtype("weight", weight, checks.FLOATS)
    wide = weight.float()
    largest = 127.0 if kind == "int8" else LARGEST_E4M3
    scales = wide.abs().amax(1) / largest
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    shrunk = wide / scales.unsqueeze(1)
    if kind == "int8":
        values = shrunk.round_().clamp_(-127, 127).to(torch.int8)
    else:
        values = shrunk.clamp_(-largest, largest).to(torch.float8_e4m3fn)
    return QuantizedWeight(
        packing="bytes",
        values=values.contiguous(),
        scales=scales.unsqueeze(0).contiguous(),
        group=weight.shape[1],
        columns=weight.shape[1],
    )
