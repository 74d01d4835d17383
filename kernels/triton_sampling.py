"""From logits to tokens in Triton, without sorting the vocabulary; see `pdserve.kernels.sampling`.

A row is drawn in three steps: the smallest score that its filters keep (`triton_filters`), the
race of all chunks of the vocabulary in float32, and the race in float64 of the chunks that the
first one leaves in doubt, which nearly always is one chunk. So the result is that of float64.

The keys of the first race, score - ln(E), are off by at most AHEAD + SLACK · |key|: E has a
relative error below 1e-5 (`near_exponential`), its logarithm, below 24 in size, one below 2⁻²² (so
5.7e-6), and the difference is rounded at 2⁻²⁴ of its size. A chunk whose largest near key lies more
than 4 · (AHEAD + SLACK · |key|) below the row's largest cannot hold the winner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdserve.kernels.configs import chosen
from pdserve.kernels.triton_filters import GROUP, scores_at, thresholds

CHUNK = 4096
"""Tokens per program of a pass over all rows."""
AHEAD, SLACK = 2.0**-14, 2.0**-22
"""Errors of a near key, several times what they can be."""


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
    filtered: bool = True,
) -> torch.Tensor:
    """See `pdserve.kernels.sample`. Nothing is read back to the host."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    device = logits.device
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    config = chosen("sample")
    chunk = min(config["CHUNK"], max(GROUP, triton.next_power_of_2(vocab)))
    warps = config["num_warps"]
    chunks = triton.cdiv(vocab, chunk)
    keys = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    if filtered:
        least, tops = thresholds(logits, temperature, top_k, top_p, min_p, chunk, warps)
    else:  # what is above -inf does not matter
        least, tops = torch.full_like(temperature, float("-inf")), keys
    shared = (logits, temperature, least, seeds, positions)
    near_race_kernel[(rows, chunks)](
        *shared, tops, keys, vocab, chunks, logits.stride(0), CHUNK=chunk, num_warps=warps
    )
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    race_kernel[(rows,)](
        *shared,
        keys,
        tokens,
        vocab,
        chunks,
        logits.stride(0),
        CHUNK=chunk,
        CHUNKS_PAD=triton.next_power_of_2(chunks),
        AHEAD=AHEAD,
        SLACK=SLACK,
        num_warps=warps,
    )
    return tokens


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pdserve.kernels.log_probabilities`. The most likely tokens are torch.topk's."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    device = logits.device
    chunks = triton.cdiv(vocab, CHUNK)
    tops = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    above = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    maxima = torch.empty((rows, chunks * CHUNK // GROUP), dtype=torch.float32, device=device)
    if rows:
        statistics_kernel[(rows, chunks)](
            logits,
            token_ids,
            tops,
            sums,
            above,
            maxima,
            vocab,
            chunks,
            logits.stride(0),
            CHUNK=CHUNK,
            GROUP=GROUP,
        )
    highest = tops.amax(dim=1, keepdim=True)
    total = highest + (sums * (tops - highest).exp()).sum(dim=1, keepdim=True).log()
    own = logits.gather(1, token_ids.unsqueeze(1))
    values, ids = best_of(logits, maxima, min(top, vocab))
    return (own - total).squeeze(1), above.sum(dim=1) + 1, ids, values - total


def best_of(
    logits: torch.Tensor, maxima: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` largest of each row and their tokens: they lie in the `top` groups of the largest
    maxima, so where these are few and whole, only these are looked at."""
    vocab = logits.shape[1]
    if vocab % GROUP or 2 * top * GROUP > vocab:
        values, tokens = logits.topk(top, dim=-1)
        return values, tokens
    groups = maxima[:, : vocab // GROUP].topk(top, dim=-1, sorted=False).indices
    tokens = groups.unsqueeze(2) * GROUP + torch.arange(GROUP, device=logits.device)
    tokens = tokens.flatten(1)
    values, places = logits.gather(1, tokens).topk(top, dim=-1)
    return values, tokens.gather(1, places)


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
    logit_ptr,
    token_ptr,
    top_ptr,
    sum_ptr,
    above_ptr,
    maximum_ptr,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of CHUNK tokens of one row: the largest logit, Σ exp(logit - it), how many are larger than
    the row's own token's, and the largest of each GROUP."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    group = tl.arange(0, CHUNK // GROUP)
    token = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(logit_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
    own = tl.load(logit_ptr + row * stride + tl.load(token_ptr + row))
    maxima = tl.max(logits, axis=1)
    tl.store(maximum_ptr + (row * chunks + chunk) * (CHUNK // GROUP) + group, maxima)
    top = tl.max(maxima, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(top_ptr + row * chunks + chunk, top)
    tl.store(sum_ptr + row * chunks + chunk, tl.sum(tl.sum(tl.exp(logits - base), axis=1), axis=0))
    above = tl.sum(tl.sum((logits > own).to(tl.int32), axis=1), axis=0)
    tl.store(above_ptr + row * chunks + chunk, above.to(tl.int64))


@triton.jit
def quads_of(chunk, seed, position, CHUNK: tl.constexpr):
    """Tokens [CHUNK / 4, 4] of a chunk and the word of each: a Philox block serves four tokens."""
    quad = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    zero = tl.zeros_like(quad).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        quad.to(tl.uint32),
        zero + (position & 0xFFFFFFFF).to(tl.uint32),
        zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero,
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return quad[:, None] * 4 + tl.arange(0, 4)[None, :], tl.reshape(words, [CHUNK // 4, 4])


@triton.jit
def near_exponential(word):
    """-ln(1 - u) in float32, u = (word + ½) / 2³², with a relative error below 1e-5.

    For small u the series Σ uⁿ / n, whose sixth power is below 2⁻²⁴; for others ln of 1 - u, made
    from the word's complement: it loses nothing near 1, and its logarithm is at least 1/16."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = 1.0 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * (0.2 + u * (1 / 6)))))
    return tl.where(u < 0.0625, u * series, -tl.log(rest))


