"""From logits to tokens: bias, penalties, filters, the draw, and log-probabilities.

Legend: R rows (one per token to draw), V tokens in the vocabulary. Each row's result depends on
its own logits and parameters only. Sparse arguments are lists of (row, token id) entries.
"""

from __future__ import annotations

import torch

from pdserve.kernels import checks, dispatch, native
from pdserve.kernels.random import exponential, token_words, vocabulary_words

SHORTLIST = 256
"""Most likely tokens looked at for top-p before the whole vocabulary is sorted."""


def apply_bias(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor
) -> None:
    """logits[row, token] += bias, in place; -inf forbids a token.

    logits: [R, V] float32; rows, token_ids: [E] int64; bias: [E] float32.
    """
    _check_entries(logits, rows, token_ids)
    _check_column("bias", bias, rows.shape[0], torch.float32, logits)
    logits.index_put_((rows, token_ids), bias, accumulate=True)


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
    """Penalise the tokens that a sequence holds already, in place.

    One entry per distinct token of a row's prompt and output; `counts` tells how often it is in
    the output. With r, p, f of the row (1, 0, 0: no change):
        logit = logit / r if logit > 0 else logit · r       (Keskar et al. 2019, arXiv:1909.05858)
        logit = logit - f · count - p · [count > 0]
    logits: [R, V] float32; rows, token_ids, counts: [E] int64, no (row, token) twice;
    presence, frequency, repetition: [R] float32.
    """
    _check_entries(logits, rows, token_ids)
    _check_column("counts", counts, rows.shape[0], torch.int64, logits)
    for name, values in (
        ("presence", presence),
        ("frequency", frequency),
        ("repetition", repetition),
    ):
        _check_column(name, values, logits.shape[0], torch.float32, logits)
    fast = dispatch.implementation("apply_penalties", logits)
    if fast is not None:
        fast(
            logits,
            rows,
            token_ids,
            counts,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )
        return
    held = logits[rows, token_ids]
    factor = repetition[rows]
    held = torch.where(held > 0, held / factor, held * factor)
    held = held - frequency[rows] * counts - presence[rows] * (counts > 0)
    logits.index_put_((rows, token_ids), held)


