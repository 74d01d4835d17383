"""Sampling parameters as they travel: complete, validated by the router, never defaulted again."""

from __future__ import annotations

import msgspec

from pdserve.protocol.grammar import Constraint

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM and OpenAI's API."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn for one request.

    The token at position p (index in prompt + output) is a function of the logits at p - 1, of the
    tokens so far, of these parameters and of the counter (seed, p): never of the batch, the worker
    or the number of draws made before. That is what makes a request repeatable on any topology.
    """

    seed: int
    """64-bit key of the counter-based generator (0 ≤ seed < 2**64). The router draws one where the
    client gave none, so that a request moved to another worker goes on with the same numbers."""
    max_tokens: int
    """Most tokens to generate, at least 1; prompt + max_tokens never exceeds the model length."""
    temperature: float = 1.0
    """Below GREEDY_BELOW the most likely token is taken (ties: the lowest id)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this (1.0: all)."""
    top_k: int = 0
    """Keep the k most likely tokens (0: all)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p × the most likely one (0.0: none)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once per time that the token was generated."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided (if positive) or multiplied by this
    (Keskar et al. 2019, "CTRL")."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer unless `ignore_eos`."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the answer, named by the client, `ignore_eos` or not."""
    min_tokens: int = 0
    """Until so many tokens are out, eos and stop tokens cannot be drawn."""
    ignore_eos: bool = False
    """No end-of-sequence token ends the answer. Under a grammar none is drawn before nothing else
    may follow: the answer is as long as the grammar lets it be."""
    constraint: Constraint | None = None
    """What may be drawn at all; it goes before bias and `min_tokens`."""
    logprobs: int | None = None
    """Report the log-probability of each generated token and of the n most likely ones
    (None: nothing; 0: only the token's own). Taken from the raw logits, before penalties."""
    logprob_token_ids: tuple[int, ...] = ()
    """With `logprobs`: report these tokens' log-probabilities instead of the most likely ones'."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (the first has none). Needs a full prefill: the prefix
    cache is not read."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Every token that ends the answer."""
        eos = () if self.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.stop_token_ids)