@triton.jit
def near_race_kernel(
    logit_ptr,
    temperature_ptr,
    least_ptr,
    seed_ptr,
    position_ptr,
    top_ptr,
    key_ptr,
    vocab,
    chunks,
    stride,
    CHUNK: tl.constexpr,
):
    """About the largest score - ln(E) among CHUNK tokens of one row; -inf where none may win."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    least = tl.load(least_ptr + row)
    largest = float("-inf")
    # The chunk's largest score is known where the row has a threshold.
    if (least == float("-inf")) | (tl.load(top_ptr + row * chunks + chunk) >= least):
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        token, word = quads_of(chunk, seed, position, CHUNK)
        scores = scores_at(logit_ptr + row * stride, token, vocab, tl.load(temperature_ptr + row))
        keys = scores - tl.log(near_exponential(word))
        keys = tl.where((scores >= least) & (token < vocab), keys, float("-inf"))
        largest = tl.max(tl.max(keys, axis=1), axis=0)
    tl.store(key_ptr + row * chunks + chunk, largest)


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
    CHUNKS_PAD: tl.constexpr,
    AHEAD: tl.constexpr,
    SLACK: tl.constexpr,
):
    """The winner of one row: the largest score - ln(E) in float64, with E the exponential variate
    of (seed, position, token), of equals the lowest token. Only chunks that may hold it are read;
    0 where nothing can win."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    least = tl.load(least_ptr + row)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    index = tl.arange(0, CHUNKS_PAD)
    near = tl.load(key_ptr + row * chunks + index, mask=index < chunks, other=float("-inf"))
    highest = tl.max(near, axis=0)
    size = tl.abs(highest)
    margin = tl.where(size < float("inf"), 4.0 * (AHEAD + SLACK * size), 0.0)
    possible = (near >= highest - margin) & (near > float("-inf"))
    best, winner = tl.full([], float("-inf"), dtype=tl.float64), tl.full([], 0, dtype=tl.int32)
    chunk = tl.min(tl.where(possible, index, CHUNKS_PAD), axis=0)
    while chunk < chunks:
        token, word = quads_of(chunk, seed, position, CHUNK)
        scores = scores_at(logit_ptr + row * stride, token, vocab, temperature)
        # 1 - u is exact in float64.
        rest = 1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        keys = scores.to(tl.float64) - tl.log(-tl.log(rest))
        keys = tl.where((scores >= least) & (token < vocab), keys, float("-inf"))
        largest = tl.max(tl.max(keys, axis=1), axis=0)
        first = tl.where(keys == largest, token, 0x7FFFFFFF)
        if largest > best:  # a later chunk's equals are higher tokens
            best, winner = largest, tl.min(tl.min(first, axis=1), axis=0)
        chunk = tl.min(tl.where(possible & (index > chunk), index, CHUNKS_PAD), axis=0)
    tl.store(winner_ptr + row, winner.to(tl.int64))
