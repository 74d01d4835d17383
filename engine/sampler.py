"""From logits and requests to drawn tokens and their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from pdserve import kernels
from pdserve.engine.grammar import Matcher
from pdserve.engine.numbers import to_device
from pdserve.engine.request import Request
from pdserve.protocol.messages import PositionLogprobs
from pdserve.protocol.sampling import SamplingParams


def draw(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request: [R, V] float32 logits, overwritten, → R token ids.

    A token depends on its row, the request's tokens and parameters, and (seed, position). Nothing
    is kept between calls: penalties are counted from the token lists, for those that have them.
    """
    masks = _masks(requests, logits.shape[1])
    _apply_bias(logits, requests)
    _apply_penalties(logits, requests)
    if masks is not None:
        kernels.apply_bitmask(logits, *(torch.from_numpy(a).to(logits.device) for a in masks))
    rows = [row for row, request in enumerate(requests) if not request.sampling.greedy]
    if not rows:
        return kernels.greedy(logits).tolist()
    if len(rows) == len(requests):
        return _sample(logits, requests).tolist()
    tokens = kernels.greedy(logits)
    tokens[rows] = _sample(logits[rows], [requests[row] for row in rows])
    return tokens.tolist()


def processed(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """The scores [R, V] that `draw` draws from: `logits` as it leaves them, divided by the
    temperature, -inf for what top_k, top_p and min_p keep out (as `kernels.sample` has it)."""
    scores = logits.clone()
    for row, request in enumerate(requests):
        params = request.sampling
        if params.greedy:
            continue
        scores[row] /= params.temperature
        ordered = scores[row].sort(descending=True).values
        least = ordered[min(params.top_k or len(ordered), len(ordered)) - 1]
        chances = ordered.masked_fill(ordered < least, float("-inf")).softmax(-1)
        if params.top_p < 1:
            reached = int((chances.cumsum(-1) < params.top_p).sum())
            least = torch.maximum(least, ordered[min(reached, len(ordered) - 1)])
        if params.min_p > 0:
            least = torch.maximum(least, ordered[0] + math.log(params.min_p))
        scores[row].masked_fill_(scores[row] < least, float("-inf"))
    return scores


def answer_logprobs(
    logits: torch.Tensor,
    token_ids: Sequence[int],
    params: Sequence[SamplingParams],
    normalised: bool = True,
) -> list[PositionLogprobs]:
    """Log-probabilities of drawn tokens under logits [R, V], and of what else each request asks
    for; the logits themselves if not `normalised`."""
    tops = [0 if p.logprob_token_ids else p.logprobs or 0 for p in params]
    entries = position_logprobs(logits, token_ids, tops, normalised)
    for row, (token_id, entry, wanted) in enumerate(
        zip(token_ids, entries, [p.logprob_token_ids for p in params], strict=True)
    ):
        if wanted:
            values = logits[row, list(wanted)] - (logits[row, token_id] - entry.logprob)
            named = sorted(zip(wanted, values.tolist(), strict=True), key=lambda pair: -pair[1])
            entries[row] = msgspec.structs.replace(entry, top=tuple(named))
    return entries


def position_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int], normalised: bool = True
) -> list[PositionLogprobs]:
    """Log-probabilities of `token_ids` under logits [R, V], with tops[r] most likely tokens; the
    logits themselves if not `normalised`."""
    if not token_ids:
        return []
    chosen = torch.tensor(token_ids, device=logits.device)
    own, rank, ids, values = kernels.log_probabilities(logits, chosen, max(tops))
    if not normalised:
        own = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        values = logits.gather(1, ids)
    columns = zip(own.tolist(), rank.tolist(), ids.tolist(), values.tolist(), tops, strict=True)
    return [
        PositionLogprobs(logprob, place, tuple(zip(top_ids[:top], top_values[:top], strict=True)))
        for logprob, place, top_ids, top_values, top in columns
    ]


def _sample(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    params = [request.sampling for request in requests]
    columns = [
        [p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    floats = [np.array(column, dtype=np.float32) for column in columns]
    top_k = np.array([p.top_k for p in params], dtype=np.int64)
    seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
    positions = np.array([request.num_tokens for request in requests], dtype=np.int64)
    temperature, top_p, min_p = to_device(floats, logits.device)
    whole = to_device((top_k, seeds, positions), logits.device)
    return kernels.sample(
        logits,
        temperature=temperature,
        top_k=whole[0],
        top_p=top_p,
        min_p=min_p,
        seeds=whole[1],
        positions=whole[2],
        filtered=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params),
    )


def _masks(requests: Sequence[Request], vocab_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows [n] int64 whose matchers forbid something, and their bitmasks [n, ⌈V / 32⌉] int32."""
    rows: list[int] = []
    masks: list[np.ndarray] = []
    for row, request in enumerate(requests):
        if request.matcher is None:
            continue
        mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        if request.matcher.fill(mask):
            rows.append(row)
            masks.append(mask)
    return (np.array(rows, dtype=np.int64), np.stack(masks)) if rows else None


def _must_go_on(request: Request) -> bool:
    """It may not end yet, and its grammar lets it go on."""
    matcher: Matcher | None = request.matcher
    early = request.num_output < request.sampling.min_tokens
    return early and not (matcher is not None and matcher.spent)


def _apply_bias(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Logit biases, and -inf for ending tokens that come too early."""
    rows: list[int] = []
    token_ids: list[int] = []
    bias: list[float] = []
    for row, request in enumerate(requests):
        params = request.sampling
        entries = dict(params.logit_bias)
        if _must_go_on(request):
            # A tokenizer may end answers with tokens that the model has no logits for.
            ending = params.eos_token_ids + params.stop_token_ids
            possible = (token for token in ending if token < logits.shape[1])
            entries |= dict.fromkeys(possible, float("-inf"))
        rows += [row] * len(entries)
        token_ids += entries.keys()
        bias += entries.values()
    if rows:
        device = logits.device
        kernels.apply_bias(
            logits,
            torch.tensor(rows, device=device),
            torch.tensor(token_ids, device=device),
            torch.tensor(bias, dtype=torch.float32, device=device),
        )


def _apply_penalties(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    entries = [
        (row, *_token_counts(request))
        for row, request in enumerate(requests)
        if _is_penalised(request.sampling)
    ]
    if not entries:
        return
    params = [request.sampling for request in requests]
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in entries])
    kernels.apply_penalties(
        logits,
        torch.from_numpy(rows).to(device),
        torch.from_numpy(np.concatenate([ids for _, ids, _ in entries])).to(device),
        torch.from_numpy(np.concatenate([counts for _, _, counts in entries])).to(device),
        presence=column([p.presence_penalty for p in params]),
        frequency=column([p.frequency_penalty for p in params]),
        repetition=column([p.repetition_penalty for p in params]),
    )


def _is_penalised(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def _token_counts(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens of prompt and output, and how often each is in the output."""
    tokens = np.array(request.token_ids, dtype=np.int64)
    ids, inverse = np.unique(tokens, return_inverse=True)
    counts = np.bincount(inverse[request.prompt_len :], minlength=len(ids)).astype(np.int64)
    return ids, counts
