"""Penalties, filters, the draw and log-probabilities against plain Python in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pdserve.kernels import (
    KernelError,
    apply_bias,
    apply_penalties,
    greedy,
    log_probabilities,
    sample,
)
from pdserve.kernels.sampling import SHORTLIST

Filters = dict[str, Any]
"""Some of top_k, top_p and min_p."""


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor | None = None,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    filtered: bool = True,
) -> torch.Tensor:
    """`sample` with the same temperature and filters for all rows."""
    rows = logits.shape[0]
    return sample(
        logits,
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        filtered=filtered,
        seeds=seeds,
        positions=torch.zeros(rows, dtype=torch.int64) if positions is None else positions,
    )


def kept_tokens(
    logits: torch.Tensor,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """The probability of each token that may be drawn, by the rules in words."""
    scores = [logit / temperature for logit in logits.double().tolist()]
    best = max(scores)
    weights = {token: math.exp(score - best) for token, score in enumerate(scores)}
    order = sorted(weights, key=lambda token: -weights[token])
    if top_k:
        last = weights[order[min(top_k, len(order)) - 1]]
        order = [token for token in order if weights[token] >= last]
    if top_p < 1:
        total, mass = sum(weights[token] for token in order), 0.0
        for count, token in enumerate(order):
            mass += weights[token] / total
            if mass >= top_p:
                last = weights[order[count]]
                order = [token for token in order if weights[token] >= last]
                break
    order = [token for token in order if weights[token] >= min_p]
    total = sum(weights[token] for token in order)
    return {token: weights[token] / total for token in order}


@pytest.mark.parametrize("vocab", [1, 17, 500, 4097])
@pytest.mark.parametrize(
    ("temperature", "filters"),
    [
        (1.0, {}),
        (0.7, {"top_k": 1}),
        (1.0, {"top_k": 7}),
        (1.3, {"top_k": 400}),
        (1.0, {"top_p": 0.5}),
        (2.0, {"top_p": 0.999}),
        (0.5, {"min_p": 0.05}),
        (1.0, {"top_k": 50, "top_p": 0.8, "min_p": 0.01}),
        (3.0, {"top_k": 10_000, "top_p": 0.95}),
    ],
)
def test_only_tokens_that_the_filters_keep_are_drawn_and_the_likeliest_of_all_is_possible(
    vocab: int, temperature: float, filters: Filters
) -> None:
    logits = torch.randn(vocab) * 2
    allowed = kept_tokens(logits, temperature, **filters)
    rows = 300
    drawn = draw(logits.expand(rows, -1), torch.arange(rows), temperature=temperature, **filters)
    assert set(drawn.tolist()) <= set(allowed)
    if len(allowed) <= 10:  # each with a probability that 300 draws do not miss
        likely = {token for token, chance in allowed.items() if chance > 0.05}
        assert likely <= set(drawn.tolist())


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 30, "top_p": 0.95}]
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float, filters: Filters) -> None:
    logits = torch.randn(41) * 1.5
    expected = kept_tokens(logits, temperature, **filters)
    draws = 10_000
    # Half by seed, half by position: both are to be independent.
    half = torch.arange(draws // 2)
    zero = torch.zeros_like(half)
    drawn = torch.cat(
        [
            draw(logits.expand(len(half), -1), half, zero, temperature, **filters),
            draw(logits.expand(len(half), -1), zero + 99, half, temperature, **filters),
        ]
    )
    counts = drawn.bincount(minlength=41).tolist()
    statistic, freedom = 0.0, -1
    for token, count in enumerate(counts):
        if token not in expected:
            assert count == 0
            continue
        wanted = expected[token] * draws
        statistic += (count - wanted) ** 2 / wanted
        freedom += 1
    # Wilson and Hilferty's approximation of chi-square's upper 1e-4 quantile; seeds are fixed.
    cube = 2 / (9 * max(freedom, 1))
    assert statistic < max(freedom, 1) * (1 - cube + 3.72 * math.sqrt(cube)) ** 3


def test_a_row_draws_the_same_in_any_batch() -> None:
    vocab, rows = 1003, 40
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocab, generator=generator)
    parameters = {
        "temperature": torch.rand(rows, generator=generator) + 0.3,
        "top_k": torch.tensor([0, 3, 700, 0] * 10),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.99, 1.0] * 8),
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.0] * 10),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "positions": torch.randint(0, 5000, (rows,), generator=generator),
    }
    together = sample(logits, **parameters)
    shuffled = torch.randperm(rows, generator=generator)
    mixed = {name: value[shuffled] for name, value in parameters.items()}
    again = sample(logits[shuffled], **mixed)
    assert torch.equal(again, together[shuffled])
    alone = [
        sample(
            logits[row : row + 1].clone(),
            **{name: value[row : row + 1] for name, value in parameters.items()},
        ).item()
        for row in range(rows)
    ]
    assert alone == together.tolist()


def test_a_filter_that_keeps_everything_draws_as_no_filter() -> None:
    """The numbers of a token are the same whether all are made or only those of the survivors."""
    logits = torch.randn(50, 700)
    seeds = torch.arange(50)
    plain = draw(logits, seeds)
    assert torch.equal(draw(logits, seeds, min_p=1e-30), plain)
    assert torch.equal(draw(logits, seeds, top_k=700), plain)
    assert torch.equal(draw(logits, seeds, top_k=5000), plain)
    assert torch.equal(draw(logits, seeds, filtered=False), plain)


def test_a_flat_distribution_is_sorted_only_as_far_as_needed_and_correctly() -> None:
    """Top-p beyond the short list: the same kept set as by a full sort."""
    vocab = SHORTLIST * 4
    logits = torch.linspace(0, 0.5, vocab)[torch.randperm(vocab)]
    allowed = kept_tokens(logits, top_p=0.6)
    assert len(allowed) > SHORTLIST
    drawn = draw(logits.expand(2000, -1), torch.arange(2000), top_p=0.6)
    assert set(drawn.tolist()) <= set(allowed)
    assert len(set(drawn.tolist())) > 0.9 * len(allowed)


def test_equals_of_the_last_kept_token_are_kept_too() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]).expand(400, -1)
    drawn = draw(logits, torch.arange(400), top_k=2)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((300, 9), float("-inf"))
    logits[:, [2, 5]] = 1.0
    some: list[Filters] = [{}, {"top_p": 0.99}, {"top_k": 4}, {"min_p": 0.5}]
    for filters in some:
        assert set(draw(logits, torch.arange(300), **filters).tolist()) == {2, 5}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[1, [7, 900]] = 1.0
    logits[2, 999] = 0.5
    assert greedy(logits).tolist() == [0, 7, 999]


def test_penalties_equal_the_formula() -> None:
    rows, vocab = 4, 60
    logits = torch.randn(rows, vocab) * 3
    presence = torch.tensor([0.0, 0.5, 0.0, -1.0])
    frequency = torch.tensor([0.3, 0.0, 0.0, 0.7])
    repetition = torch.tensor([1.0, 1.5, 1.0, 0.8])
    held = {0: {3: 2, 9: 0}, 1: {0: 1, 59: 0, 30: 4}, 3: {5: 3}}
    expected = logits.double().tolist()
    entries = [(row, token, count) for row in held for token, count in held[row].items()]
    for row, token, count in entries:
        value, factor = expected[row][token], float(repetition[row])
        value = value / factor if value > 0 else value * factor
        value -= float(frequency[row]) * count + float(presence[row]) * (count > 0)
        expected[row][token] = value
    columns = [torch.tensor(column) for column in zip(*entries, strict=True)]
    apply_penalties(logits, *columns, presence=presence, frequency=frequency, repetition=repetition)
    torch.testing.assert_close(
        logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


def test_bias_is_added_where_it_is_named() -> None:
    logits = torch.randn(2, 5)
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[1, 3] = float("-inf")
    entries = torch.tensor([0, 1]), torch.tensor([3, 3]), torch.tensor([2.5, float("-inf")])
    apply_bias(logits, *entries)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(("rows", "vocab", "top"), [(0, 9, 3), (1, 1, 1), (3, 500, 20), (2, 5, 9)])
def test_log_probabilities_equal_log_softmax(rows: int, vocab: int, top: int) -> None:
    logits = torch.randn(rows, vocab) * 4
    tokens = torch.randint(0, vocab, (rows,))
    own, rank, ids, values = log_probabilities(logits, tokens, top)
    exact = logits.double().log_softmax(-1)
    width = min(top, vocab)
    assert ids.shape == values.shape == (rows, width)
    for row in range(rows):
        token = int(tokens[row])
        assert own[row].item() == pytest.approx(exact[row, token].item(), rel=1e-5, abs=1e-5)
        order = sorted(range(vocab), key=lambda item: -logits[row, item].item())
        assert rank[row] == order.index(token) + 1
        assert ids[row].tolist() == order[:width]
        expected = [exact[row, item].item() for item in order[:width]]
        assert values[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_no_top_tokens_are_none() -> None:
    _, _, ids, values = log_probabilities(torch.randn(2, 5), torch.tensor([0, 1]), 0)
    assert ids.shape == values.shape == (2, 0)


def test_equals_share_a_rank() -> None:
    _, rank, _, _ = log_probabilities(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([2]), 1)
    assert rank.tolist() == [1]


def test_bad_arguments_are_refused_with_a_sentence() -> None:
    with pytest.raises(KernelError, match="logits must be float32, not bfloat16"):
        draw(torch.zeros(1, 4).bfloat16(), torch.zeros(1).long())
    with pytest.raises(KernelError, match="seeds must be int64, not float32"):
        draw(torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(KernelError, match=r"positions must have the shape \[2\]"):
        draw(torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(1).long())
    with pytest.raises(KernelError, match="positions must be contiguous, not 2 elements apart"):
        draw(torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(4).long()[::2])
    with pytest.raises(KernelError, match="token_ids must be int64, not int32"):
        log_probabilities(torch.zeros(1, 4), torch.zeros(1).int(), 1)
    apart = torch.zeros(4, 2).t()
    with pytest.raises(KernelError, match="rows of logits must be contiguous"):
        apply_bias(apart, torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1))
    with pytest.raises(KernelError, match="bias must be float32, not float64"):
        apply_bias(
            torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1).double()
        )
    with pytest.raises(KernelError, match=r"token_ids must have the shape \[2\]"):
        apply_bias(torch.zeros(1, 4), torch.zeros(2).long(), torch.zeros(1).long(), torch.zeros(1))
