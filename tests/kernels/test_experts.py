"""Mixtures of experts against plain Python in float64."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels import KernelError, mixture, route, silu_and_mul


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("active", [1, 3, 7])
def test_tokens_go_to_their_likeliest_experts(active: int, renormalise: bool) -> None:
    logits = torch.randn(17, 7)
    weights, experts = route(logits, active, renormalise=renormalise)
    for row in range(17):
        chances = logits[row].double().softmax(-1)
        best = sorted(range(7), key=lambda expert: -chances[expert])[:active]
        assert experts[row].tolist() == best
        total = sum(chances[best].tolist()) if renormalise else 1.0
        expected = [chances[expert].item() / total for expert in best]
        assert weights[row].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 17, 63])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_a_mixture_is_the_weighted_sum_of_its_experts(
    tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    matrices = [
        tuple((torch.randn(shape) / 5).to(dtype) for shape in ((12, 20), (12, 20), (20, 12)))
        for _ in range(5)
    ]
    x = torch.randn(tokens, 20).to(dtype)
    weights, experts = route(torch.randn(tokens, 5).to(dtype), 2, renormalise=True)
    actual = mixture(x, weights, experts, matrices, silu_and_mul)  # type: ignore[arg-type]
    expected = torch.zeros(tokens, 20, dtype=torch.float64)
    for row in range(tokens):
        for weight, expert in zip(weights[row].double(), experts[row].tolist(), strict=True):
            gate, up, down = (matrix.double() for matrix in matrices[expert])
            inner = torch.nn.functional.silu(gate @ x[row].double()) * (up @ x[row].double())
            expected[row] += weight * (down @ inner)
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm().clamp(1e-30)
    assert error < tolerance


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    with pytest.raises(KernelError, match="between 1 and the 4 experts, not 5"):
        route(torch.zeros(2, 4), 5, renormalise=True)
    with pytest.raises(KernelError, match=r"experts must have the shape \[2, 3\]"):
        mixture(torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 2).long(), [], silu_and_mul)
