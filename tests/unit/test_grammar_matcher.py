"""An answer followed through its constraint: step by step, all at once, and out of bounds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from pdserve.cluster.model_files import resolve_model
from pdserve.engine.grammar import GrammarError, Grammars, Matcher
from pdserve.protocol.grammar import Constraint
from pdserve.protocol.sampling import SamplingParams

VOCAB, EOS = 2048, 2
FOLDER = resolve_model("")
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
GRAMMARS = Grammars(FOLDER, VOCAB)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def schema() -> str:
    return LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})


def make(output: tuple[int, ...] = (), eos: bool = True, **constraint: object) -> Matcher:
    ignore = not eos
    params = SamplingParams(
        seed=0, max_tokens=100, eos_token_ids=(EOS,), ignore_eos=ignore,
        constraint=Constraint(**constraint),  # type: ignore[arg-type]
    )  # fmt: skip
    return GRAMMARS.matcher(params, output)


def allowed(matcher: Matcher) -> list[int] | None:
    """The tokens that may come; None: all."""
    mask = np.zeros(VOCAB // 32, dtype=np.int32)
    if not matcher.fill(mask):
        return None
    bits = mask.view(np.uint32)
    return [token for token in range(VOCAB) if int(bits[token // 32]) >> (token % 32) & 1]


def wander(matcher: Matcher, seed: int) -> list[int]:
    """Any answer that the matcher allows."""
    rng, tokens = random.Random(seed), []
    while not matcher.finished:
        options = allowed(matcher)
        assert options
        tokens.append(rng.choice(options))
        matcher.follow(tokens[-1:])
        assert not matcher.error and len(tokens) < 500
    return tokens


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_drawn_fits_the_schema_and_may_be_replayed(seed: int) -> None:
    tokens = wander(make(grammar=schema()), seed)
    answer = json.loads(TOKENIZER.decode([t for t in tokens if t != EOS]))
    assert set(answer) == {"name", "sizes"} and all(isinstance(n, int) for n in answer["sizes"])
    stepwise = make(grammar=schema())
    for place in range(len(tokens)):
        replayed = make(tuple(tokens[:place]), grammar=schema())
        assert allowed(replayed) == allowed(stepwise)
        assert not replayed.finished
        stepwise.follow(tokens[place : place + 1])
    assert stepwise.finished


def test_eos_is_allowed_where_the_text_may_end_and_nowhere_else() -> None:
    matcher = make(grammar=regex("ab*"))
    assert EOS not in (allowed(matcher) or [])
    matcher.follow(TOKENIZER.encode("a").ids)
    assert EOS in (allowed(matcher) or []) and not matcher.finished
    matcher.follow([EOS])
    assert matcher.finished and not matcher.error


def test_ignoring_eos_makes_the_longest_text() -> None:
    matcher = make(grammar=regex("ab*"), eos=False)
    matcher.follow(TOKENIZER.encode("ab").ids)
    assert EOS not in (allowed(matcher) or []) and not matcher.spent
    matcher = make(grammar=regex("ab"), eos=False)
    matcher.follow(TOKENIZER.encode("ab").ids)
    assert matcher.finished


def test_thoughts_are_free_until_they_end() -> None:
    end = (10, 11)
    matcher = make(grammar=regex("yes"), after=end)
    for token in (5, 10, 7, 10):
        assert allowed(matcher) is None
        matcher.follow([token])
    assert allowed(matcher) is None
    matcher.follow([11])
    options = allowed(matcher)
    assert options and {TOKENIZER.id_to_token(t)[0] for t in options} == {"y"}
    assert allowed(make((5, 10, 7, 10, 11), grammar=regex("yes"), after=end)) == options


def test_a_budget_of_thoughts_forces_their_end() -> None:
    closing, after = (20, 10, 11), (10, 11)
    matcher, tokens = make(after=after, budget=3, closing=closing), []
    while (options := allowed(matcher)) is None or len(options) == 1:
        tokens.append(options[0] if options else 5)
        matcher.follow(tokens[-1:])
        if len(tokens) > 6:
            break
    assert tokens == [5, 5, 5, *closing, 5]
    assert allowed(matcher) is None and not matcher.finished
    early = make((10, 11), after=after, budget=3, closing=closing)
    assert [allowed(early) for _ in range(3) if not early.follow([5])] == [None] * 3
    assert allowed(make(after=after, budget=0, closing=closing)) == [20]


def test_a_token_that_does_not_fit_is_an_error_of_its_own() -> None:
    matcher = make(grammar=regex("ab"))
    matcher.follow(TOKENIZER.encode("x").ids)
    assert "cannot be followed" in matcher.error and allowed(matcher) is None
    with pytest.raises(GrammarError, match="cannot be followed"):
        make(tuple(TOKENIZER.encode("x").ids), grammar=regex("ab"))


def test_what_grows_beyond_its_limits_ends() -> None:
    matcher = make(grammar=regex("(a{1000}){1000}"))
    for token in TOKENIZER.encode("a" * 50).ids:
        allowed(matcher)
        matcher.follow([token])
    assert matcher.error


def test_bad_grammars_and_missing_tokenizers_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="cannot be compiled"):
        make(grammar="start: (")
    params = SamplingParams(seed=0, max_tokens=1, constraint=Constraint(grammar=regex("a")))
    with pytest.raises(GrammarError, match=r"tokenizer\.json is missing"):
        Grammars(tmp_path, VOCAB).matcher(params, ())


def test_only_so_many_grammars_are_kept() -> None:
    for number in range(40):
        make(grammar=regex(f"a{{{number}}}b"))
    assert len(GRAMMARS._compiled) == 32


def options(matcher: Matcher) -> set[int]:
    found = allowed(matcher)
    assert found is not None
    return set(found)


def test_only_allowed_tokens_and_no_forbidden_sequences() -> None:
    a, b, c = (TOKENIZER.encode(text).ids[0] for text in "abc")
    rules = {"allowed": (a, b, c, EOS), "forbidden": ((c,), (a, b), (b, b, a))}
    matcher = make(**rules)
    assert options(matcher) == {a, b, EOS}
    matcher.follow([a])
    assert options(matcher) == {a, EOS}
    matcher.follow([b, b])
    assert options(matcher) == {b, EOS}
    replayed = make((a, b, b), **rules)
    assert options(replayed) == {b, EOS}


def test_forbidden_sequences_alone_leave_everything_else() -> None:
    assert options(make(forbidden=((7,),))) == set(range(VOCAB)) - {7}
    thinking = make(forbidden=((7,),), after=(9,))
    assert options(thinking) == set(range(VOCAB)) - {7}


def test_rules_about_tokens_narrow_a_grammar() -> None:
    x, y, q = (TOKENIZER.encode(text).ids[0] for text in "xyq")
    grammar = regex("[xyz]")
    assert options(make(grammar=grammar, allowed=(y, q))) == {y}
    assert y not in options(make(grammar=grammar, forbidden=((y,),)))
    nothing = make(grammar=grammar, allowed=(q,))
    assert not options(nothing) and "exclude each other" in nothing.error
    assert x in options(make(grammar=grammar))
