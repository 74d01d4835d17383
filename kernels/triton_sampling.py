"""From logits to tokens in Triton, without sorting the vocabulary; see `pdserve.kernels.sampling`.

A row is drawn in three steps. Each reads the row once, but for the second, which only filtered rows
take: it narrows an interval of scores down to the smallest score that is kept, by counting (top-k)
or adding up (top-p) what lies above a score in its middle. Both ends are always scores that exist,
so it ends with the exact score, after about as many passes as the vocabulary has bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import chosen

CHUNK = 4096
"""Tokens per program of a pass over all rows."""
SEARCH = 4096
"""Tokens at a time in the search, by one program per row."""


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    *,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """See `pdserve.kernels.apply_penalties`."""
    entries = rows.shape[0]
    if entries:
        penalties_kernel[(triton.cdiv(entries, 256),)](
            logits,
            rows,
            token_ids,
            counts,
            presence,
            frequency,
            repetition,
            entries,
            logits.stride(0),
            BLOCK=256,
        )


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """See `pdserve.kernels.apply_bitmask`."""
    if rows.shape[0]:
        vocab = logits.shape[1]
        bitmask_kernel[(rows.shape[0], triton.cdiv(vocab, CHUNK))](
            logits, rows, bitmask, vocab, logits.stride(0), bitmask.stride(0), CHUNK=CHUNK
        )


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """See `pdserve.kernels.sample`. Nothing is read back to the host."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    device = logits.device
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    config = chosen("sample")
    chunks = triton.cdiv(vocab, config["CHUNK"])
    least = torch.empty(rows, dtype=torch.float32, device=device)
    threshold_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        least,
        vocab,
        logits.stride(0),
        TILE=min(SEARCH, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    keys = torch.empty((rows, chunks), dtype=torch.float64, device=device)
    tokens = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    race_kernel[(rows, chunks)](
        logits,
        temperature,
        least,
        seeds,
        positions,
        keys,
        tokens,
        vocab,
        chunks,
        logits.stride(0),
        **config,
    )
    winner = keys.argmax(dim=1, keepdim=True)
    return tokens.gather(1, winner).squeeze(1)


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pdserve.kernels.log_probabilities`. The most likely tokens are torch.topk's, a radix
    selection on CUDA."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    device = logits.device
    chunks = triton.cdiv(vocab, CHUNK)
    tops = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    above = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    if rows:
        statistics_kernel[(rows, chunks)](
            logits, token_ids, tops, sums, above, vocab, chunks, logits.stride(0), CHUNK=CHUNK
        )
    highest = tops.amax(dim=1, keepdim=True)
    total = highest + (sums * (tops - highest).exp()).sum(dim=1, keepdim=True).log()
    own = logits.gather(1, token_ids.unsqueeze(1))
    values, ids = logits.topk(min(top, vocab), dim=-1)
    return (own - total).squeeze(1), above.sum(dim=1) + 1, ids, values - total


@triton.jit(do_not_specialize=["entries"])
def penalties_kernel(
    logit_ptr,
    row_ptr,
    token_ptr,
    count_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    entries,
    stride,
    BLOCK: tl.constexpr,
):
    """BLOCK entries: the logit of (row, token), penalised."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < entries
    row = tl.load(row_ptr + entry, mask=mask, other=0)
    place = logit_ptr + row * stride + tl.load(token_ptr + entry, mask=mask, other=0)
    count = tl.load(count_ptr + entry, mask=mask, other=0)
    factor = tl.load(repetition_ptr + row, mask=mask, other=1.0)
    logit = tl.load(place, mask=mask, other=0.0)
    logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
    logit -= tl.load(frequency_ptr + row, mask=mask, other=0.0) * count.to(tl.float32)
    logit -= tl.where(count > 0, tl.load(presence_ptr + row, mask=mask, other=0.0), 0.0)
    tl.store(place, logit, mask=mask)


@triton.jit
def bitmask_kernel(logit_ptr, row_ptr, mask_ptr, vocab, stride, mask_stride, CHUNK: tl.constexpr):
    """CHUNK tokens of one row: -inf where the bit is 0."""
    entry = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    word = tl.load(mask_ptr + entry * mask_stride + token // 32, mask=inside, other=-1)
    forbidden = inside & (((word >> (token % 32)) & 1) == 0)
    row = tl.load(row_ptr + entry)
    minus = tl.full([CHUNK], float("-inf"), dtype=tl.float32)
    tl.store(logit_ptr + row * stride + token, minus, mask=forbidden)


@triton.jit
def statistics_kernel(
    logit_ptr, token_ptr, top_ptr, sum_ptr, above_ptr, vocab, chunks, stride, CHUNK: tl.constexpr
):
    """Of CHUNK tokens of one row: the largest logit, Σ exp(logit - it), and how many are larger
    than the row's own token's."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logit_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
    own = tl.load(logit_ptr + row * stride + tl.load(token_ptr + row))
    top = tl.max(logits, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(top_ptr + row * chunks + chunk, top)
    tl.store(sum_ptr + row * chunks + chunk, tl.sum(tl.exp(logits - base), axis=0))
    tl.store(above_ptr + row * chunks + chunk, tl.sum((logits > own).to(tl.int64), axis=0))


@triton.jit
def scores_at(row_ptr, token, vocab, temperature):
    """logit / temperature, correctly rounded as in the reference; -inf past the vocabulary."""
    logits = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
    return tl.div_rn(logits, temperature + tl.zeros_like(logits))


@triton.jit
def search(
    row_ptr,
    vocab,
    temperature,
    low,
    high,
    top,
    floor,
    wanted,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest score v in [low, high] above which (v included) there are `wanted` scores, or
    with BY_MASS, a sum of exp(score - top) of `wanted` among those from `floor` up.

    low: the smallest score, for which that is true; high: the largest."""
    while low < high:
        middle = low + (high - low) * 0.5
        # Of two neighbouring floats the middle may be the lower one: then ask about the upper.
        pivot = tl.where(middle > low, middle, high)
        found = tl.zeros([TILE], dtype=tl.float32)
        at_least = tl.full([TILE], float("inf"), dtype=tl.float32)
        below = tl.full([TILE], float("-inf"), dtype=tl.float32)
        for start in range(0, vocab, TILE):
            token = start + tl.arange(0, TILE)
            scores = scores_at(row_ptr, token, vocab, temperature)
            above = scores >= pivot
            if BY_MASS:
                found += tl.where(above & (scores >= floor), tl.exp(scores - top), 0.0)
            else:
                found += above.to(tl.float32)
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
    least_ptr,
    vocab,
    stride,
    TILE: tl.constexpr,
):
    """The smallest score that one row keeps; -inf for a row without filters."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logit_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    least = float("-inf")
    limited = (top_k > 0) & (top_k < vocab)
    if limited | (top_p < 1) | (min_p > 0):
        highest = tl.full([TILE], float("-inf"), dtype=tl.float32)
        lowest = tl.full([TILE], float("inf"), dtype=tl.float32)
        finite = tl.zeros([TILE], dtype=tl.int32)
        for start in range(0, vocab, TILE):
            token = start + tl.arange(0, TILE)
            scores = scores_at(row_ptr, token, vocab, temperature)
            possible = scores > float("-inf")
            highest = tl.maximum(highest, scores)
            lowest = tl.minimum(lowest, tl.where(possible, scores, float("inf")))
            finite += possible.to(tl.int32)
        top = tl.max(highest, axis=0)
        bottom = tl.min(lowest, axis=0)
        least = bottom
        if limited & (tl.sum(finite, axis=0) > top_k):
            wanted = top_k.to(tl.float32)
            least = search(
                row_ptr, vocab, temperature, bottom, top, top, bottom, wanted, False, TILE
            )
        if top_p < 1:
            total = tl.zeros([TILE], dtype=tl.float32)
            for start in range(0, vocab, TILE):
                token = start + tl.arange(0, TILE)
                scores = scores_at(row_ptr, token, vocab, temperature)
                total += tl.where(scores >= least, tl.exp(scores - top), 0.0)
            wanted = top_p * tl.sum(total, axis=0)
            least = search(row_ptr, vocab, temperature, least, top, top, least, wanted, True, TILE)
        if min_p > 0:
            least = tl.maximum(least, top + tl.log(min_p))
    tl.store(least_ptr + row, least)


@triton.jit
def better(key, token, other_key, other_token):
    """The larger key with its token; of equals the lower token."""
    wins = (other_key > key) | ((other_key == key) & (other_token < token))
    return tl.where(wins, other_key, key), tl.where(wins, other_token, token)


@triton.jit
def race_kernel(
    logit_ptr,
    temperature_ptr,
    least_ptr,
    seed_ptr,
    position_ptr,
    key_ptr,
    winner_ptr,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
):
    """The winner among CHUNK tokens of one row: the largest score - ln(E) in float64, with E the
    exponential variate of (seed, position, token). One Philox block serves four tokens."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row_ptr = logit_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    least = tl.load(least_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    quad = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    zero = tl.zeros_like(quad)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        quad.to(tl.uint32),
        zero.to(tl.uint32) + low,
        zero.to(tl.uint32) + high,
        zero.to(tl.uint32),
    )
    token = quad * 4
    key = keys_of(row_ptr, token, vocab, temperature, least, word0)
    best = token
    for which in tl.static_range(1, 4):
        word = word1 if which == 1 else (word2 if which == 2 else word3)
        other = keys_of(row_ptr, token + which, vocab, temperature, least, word)
        key, best = better(key, best, other, token + which)
    largest = tl.max(key, axis=0)
    winner = tl.min(tl.where(key == largest, best, 0x7FFFFFFF), axis=0)
    tl.store(key_ptr + row * chunks + chunk, largest)
    tl.store(winner_ptr + row * chunks + chunk, winner.to(tl.int64))


@triton.jit
def keys_of(row_ptr, token, vocab, temperature, least, word):
    """score - ln(-ln(1 - u)), u = (word + ½) / 2³²: 1 - u is exact in float64. -inf if filtered."""
    scores = scores_at(row_ptr, token, vocab, temperature)
    rest = 1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    keys = scores.to(tl.float64) - tl.log(-tl.log(rest))
    return tl.where((scores >= least) & (token < vocab), keys, float("-inf"))
