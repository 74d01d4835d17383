"""Grammars: which tokens may come next, by llguidance.

`Grammars` compiles for one vocabulary and may be used from any thread. A `Matcher` is one answer's
state, for one thread at a time: first the one that made it, then the engine's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pdserve.protocol.errors import PdserveError
from pdserve.protocol.grammar import LIMITS, Constraint
from pdserve.protocol.sampling import SamplingParams

KEPT = 32
"""Compiled grammars that are kept."""


class GrammarError(PdserveError):
    """A grammar that cannot be used here, as a sentence."""


class Matcher:
    """Follows one answer through its constraint.

    Its state is a function of the tokens it has followed: a request that moves to another worker,
    or starts again after preemption, gets an equal one by following its outputs so far.
    """

    def __init__(self, sampling: SamplingParams, grammar: LLMatcher | None) -> None:
        """`grammar` is in its first state, and this matcher's own from now on."""
        self._constraint = sampling.constraint or Constraint()
        self._grammar = grammar
        self._eos = sampling.eos_token_ids
        self._ignore_eos = sampling.ignore_eos
        self._thinking = bool(self._constraint.after)
        self._thought: list[int] = []
        self._forced = 0
        """Tokens of `closing` that have come, once the budget is spent."""
        self._allowed: np.ndarray | None = None
        """Bits of the allowed tokens, made when first needed."""
        allowed, forbidden = self._constraint.allowed, self._constraint.forbidden
        self._recent: deque[int] = deque(maxlen=max(map(len, forbidden), default=0))
        """The last tokens, as many as a forbidden sequence may have."""
        ends = {*sampling.eos_token_ids, *sampling.stop_token_ids}
        self._only_ends = bool(allowed) and ends.issuperset(allowed)
        self.finished = False
        """Nothing can be added to the answer."""
        self.spent = False
        """As of the last `fill`: only the end of the answer may follow."""
        self.error = ""
        """Why it cannot go on, as a sentence."""

    def follow(self, token_ids: Iterable[int]) -> None:
        """Take the answer's next tokens."""
        for token_id in token_ids:
            self._recent.append(token_id)
            if self._thinking:
                self._think(token_id)
            elif self._grammar is not None and not (self.error or self.finished):
                self._consume(self._grammar, token_id)

    def _think(self, token_id: int) -> None:
        after, budget = self._constraint.after, self._constraint.budget
        if budget is not None and len(self._thought) >= budget + self._forced:
            self._forced += 1
        self._thought.append(token_id)
        self._thinking = tuple(self._thought[-len(after) :]) != after

    def _consume(self, grammar: LLMatcher, token_id: int) -> None:
        if token_id in self._eos:
            self.finished = True
        elif not grammar.consume_token(token_id):
            self._fail(grammar)
        else:
            self.finished = grammar.is_stopped()

    def fill(self, mask: np.ndarray) -> bool:
        """Set the bits of the tokens that may come next; False: there is nothing to forbid.

        mask: [⌈V / 32⌉] int32, zero. An `error` leaves it unfinished.
        """
        bounded = self._fill_form(mask)
        allowed, forbidden = self._constraint.allowed, self._constraint.forbidden
        if self.error or not (allowed or forbidden):
            return bounded
        if not bounded:
            mask[:] = -1
        if allowed:
            if self._allowed is None:
                self._allowed = np.zeros_like(mask)
                _set(self._allowed, allowed)
            mask &= self._allowed
        _clear(mask, self._forbidden_now())
        self.spent = self.spent or self._only_ends
        if not mask.any():
            self.error = (
                "Nothing may follow: allowed_token_ids, bad_words and the form of the answer "
                "exclude each other."
            )
        return True

    def _forbidden_now(self) -> Iterator[int]:
        """Tokens that would complete a forbidden sequence."""
        recent = tuple(self._recent)
        for sequence in self._constraint.forbidden:
            before = sequence[:-1]
            if not before or recent[-len(before) :] == before:
                yield sequence[-1]

    def _fill_form(self, mask: np.ndarray) -> bool:
        """`fill`, by thoughts and grammar alone."""
        if self._thinking:
            return self._force(mask)
        grammar = self._grammar
        if grammar is None or self.error:
            return False
        grammar.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if grammar.is_error():
            self._fail(grammar)
            return False
        _clear(mask, self._eos)
        self.spent = not mask.any()
        if self.spent and not self._eos:
            self.error = (
                "The grammar lets nothing follow, and the model has no token that ends an answer."
            )
        elif self.spent or (grammar.is_accepting() and not self._ignore_eos):
            _set(mask, self._eos)
        return True

    def _force(self, mask: np.ndarray) -> bool:
        budget, closing = self._constraint.budget, self._constraint.closing
        if budget is None or len(self._thought) < budget + self._forced:
            return False
        _set(mask, closing[self._forced : self._forced + 1])
        return True

    def _fail(self, grammar: LLMatcher) -> None:
        reason = grammar.get_error().partition("\n")[0]
        self.error = f"The grammar cannot be followed any further: {reason}."


class Grammars:
    """Compiles grammars for one model."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """`folder` holds tokenizer.json, read when the first grammar comes."""
        self._path = folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, sampling: SamplingParams, output_token_ids: Iterable[int]) -> Matcher:
        """Where an answer with these tokens stands. Raises GrammarError. May take seconds."""
        constraint = sampling.constraint
        text = constraint.grammar if constraint else ""
        matcher = Matcher(sampling, self._compile(text, sampling.eos_token_ids) if text else None)
        matcher.follow(output_token_ids)
        if matcher.error:
            raise GrammarError(matcher.error)
        return matcher

    def _compile(self, text: str, eos_token_ids: tuple[int, ...]) -> LLMatcher:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer(eos_token_ids)
            found = self._compiled.pop(text, None)
            if found is None:
                limits = LLParserLimits(verbose_errors=False, **LIMITS)
                found = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
                if found.is_error():
                    raise GrammarError(f"The grammar cannot be compiled: {found.get_error()}")
            self._compiled[text] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return found.deep_copy()

    def _read_tokenizer(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        eos = [token for token in eos_token_ids if token < self._vocab_size]
        try:
            content = self._path.read_text(encoding="utf-8")
            return LLTokenizer(content, n_vocab=self._vocab_size, eos_token=eos or None)
        except (OSError, ValueError) as error:
            raise GrammarError(
                f"Grammars cannot be used with this model: {self._path.name} is missing or not of "
                f"a kind that they know ({error})."
            ) from None


def _set(mask: np.ndarray, token_ids: Iterable[int]) -> None:
    bits = mask.view(np.uint32)
    for token_id in token_ids:
        if token_id // 32 < len(bits):
            bits[token_id // 32] |= np.uint32(1 << token_id % 32)


def _clear(mask: np.ndarray, token_ids: Iterable[int]) -> None:
    bits = mask.view(np.uint32)
    for token_id in token_ids:
        if token_id // 32 < len(bits):
            bits[token_id // 32] &= ~np.uint32(1 << token_id % 32)