def apply_bitmask(logits: torch.Tensor, rows: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Forbid tokens, in place: logits[rows[i], v] = -inf where bit v % 32 of bitmask[i, v // 32] is
    0. What grammars hand out.

    logits: [R, V] float32; rows: [n] int64, no row twice; bitmask: [n, ⌈V / 32⌉] int32.
    """
    _check_rows(logits)
    _check_column("rows", rows, None, torch.int64, logits)
    checks.shape("bitmask", bitmask, [rows.shape[0], (logits.shape[1] + 31) // 32])
    checks.dtype("bitmask", bitmask, (torch.int32,))
    checks.same_device("bitmask", bitmask, "logits", logits)
    if bitmask.stride(1) != 1 and bitmask.shape[1] > 1:
        raise checks.KernelError("The words of each row of bitmask must be contiguous.")
    fast = dispatch.implementation("apply_bitmask", logits)
    if fast is not None:
        fast(logits, rows, bitmask)
        return
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bitmask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill_(~allowed, float("-inf"))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the lowest id among equals: [R, V] → [R] int64."""
    checks.shape("logits", logits, [None, None])
    if logits.dtype is torch.float32 and native.serves(logits) and logits.is_contiguous():
        return native.greedy(logits)
    return logits.argmax(dim=-1)


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
    """Draw one token per row from softmax(logits / temperature), filtered: [R] int64.

    The filters keep, in this order: the top_k most likely tokens (0: all); of these the smallest
    set whose renormalised probability reaches top_p (1: all); of these the tokens at least min_p
    times as likely as the most likely one (0: all). Tokens as likely as the last one kept are
    kept too, so no order among equals is needed.

    The draw is the Gumbel-max trick (Gumbel 1954) as a race of exponentials: the token with the
    largest logit / temperature - ln(E), E = `exponential` of (seed, position, token).

    logits: [R, V] float32; temperature (above 0), top_p, min_p: [R] float32; top_k: [R] int64;
    seeds: [R] int64 with the bits of the unsigned 64-bit seed; positions: [R] int64, the index of
    the drawn token in its sequence. filtered: False says that no row has a filter, and saves
    looking for one.
    """
    checks.shape("logits", logits, [None, None])
    checks.dtype("logits", logits, (torch.float32,))
    for name, values, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        _check_column(name, values, logits.shape[0], dtype, logits)
    fast = dispatch.implementation("sample", logits)
    if fast is not None:
        tokens: torch.Tensor = fast(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            filtered=filtered,
        )
        return tokens
    scores = logits / temperature.unsqueeze(1)
    if not filtered:
        return _race(scores, seeds, positions)
    wanted = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if not bool(wanted.any()):
        return _race(scores, seeds, positions)
    if bool(wanted.all()):
        threshold = _thresholds(scores, top_k, top_p, min_p)
        return _filtered_race(scores, threshold, seeds, positions)
    tokens = torch.empty_like(positions)
    some, rest = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
    kept = scores[some]
    threshold = _thresholds(kept, top_k[some], top_p[some], min_p[some])
    tokens[some] = _filtered_race(kept, threshold, seeds[some], positions[some])
    tokens[rest] = _race(scores[rest], seeds[rest], positions[rest])
    return tokens


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Natural-log softmax of each row, at its token and at the `top` most likely tokens.

    logits: [R, V] float32; token_ids: [R] int64. Returns the token's log-probability [R] float32,
    its rank [R] int64 (1 + number of tokens with a larger logit), and the most likely tokens, most
    likely first: ids [R, top] int64 and log-probabilities [R, top] float32.
    """
    checks.shape("logits", logits, [None, None])
    checks.dtype("logits", logits, (torch.float32,))
    _check_column("token_ids", token_ids, logits.shape[0], torch.int64, logits)
    fast = dispatch.implementation("log_probabilities", logits)
    if fast is not None:
        found: tuple[torch.Tensor, ...] = fast(logits, token_ids, top)
        return found[0], found[1], found[2], found[3]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, token_ids.unsqueeze(1))
    rank = (logits > own).sum(dim=-1) + 1
    values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
    return (own - total).squeeze(1), rank, ids, values - total


def _thresholds(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The smallest score that each row keeps: [R] float32."""
    vocab = scores.shape[1]
    top_k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    width = _width(top_k, vocab)
    best = scores.topk(width, dim=-1).values
    kth = best.gather(1, top_k.clamp(max=width).unsqueeze(1) - 1)
    kth = torch.where(top_k.unsqueeze(1) < vocab, kth, float("-inf"))
    nucleus = torch.full_like(kth, float("-inf"))
    by_p = (top_p < 1).nonzero().squeeze(1)
    if by_p.numel():
        left = scores[by_p]
        total = left.masked_fill(left < kth[by_p], float("-inf")).logsumexp(-1, keepdim=True)
        wanted = top_p[by_p].unsqueeze(1)
        nucleus[by_p], reached = _nucleus(best[by_p], kth[by_p], total, wanted)
        late = (~reached).nonzero().squeeze(1)
        if late.numel() and width < vocab:
            ordered = left[late].sort(dim=-1, descending=True).values
            rows = by_p[late]
            nucleus[rows], _ = _nucleus(ordered, kth[rows], total[late], wanted[late])
    least = best[:, :1] + min_p.unsqueeze(1).log()
    return torch.maximum(torch.maximum(kth, nucleus), least).squeeze(1)


def _width(top_k: torch.Tensor, vocab: int) -> int:
    """How many of the best scores to look at: enough for every top_k in use."""
    in_use = top_k[top_k < vocab]
    largest = int(in_use.max()) if in_use.numel() else 1
    return min(vocab, max(SHORTLIST, largest))


def _nucleus(
    ordered: torch.Tensor, kth: torch.Tensor, total: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The score at which the probability, summed from the top, reaches `wanted` ([R, 1]), and
    whether it does ([R]). ordered: [R, W] descending; total: [R, 1], log of the sum over all."""
    mass = (ordered - total).exp().masked_fill(ordered < kth, 0.0).cumsum(-1)
    reached = mass >= wanted
    found = reached.any(dim=-1)
    first = reached.int().argmax(dim=-1, keepdim=True)
    score = torch.where(found.unsqueeze(1), ordered.gather(1, first), float("-inf"))
    return score, found


def _race(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    times = exponential(vocabulary_words(seeds, positions, scores.shape[1]))
    return (scores.double() - times.log_()).argmax(dim=-1)


def _filtered_race(
    scores: torch.Tensor, threshold: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """As `_race`, with numbers made only for the tokens that take part."""
    rows, tokens = (scores >= threshold.unsqueeze(1)).nonzero(as_tuple=True)
    times = exponential(token_words(seeds[rows], positions[rows], tokens))
    racing = torch.full(scores.shape, float("-inf"), dtype=torch.float64, device=scores.device)
    racing[rows, tokens] = scores[rows, tokens].double() - times.log_()
    return racing.argmax(dim=-1)


def _check_entries(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    _check_rows(logits)
    _check_column("rows", rows, None, torch.int64, logits)
    _check_column("token_ids", token_ids, rows.shape[0], torch.int64, logits)


def _check_rows(logits: torch.Tensor) -> None:
    """Of logits that are changed in place."""
    checks.shape("logits", logits, [None, None])
    checks.dtype("logits", logits, (torch.float32,))
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise checks.KernelError("The rows of logits must be contiguous to be changed in place.")


def _check_column(
    name: str, values: torch.Tensor, count: int | None, dtype: torch.dtype, logits: torch.Tensor
) -> None:
    checks.shape(name, values, [count])
    checks.dtype(name, values, (dtype,))
    checks.same_device(name, values, "logits", logits)
