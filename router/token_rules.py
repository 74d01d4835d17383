"""What a client says about single tokens: those that may be drawn, and those it wants scores of."""

from __future__ import annotations

import msgspec

from pdserve.protocol.grammar import Constraint
from pdserve.router.errors import BadRequest
from pdserve.router.sampling import Vocabulary, bad
from pdserve.router.schemas import SamplingFields
from pdserve.router.tokenizer import TextTokenizer

MAX_CHOSEN = 128
"""Tokens whose log-probabilities can be asked for by their ids."""
MAX_BAD_WORDS = 1024
MAX_BAD_CHARS = 256


def with_token_rules(
    constraint: Constraint | None,
    fields: SamplingFields,
    vocabulary: Vocabulary,
    tokenizer: TextTokenizer,
) -> Constraint | None:
    """The constraint, and what `allowed_token_ids` and `bad_words` add to it. Raises BadRequest."""
    allowed, forbidden = _allowed(fields, vocabulary), _forbidden(fields, tokenizer)
    if not (allowed or forbidden):
        return constraint
    return msgspec.structs.replace(constraint or Constraint(), allowed=allowed, forbidden=forbidden)


def _allowed(fields: SamplingFields, vocabulary: Vocabulary) -> tuple[int, ...]:
    given = fields.allowed_token_ids
    if given is None:
        return ()
    if not given:
        raise BadRequest(
            "allowed_token_ids must not be empty: nothing could be drawn "
            "(parameter=allowed_token_ids, value=[]).",
            param="allowed_token_ids",
        )
    vocabulary.check("allowed_token_ids", given)
    return tuple(dict.fromkeys(given))


def _forbidden(fields: SamplingFields, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """The words as tokens: as they begin a text, and as they follow a blank."""
    words = fields.bad_words or []
    if len(words) > MAX_BAD_WORDS:
        raise bad("bad_words", f"must be at most {MAX_BAD_WORDS} words", len(words))
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip() or len(word) > MAX_BAD_CHARS:
            rule = f"must hold words of 1 to {MAX_BAD_CHARS} characters, not only blanks"
            raise bad("bad_words", rule, word)
        for text in (word, " " + word.lstrip()):
            tokens = tuple(tokenizer.encode(text, False))
            if not tokens:
                raise bad("bad_words", "must hold words that the model has tokens for", word)
            found[tokens] = None
    return tuple(found)


def chosen_tokens(
    fields: SamplingFields, logprobs: int | None, vocabulary: Vocabulary
) -> tuple[int, ...]:
    """Tokens whose scores stand beside each drawn one's instead of the most likely ones'. Raises
    BadRequest."""
    given = fields.logprob_token_ids or []
    if not given:
        return ()
    if logprobs is None:
        raise BadRequest(
            "logprob_token_ids needs logprobs to be on (parameter=logprob_token_ids).",
            param="logprob_token_ids",
        )
    if len(given) > MAX_CHOSEN:
        raise bad("logprob_token_ids", f"must be at most {MAX_CHOSEN} token ids", len(given))
    vocabulary.check("logprob_token_ids", given)
    return tuple(dict.fromkeys(given))
