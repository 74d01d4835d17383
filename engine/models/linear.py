"""Linear layers of a decoder, alone or several of one input together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve import kernels
from pdserve.engine.weights import Weights

JOINED_ON = ("cuda",)
"""Where products of one input are made as one. On the CPU a joined copy would take two thirds of
the weights out of the pages that the workers of a host share, to save 50 µs of the 1 ms of a layer
(8 rows, bfloat16, hidden size 512; nothing at 256 rows)."""


class Linear:
    """y = x Wᵀ + b for x [T, columns], W [rows, columns].

    invariant: a row has the same bits in any batch and any chunk."""

    def __init__(
        self,
        weight: torch.Tensor | kernels.QuantizedWeight,
        bias: torch.Tensor | None,
        invariant: bool,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.invariant = invariant

    @classmethod
    def of(cls, weights: Weights, name: str, invariant: bool) -> Linear:
        """The layer of this name in a checkpoint."""
        return cls(weights.matrix(name), weights.get(name + ".bias"), invariant)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if isinstance(weight, kernels.QuantizedWeight):
            return kernels.quantized_linear(x, weight, self.bias, invariant=self.invariant)
        return kernels.linear(x, weight, self.bias, invariant=self.invariant)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias; None where the weight is quantised."""
        weight = self.weight
        return None if isinstance(weight, kernels.QuantizedWeight) else (weight, self.bias)


class Joined:
    """Several linear layers of one input. Where JOINED_ON says so, and none is quantised, their
    weights are put one below the other and one product makes them all: fewer and larger kernels.
    The layers' own tensors then are views of that, wherever else they are held: a model whose
    weights were in memory twice would not fit where `engine.build` says that it does."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.whole = _whole(self.parts)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [T, columns] → one [T, rows] for each layer; rows need not be contiguous."""
        if self.whole is None:
            return tuple(part(x) for part in self.parts)
        whole, sizes = self.whole
        return tuple(whole(x).split(sizes, dim=-1))


def _whole(parts: Sequence[Linear]) -> tuple[Linear, list[int]] | None:
    """All layers as one, and the rows of each."""
    pairs = [pair for part in parts if (pair := part.tensors) is not None]
    weights = [weight for weight, _ in pairs]
    biases = [bias for _, bias in pairs if bias is not None]
    if len(pairs) < len(parts) or len(biases) not in (0, len(parts)):
        return None
    if any(weight.device.type not in JOINED_ON for weight in weights):
        return None
    sizes = [weight.shape[0] for weight in weights]
    joined = torch.cat(weights)
    for part, view in zip(parts, joined.split(sizes), strict=True):
        assert isinstance(part.weight, torch.Tensor)
        part.weight.data = view
    bias = torch.cat(biases) if biases else None
    return Linear(joined, bias, parts[0].invariant), sizes
