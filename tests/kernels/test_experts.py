"""Mixtures of experts against float64, by the reference and by Triton in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdserve import kernels
from pdserve.kernels import KernelError, expert_weights, mixture, route

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("count", "active"), [(1, 1), (7, 1), (7, 3), (7, 7), (130, 8)])
def test_tokens_go_to_their_likeliest_experts(count: int, active: int, renormalise: bool) -> None:
    logits = torch.randn(17, count + 2)[:, 1:-1]
    weights, experts = route(logits, active, renormalise=renormalise)
    assert experts.dtype == torch.int64 and weights.dtype == logits.dtype
    for row in range(17):
        chances = logits[row].double().softmax(-1)
        best = sorted(range(count), key=lambda expert: -chances[expert])[:active]
        assert experts[row].tolist() == best
        total = sum(chances[best].tolist()) if renormalise else 1.0
        expected = [chances[expert].item() / total for expert in best]
        assert weights[row].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_logits_of_nothing_and_of_nan_name_experts_that_exist() -> None:
    weights, experts = route(torch.zeros(0, 4), 2, renormalise=True)
    assert weights.shape == experts.shape == (0, 2)
    _, experts = route(torch.full((3, 5), float("nan")), 2, renormalise=True)
    assert ((experts >= 0) & (experts < 5)).all()


def matrices(
    count: int, hidden: int, inner: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) / columns**0.5).to(dtype)

    return [
        (matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner)) for _ in range(count)
    ]


def expected(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, given: Any, activation: str
) -> torch.Tensor:
    total = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row].double(), experts[row].tolist(), strict=True):
            gate, up, down = (matrix.double() for matrix in given[expert])
            wide = x[row].double()
            total[row] += weight * (down @ (ACTIVATIONS[activation](gate @ wide) * (up @ wide)))
    return total


@pytest.mark.parametrize(
    ("tokens", "experts", "active", "hidden", "inner", "activation"),
    [
        (0, 5, 2, 20, 12, "silu"),
        (1, 5, 2, 20, 12, "gelu"),
        (17, 5, 5, 63, 1, "gelu_pytorch_tanh"),
        (150, 4, 2, 20, 70, "silu"),
        (9, 66, 3, 8, 9, "silu"),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_mixture_is_the_weighted_sum_of_its_experts(
    dtype: torch.dtype,
    tokens: int,
    experts: int,
    active: int,
    hidden: int,
    inner: int,
    activation: str,
    implementation: str,
) -> None:
    if implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    given = matrices(experts, hidden, inner, dtype)
    x = torch.randn(tokens, 2 * hidden).to(dtype)[:, :hidden]
    weights, chosen = route(torch.randn(tokens, experts).to(dtype), active, renormalise=True)
    actual = mixture(x, weights, chosen, expert_weights(given), activation)
    exact = expected(x, weights, chosen, given, activation)
    assert actual.dtype == dtype and not actual.isnan().any()
    error = (actual.double() - exact).norm() / exact.norm().clamp(1e-30)
    assert error < TOLERANCE[dtype]


@pytest.mark.usefixtures("rows_alone")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_has_the_same_bits_in_any_batch(dtype: torch.dtype, implementation: str) -> None:
    """Whatever the others make of their experts: none, or one for all."""
    if implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    given = expert_weights(matrices(6, 40, 24, dtype))
    x = torch.randn(70, 40).to(dtype)
    weights, chosen = route(torch.randn(70, 6).to(dtype), 3, renormalise=False)
    chosen[20:69] = torch.tensor([0, 1, 5])
    together = mixture(x, weights, chosen, given, "silu", invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70)):
        part = mixture(x[rows], weights[rows], chosen[rows], given, "silu", invariant=True)
        assert torch.equal(part, together[rows])


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    given = expert_weights(matrices(4, 8, 6, torch.float32))
    x, weights = torch.zeros(2, 8), torch.zeros(2, 3)
    with pytest.raises(KernelError, match="between 1 and the 4 experts, not 5"):
        route(torch.zeros(2, 4), 5, renormalise=True)
    with pytest.raises(KernelError, match=r"experts must have the shape \[2, 3\]"):
        mixture(x, weights, torch.zeros(2, 2).long(), given, "silu")
    with pytest.raises(KernelError, match=r"x must have the shape \[any, 8\]"):
        mixture(torch.zeros(2, 9), weights, torch.zeros(2, 3).long(), given, "silu")
    with pytest.raises(KernelError, match="x is float16 but the experts' weights is float32"):
        mixture(x.half(), weights, torch.zeros(2, 3).long(), given, "silu")
    with pytest.raises(KernelError, match="activation must be one of silu, .*, not 'relu'"):
        mixture(x, weights, torch.zeros(2, 3).long(), given, "relu")


def test_matrices_that_differ_are_refused_with_a_sentence() -> None:
    given = matrices(3, 8, 6, torch.float32)
    for expert, sentence in (
        (
            (given[1][0], given[1][0][:5], given[1][2]),
            r"expert 1's up must have the shape \[6, 8\]",
        ),
        ((given[1][0], given[1][0], given[1][2].half()), "expert 1's down is float16"),
        ((given[1][2].T, given[1][0], given[1][2]), "expert 1's gate must be contiguous"),
    ):
        with pytest.raises(KernelError, match=sentence):
            expert_weights([given[0], expert, given[2]])
    with pytest.raises(KernelError, match="at least one expert"):
        expert_weights([])


def test_a_mixture_holds_its_matrices() -> None:
    """The table of addresses is worth nothing without them."""
    held = expert_weights(matrices(2, 8, 6, torch.float32))
    assert held.pointers.tolist() == [
        [expert[kind].data_ptr() for expert in held.matrices] for kind in range(3)
    ]
    assert (held.count, held.hidden_size, held.inner_size) == (2, 8, 6)
    assert kernels.ExpertWeights is type(held)
