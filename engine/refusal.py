"""What can never run on a worker, and why: pure, a sentence or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.protocol.messages import Submit
from pdserve.protocol.ticket import KVTicket, LayoutFingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a worker can hold."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    layout: LayoutFingerprint


def problem_with(message: Submit, tokens: Sequence[int], bounds: Bounds) -> str:
    """A sentence if the request can run on no worker like this, else the empty string. tokens:
    those of prompt and output."""
    sampling, limit = message.sampling, bounds.max_model_len
    prompt, known = message.prompt_len, len(message.output_token_ids)
    room = bounds.num_blocks * bounds.layout.block_size
    if not prompt:
        return "The prompt has no tokens; at least one is needed."
    if sampling.max_tokens <= known:
        return f"max_tokens is {sampling.max_tokens} but {known} tokens exist already."
    if prompt + sampling.max_tokens > limit:
        return (
            f"The prompt's {prompt} tokens and max_tokens {sampling.max_tokens} exceed the "
            f"model length of {limit} tokens."
        )
    if prompt + sampling.max_tokens > room:
        return (
            f"The request needs room for {prompt + sampling.max_tokens} tokens; this worker's "
            f"KV cache holds {room}."
        )
    if min(tokens) < 0 or max(tokens) >= bounds.vocab_size:
        return f"Token ids must be between 0 and {bounds.vocab_size - 1}."
    if max(sampling.logprob_token_ids, default=0) >= bounds.vocab_size:
        return f"logprob_token_ids must be below {bounds.vocab_size}."
    if message.ticket is not None:
        return _problem_with_ticket(message.ticket, message, len(tokens), bounds.layout)
    return ""


def _problem_with_ticket(
    ticket: KVTicket, message: Submit, known: int, layout: LayoutFingerprint
) -> str:
    if ticket.request_id != message.request_id:
        return f"The ticket is that of another request, {ticket.request_id}."
    if ticket.growing:
        if message.output_token_ids or ticket.num_tokens != known:
            return (
                f"A growing ticket covers the prompt, and its first token is to come. This one "
                f"covers {ticket.num_tokens} tokens; {known} are known."
            )
    elif not 0 < ticket.num_tokens < known:
        return (
            f"The ticket covers {ticket.num_tokens} tokens; of {known} known ones it must "
            "cover at least one and leave at least one to compute."
        )
    if ticket.num_blocks != -(-ticket.num_tokens // max(1, ticket.fingerprint.block_size)):
        return f"The ticket names {ticket.num_blocks} blocks for {ticket.num_tokens} tokens."
    if not 0 < ticket.lease_s < math.inf:
        return f"The ticket's lease must be a time above 0 s, not {ticket.lease_s}."
    if not _within(layout, ticket.fingerprint):
        theirs = ticket.fingerprint
        return (
            f"The ticket is of rank {theirs.tp_rank} of {theirs.tp_size}, which does not hold all "
            f"KV heads of rank {layout.tp_rank} of {layout.tp_size}, this worker's."
        )
    return ""


def _within(mine: LayoutFingerprint, theirs: LayoutFingerprint) -> bool:
    """Whether one rank there holds all the KV heads of the rank here."""
    ranks, rest = divmod(mine.tp_size, max(1, theirs.tp_size))
    return ranks > 0 and rest == 0 and mine.tp_rank // ranks == theirs.tp_rank
