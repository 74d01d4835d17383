"""Masks in the sampler: they win over biases and `min_tokens`, and leave other rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from stepping import make_request
from tokenizers import Tokenizer

from pdserve.cluster.model_files import resolve_model
from pdserve.engine import sampler
from pdserve.engine.grammar import Grammars
from pdserve.engine.request import Request
from pdserve.protocol.grammar import Constraint

VOCAB, EOS = 2048, 2
FOLDER = resolve_model("")
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
GRAMMARS = Grammars(FOLDER, VOCAB)


def request(pattern: str, output: str = "", **sampling: Any) -> Request:
    grammar = LLMatcher.grammar_from_regex(pattern)
    tokens = TOKENIZER.encode(output).ids
    found = make_request(
        [5], output=tokens, eos_token_ids=(EOS,), constraint=Constraint(grammar=grammar), **sampling
    )
    found.matcher = GRAMMARS.matcher(found.sampling, tokens)
    return found


def draw(*requests: Request) -> list[str]:
    torch.manual_seed(0)
    tokens = sampler.draw(torch.randn(len(requests), VOCAB), list(requests))
    return [TOKENIZER.id_to_token(token) for token in tokens]


def test_rows_without_a_grammar_are_left_alone() -> None:
    plain = make_request([5], eos_token_ids=(EOS,))
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    wanted = TOKENIZER.id_to_token(int(logits[1].argmax()))
    one, two, three = draw(request("[xyz]"), plain, request("[0-9]", temperature=1.0, top_k=5))
    assert one in "xyz" and two == wanted and three in "0123456789"


def test_where_only_the_end_is_allowed_min_tokens_do_not_wait() -> None:
    found = make_request(
        [5], eos_token_ids=(EOS,), constraint=Constraint(allowed=(EOS,)), min_tokens=9
    )
    found.matcher = GRAMMARS.matcher(found.sampling, [])
    assert draw(found) == ["<|im_end|>"]


def test_scores_of_chosen_tokens() -> None:
    """They are what they are among all, whatever is drawn, most likely first."""
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    exact = logits.double().log_softmax(-1)
    chosen = (5, 700, 2000)
    params = [
        make_request([5], logprobs=3, logprob_token_ids=chosen).sampling,
        make_request([5], logprobs=2).sampling,
        make_request([5], logprobs=1, logprob_token_ids=(9,)).sampling,
    ]
    entries = sampler.answer_logprobs(logits, [700, 8, 9], params)
    assert {token for token, _ in entries[0].top} == set(chosen)
    assert [value for _, value in entries[0].top] == sorted(
        (value for _, value in entries[0].top), reverse=True
    )
    for row, (entry, drawn) in enumerate(zip(entries, (700, 8, 9), strict=True)):
        assert abs(entry.logprob - exact[row, drawn]) < 1e-5
        for token, value in entry.top:
            assert abs(value - exact[row, token]) < 1e-5
    assert len(entries[1].top) == 2 and entries[2].top == ((9, entries[2].logprob),)


def test_a_grammar_wins_over_a_bias() -> None:
    (token,) = TOKENIZER.encode("q").ids
    assert draw(request("[xyz]", logit_bias={token: 100.0}))[0] in "xyz"


def test_the_end_waits_for_min_tokens_unless_nothing_else_fits() -> None:
    assert draw(request("ab*", "a", logit_bias={EOS: 100.0}))[0] == "<|im_end|>"
    assert draw(request("ab*", "a", logit_bias={EOS: 100.0}, min_tokens=9))[0].startswith("b")
    spent = request("a", min_tokens=9)
    assert spent.matcher is not None
    spent.matcher.follow(TOKENIZER.encode("a").ids)
    assert spent.matcher.finished and draw(spent) == ["<|im_end|>"]
    assert spent.matcher.spent


def test_a_matcher_that_fails_leaves_the_others_alone() -> None:
    bad = request("ab")
    assert bad.matcher is not None
    bad.matcher.follow(TOKENIZER.encode("zz").ids)
    assert bad.matcher.error
    assert draw(bad, request("[xyz]"))[1] in "xyz"
    assert not bad.matcher.fill(np.zeros(VOCAB // 32, dtype=np.int32))
