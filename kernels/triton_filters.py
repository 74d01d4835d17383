"""The smallest score that a row's filters keep, in Triton; see `pdserve.kernels.sample`.

All programs together find the largest score of each group of GROUP tokens; then one program per row
looks only at groups that can matter. The k-th largest of the groups' maxima is a lower bound of the
k-th largest score, so at least all scores that top-k keeps lie in the groups that reach it, and
these are k but for ties. For top-p without top-k the groups are taken from the top, ever more of
them, until their scores from the bound on hold the wanted mass; their last resort is all groups.

Within the groups an interval of scores is narrowed down by counting (top-k) or adding up (top-p)
what lies above a score in its middle. Both ends are always scores that exist, so it ends with the
exact score. Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 64
"""Tokens whose maximum is kept."""
TILE = 4096
"""Tokens of listed groups at a time. The first tile stays in registers: for k up to TILE / GROUP
that is all there is."""
WIDER = 16
"""How many times more groups are taken when their mass does not suffice."""


def thresholds(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    chunk: int,
    warps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest score that each row keeps, [R] float32, -inf for all; and for rows that have one
    the largest score of each `chunk` tokens, [R, ⌈V / chunk⌉] float32.

    logits: [R, V] with contiguous rows; chunk: a power of two, a multiple of GROUP."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, chunk)
    groups = chunks * (chunk // GROUP)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    least, tops, sums, maxima = numbers(rows), *(numbers(rows, n) for n in (chunks, chunks, groups))
    listed = torch.empty((rows, groups), dtype=torch.int32, device=logits.device)
    filters = (logits, temperature, top_k, top_p, min_p)
    maxima_kernel[(rows, chunks)](
        *filters,
        tops,
        sums,
        maxima,
        vocab,
        chunks,
        logits.stride(0),
        CHUNK=chunk,
        GROUP=GROUP,
        num_warps=warps,
    )
    threshold_kernel[(rows,)](
        *filters,
        tops,
        sums,
        maxima,
        listed,
        least,
        vocab,
        chunks,
        groups,
        logits.stride(0),
        CHUNKS_PAD=triton.next_power_of_2(chunks),
        GROUPS_PAD=triton.next_power_of_2(groups),
        GROUP=GROUP,
        TILE=TILE,
        WIDER=WIDER,
        num_warps=16,
    )
    return least, tops


@triton.jit
def scores_at(row_ptr, token, vocab, temperature):
    """logit / temperature, correctly rounded as in the reference; -inf past the vocabulary."""
    logits = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
    return tl.div_rn(logits, temperature + tl.zeros_like(logits))


@triton.jit
def maxima_kernel(
    logit_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    sum_ptr,
    maximum_ptr,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of CHUNK tokens of one row: the largest score, Σ exp(score - it), and the largest score of
    each GROUP. Nothing for a row without filters."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (tl.load(min_p_ptr + row) > 0):
        group = tl.arange(0, CHUNK // GROUP)
        token = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        scores = scores_at(logit_ptr + row * stride, token, vocab, tl.load(temperature_ptr + row))
        maxima = tl.max(scores, axis=1)
        top = tl.max(maxima, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        tl.store(maximum_ptr + (row * chunks + chunk) * (CHUNK // GROUP) + group, maxima)
        tl.store(top_ptr + row * chunks + chunk, top)
        total = tl.sum(tl.sum(tl.exp(scores - base), axis=1), axis=0)
        tl.store(sum_ptr + row * chunks + chunk, total)


@triton.jit
def scores_of(
    row_ptr, list_ptr, count, start, vocab, temperature, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """TILE scores from place `start` of the `count` listed groups on; -inf past their end."""
    place = start + tl.arange(0, TILE)
    there = place < count * GROUP
    group = tl.load(list_ptr + place // GROUP, mask=there, other=0)
    token = tl.where(there, group * GROUP + place % GROUP, vocab)
    return scores_at(row_ptr, token, vocab, temperature)


@triton.jit
def weight_of(scores, counts, top, BY_MASS: tl.constexpr):
    """What each score that counts adds: 1, or exp(score - top)."""
    if BY_MASS:
        return tl.where(counts, tl.exp(scores - top), 0.0)
    return tl.where(counts, 1.0, 0.0)


@triton.jit
def survey(
    first,
    row_ptr,
    list_ptr,
    count,
    vocab,
    temperature,
    floor,
    top,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of the listed groups' finite scores from `floor` up: the lowest, how many, and their mass."""
    kept = (first >= floor) & (first > float("-inf"))
    lowest = tl.where(kept, first, float("inf"))
    found = weight_of(first, kept, top, False)
    mass = weight_of(first, kept, top, True)
    for start in range(TILE, count * GROUP, TILE):
        scores = scores_of(row_ptr, list_ptr, count, start, vocab, temperature, GROUP, TILE)
        kept = (scores >= floor) & (scores > float("-inf"))
        lowest = tl.minimum(lowest, tl.where(kept, scores, float("inf")))
        found += weight_of(scores, kept, top, False)
        mass += weight_of(scores, kept, top, True)
    return tl.min(lowest, axis=0), tl.sum(found, axis=0), tl.sum(mass, axis=0)


