"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): which experts a token goes to, and
what they make of it.

Legend: T tokens, E hidden size, I inner size of an expert, X experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdserve.kernels import checks, dispatch
from pdserve.kernels.activation import GATES
from pdserve.kernels.linear import linear

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [I, E], up [I, E], down [E, I]."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of X experts where they lie, and a table of where that is. Made once, with
    `expert_weights`; holds the matrices."""

    matrices: tuple[Expert, ...]
    pointers: torch.Tensor
    """[3, X] int64: where gate, up and down of each expert begin, on the matrices' device."""

    @property
    def count(self) -> int:
        return len(self.matrices)

    @property
    def hidden_size(self) -> int:
        return self.matrices[0][2].shape[0]

    @property
    def inner_size(self) -> int:
        return self.matrices[0][2].shape[1]


def expert_weights(matrices: Sequence[Expert]) -> ExpertWeights:
    """matrices: one triple per expert, all of one shape, dtype and device, contiguous."""
    if not matrices:
        raise checks.KernelError("A mixture needs at least one expert.")
    model = matrices[0][2]
    checks.shape("expert 0's down", model, [None, None])
    hidden, inner = model.shape
    checks.dtype("expert 0's down", model, checks.FLOATS)
    for index, expert in enumerate(matrices):
        shapes = ([inner, hidden], [inner, hidden], [hidden, inner])
        for kind, matrix, shape in zip(("gate", "up", "down"), expert, shapes, strict=True):
            name = f"expert {index}'s {kind}"
            checks.shape(name, matrix, shape)
            checks.same_dtype(name, matrix, "expert 0's down", model)
            checks.same_device(name, matrix, "expert 0's down", model)
            if not matrix.is_contiguous():
                raise checks.KernelError(f"{name} must be contiguous.")
            if matrix.is_cuda and matrix.data_ptr() % 16:  # Triton reads 16 bytes at a time
                raise checks.KernelError(f"{name} must begin at a multiple of 16 bytes.")
    places = [[expert[kind].data_ptr() for expert in matrices] for kind in range(3)]
    return ExpertWeights(tuple(matrices), torch.tensor(places, device=model.device))


def route(
    logits: torch.Tensor, active: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = `active` experts of each token and their weights: softmax over all experts, the K
    largest, divided by their sum if `renormalise`.

    logits: [T, X]. Returns weights [T, K] in the logits' dtype and experts [T, K] int64, the
    likeliest first. Each token depends on itself only.
    """
    checks.shape("logits", logits, [None, None])
    checks.dtype("logits", logits, checks.FLOATS)
    if not 1 <= active <= logits.shape[1]:
        raise checks.KernelError(
            f"active must be between 1 and the {logits.shape[1]} experts, not {active}."
        )
    fast = dispatch.implementation("route", logits)
    if fast is not None:
        routed: tuple[torch.Tensor, torch.Tensor] = fast(logits, active, renormalise=renormalise)
        return routed
    weights, experts = logits.float().softmax(-1).topk(active, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    matrices: ExpertWeights,
    activation: str,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """Σ_k weights[t, k] · down(activate(gate(x_t), up(x_t))) of expert experts[t, k]: [T, E].

    x: [T, E]; weights, experts: [T, K], from `route`; activation: a key of GATES. A token's sum
    runs in the order of the experts' numbers, in float32, and is rounded once. Only experts that
    some token goes to are read.

    invariant: a token has the same bits in any batch. On CUDA it always has, and the host is not
    asked which experts are needed, so that the call can be recorded.
    """
    checks.shape("x", x, [None, matrices.hidden_size])
    checks.shape("weights", weights, [x.shape[0], None])
    checks.shape("experts", experts, weights.shape)
    checks.dtype("experts", experts, (torch.int64,))
    checks.same_dtype("x", x, "the experts' weights", matrices.matrices[0][2])
    for name, tensor in (("weights", weights), ("experts", experts)):
        checks.same_device(name, tensor, "x", x)
    checks.same_device("the experts' weights", matrices.pointers, "x", x)
    if activation not in GATES:
        raise checks.KernelError(
            f"activation must be one of {', '.join(GATES)}, not {activation!r}."
        )
    fast = dispatch.implementation("mixture", x)
    if fast is not None:
        mixed: torch.Tensor = fast(x, weights, experts, matrices, activation)
        return mixed
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    activate = GATES[activation]
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        gate, up, down = matrices.matrices[expert]
        rows = x[tokens]
        halves = (linear(rows, matrix, invariant=invariant) for matrix in (gate, up))
        made = linear(activate(*halves, invariant=invariant), down, invariant=invariant)
        out.index_add_(0, tokens, made.float() * weights[tokens, place].float().unsqueeze(1))
    return out.to(x.dtype)
