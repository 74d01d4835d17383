"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): which experts a token goes to, and
what they make of it.

Legend: T tokens, E hidden size, I inner size of an expert, X experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pdserve.kernels import checks
from pdserve.kernels.linear import linear

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [I, E], up [I, E], down [E, I]."""
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The gated activation, such as `silu_and_mul`."""


def route(
    logits: torch.Tensor, active: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = `active` experts of each token and their weights: softmax over all experts, the K
    largest, divided by their sum if `renormalise`.

    logits: [T, X]. Returns weights [T, K] in the logits' dtype and experts [T, K] int64.
    """
    checks.shape("logits", logits, [None, None])
    checks.dtype("logits", logits, checks.FLOATS)
    if not 1 <= active <= logits.shape[1]:
        raise checks.KernelError(
            f"active must be between 1 and the {logits.shape[1]} experts, not {active}."
        )
    weights, experts = logits.float().softmax(-1).topk(active, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    matrices: Sequence[Expert],
    activate: Gate,
) -> torch.Tensor:
    """Σ_k weights[t, k] · down(activate(gate(x_t), up(x_t))) of expert experts[t, k]: [T, E].

    x: [T, E]; weights, experts: [T, K], from `route`; matrices: one triple per expert. Only experts
    that some token goes to are read; each is one product for all of its tokens. A token's sum runs
    in the order of the experts' numbers, in float32, and is rounded once.
    """
    checks.shape("x", x, [None, None])
    checks.shape("weights", weights, [x.shape[0], None])
    checks.shape("experts", experts, weights.shape)
    checks.dtype("experts", experts, (torch.int64,))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        gate, up, down = matrices[expert]
        rows = x[tokens]
        made = linear(activate(linear(rows, gate), linear(rows, up)), down)
        out.index_add_(0, tokens, made.float() * weights[tokens, place].float().unsqueeze(1))
    return out.to(x.dtype)