@triton.jit
def search(
    first,
    row_ptr,
    list_ptr,
    count,
    vocab,
    temperature,
    low,
    high,
    top,
    floor,
    wanted,
    BY_MASS: tl.constexpr,
    ALONE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest score v in [low, high] above which (v included) there are `wanted` scores, or
    with BY_MASS, a sum of exp(score - top) of `wanted` among those from `floor` up. The scores are
    those of `first` and, unless ALONE, of the listed groups after the first TILE.

    low: a score for which that is true; high: the largest."""
    while low < high:
        middle = low + (high - low) * 0.5
        # Of two neighbouring floats the middle may be the lower one: then ask about the upper.
        pivot = tl.where(middle > low, middle, high)
        above = first >= pivot
        found = weight_of(first, above & (first >= floor), top, BY_MASS)
        at_least = tl.where(above, first, float("inf"))
        below = tl.where(above, float("-inf"), first)
        if not ALONE:
            for start in range(TILE, count * GROUP, TILE):
                scores = scores_of(row_ptr, list_ptr, count, start, vocab, temperature, GROUP, TILE)
                above = scores >= pivot
                found += weight_of(scores, above & (scores >= floor), top, BY_MASS)
                at_least = tl.minimum(at_least, tl.where(above, scores, float("inf")))
                below = tl.maximum(below, tl.where(above, float("-inf"), scores))
        if tl.sum(found, axis=0) >= wanted:
            low = tl.min(at_least, axis=0)
        else:
            high = tl.maximum(tl.max(below, axis=0), low)
    return low


@triton.jit
def threshold_kernel(
    logit_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    sum_ptr,
    maximum_ptr,
    list_ptr,
    least_ptr,
    vocab,
    chunks,
    groups,
    stride,
    CHUNKS_PAD: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WIDER: tl.constexpr,
):
    """The smallest score that one row keeps; -inf for a row without filters."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, list_ptr = logit_ptr + row * stride, list_ptr + row * groups
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    least = float("-inf")
    limited = (top_k > 0) & (top_k < vocab)
    if limited | (top_p < 1) | (min_p > 0):
        chunk = tl.arange(0, CHUNKS_PAD)
        tops = tl.load(top_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
        top = tl.max(tops, axis=0)
        if limited | (top_p < 1):
            sums = tl.load(sum_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
            all_mass = tl.sum(sums * tl.exp(tops - top), axis=0)
            group = tl.arange(0, GROUPS_PAD)
            maxima = tl.load(
                maximum_ptr + row * groups + group, mask=group < groups, other=float("-inf")
            )
            finite = maxima > float("-inf")
            available = tl.sum(finite.to(tl.int32), axis=0)
            lowest_top = tl.min(tl.where(finite, maxima, float("inf")), axis=0)
            taken = tl.where(limited, top_k, TILE // GROUP).to(tl.int32)
            bound, lowest, found, mass = float("-inf"), float("inf"), 0.0, 0.0
            count = 0
            first = tl.zeros([TILE], dtype=tl.float32)
            unsure = True
            while unsure:
                bound = float("-inf")
                if available > taken:
                    wanted = taken.to(tl.float32)
                    bound = search(
                        maxima, row_ptr, list_ptr, 0, vocab, temperature,
                        lowest_top, top, top, lowest_top, wanted, False, True, GROUP, TILE,
                    )  # fmt: skip
                chosen = finite & (maxima >= bound)
                count = tl.sum(chosen.to(tl.int32), axis=0)
                tl.debug_barrier()  # all have read the list before
                tl.store(list_ptr + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, group, mask=chosen)
                tl.debug_barrier()  # the list is there for all
                first = scores_of(row_ptr, list_ptr, count, 0, vocab, temperature, GROUP, TILE)
                lowest, found, mass = survey(
                    first, row_ptr, list_ptr, count, vocab, temperature, bound, top, GROUP, TILE
                )
                unsure = (limited == 0) & (mass < top_p * all_mass) & (available > taken)
                taken *= WIDER
            least = lowest
            if limited & (found > top_k.to(tl.float32)):
                least = search(
                    first, row_ptr, list_ptr, count, vocab, temperature,
                    lowest, top, top, lowest, top_k.to(tl.float32), False, False, GROUP, TILE,
                )  # fmt: skip
            if top_p < 1:
                if limited:
                    _, _, all_mass = survey(
                        first, row_ptr, list_ptr, count, vocab, temperature, least, top, GROUP, TILE
                    )
                least = search(
                    first, row_ptr, list_ptr, count, vocab, temperature,
                    least, top, top, least, top_p * all_mass, True, False, GROUP, TILE,
                )  # fmt: skip
        if min_p > 0:
            least = tl.maximum(least, top + tl.log(min_p))
    tl.store(least_ptr + row, least)
