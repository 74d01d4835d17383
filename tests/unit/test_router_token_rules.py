"""Rules about single tokens, and answers that run in circles."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pdserve.cluster.model_files import resolve_model
from pdserve.router.errors import BadRequest
from pdserve.router.repetition import Repetition, RepetitionScanner, repetition_of
from pdserve.router.sampling import Vocabulary
from pdserve.router.schemas import CompletionRequest, RepetitionDetection
from pdserve.router.token_rules import chosen_tokens, with_token_rules
from pdserve.router.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(resolve_model(""))
VOCABULARY = Vocabulary(size=TOKENIZER.size, eos_token_ids=(2,))


def rules(**fields: Any) -> Any:
    return with_token_rules(None, CompletionRequest(**fields), VOCABULARY, TOKENIZER)


def test_rules_become_a_constraint() -> None:
    assert rules() is None and rules(bad_words=[]) is None
    assert rules(allowed_token_ids=[5, 3, 5]).allowed == (5, 3)
    found = rules(bad_words=["worker", " worker"]).forbidden
    assert set(found) == {tuple(TOKENIZER.encode(t, False)) for t in ("worker", " worker")}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"bad_words": ["x" * 257]}, "bad_words"),
        ({"bad_words": ["x"] * 1025}, "bad_words"),
    ],
)
def test_rules_that_make_no_sense(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        rules(**fields)
    assert caught.value.param == param


def test_chosen_tokens() -> None:
    fields = CompletionRequest(logprob_token_ids=[7, 5, 7])
    assert chosen_tokens(fields, 0, VOCABULARY) == (7, 5)
    assert chosen_tokens(CompletionRequest(logprob_token_ids=[]), None, VOCABULARY) == ()
    for ids, logprobs in (([1], None), ([10**6], 0), ([1] * 129, 0)):
        with pytest.raises(BadRequest) as caught:
            chosen_tokens(CompletionRequest(logprob_token_ids=ids), logprobs, VOCABULARY)
        assert caught.value.param == "logprob_token_ids"


def ends_at(rule: Repetition, tokens: list[int]) -> int | None:
    scanner = RepetitionScanner(rule)
    return next((place for place, token in enumerate(tokens) if scanner.feed(token)), None)


def plainly(rule: Repetition, tokens: list[int]) -> int | None:
    """The same, said simply."""
    for end in range(1, len(tokens) + 1):
        for size in range(rule.shortest, rule.longest + 1):
            if size * rule.count <= end:
                pattern = tokens[end - size : end]
                if tokens[end - size * rule.count : end] == pattern * rule.count:
                    return end - 1
    return None


@pytest.mark.parametrize("seed", range(5))
def test_repetitions_are_found_where_they_are(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        longest = rng.randint(1, 5)
        rule = Repetition(rng.randint(1, longest), longest, rng.randint(2, 4))
        tokens = [rng.randint(0, 2) for _ in range(30)]
        assert ends_at(rule, tokens) == plainly(rule, tokens)


def test_which_repetitions() -> None:
    assert repetition_of(None) is None
    assert repetition_of(RepetitionDetection(min_count=0)) is None
    asked = RepetitionDetection(max_pattern_size=3, min_count=2)
    assert repetition_of(asked) == Repetition(1, 3, 2)
    for bad in ({"max_pattern_size": -1}, {"max_pattern_size": 257, "min_count": 2},
                {"max_pattern_size": 3}, {"max_pattern_size": 3, "min_count": 1},
                {"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}):  # fmt: skip
        with pytest.raises(BadRequest) as caught:
            repetition_of(RepetitionDetection(**bad))
        assert caught.value.param == "repetition_detection"
