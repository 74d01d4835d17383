"""Every limit of the sampling table: accepted at the edge, refused beyond it, naming the field."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.protocol.sampling import SamplingParams
from pdserve.router.errors import ApiError, BadRequest
from pdserve.router.sampling import (
    Defaults,
    Vocabulary,
    answer_count,
    derive_seed,
    logprob_count,
    sampling_params,
    stop_strings,
)
from pdserve.router.schemas import CompletionRequest, parse

NEUTRAL = Defaults()
VOCABULARY = Vocabulary(size=100, eos_token_ids=(2,))


def params(defaults: Defaults = NEUTRAL, asked: int = 10, **fields: Any) -> SamplingParams:
    body = parse(CompletionRequest, {"prompt": "x", **fields})
    answer_count(body)
    stop_strings(body)
    return sampling_params(
        body,
        defaults,
        VOCABULARY,
        seed=77,
        max_tokens=10,
        asked_tokens=asked,
        logprobs=None,
        prompt_logprobs=None,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 1.0),
        ("top_p", 0.001),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 5.0),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("seed", -1),
        ("stop", ["a", "b", "c", "d"]),
        ("stop", "a"),
        ("stop", []),
        ("stop_token_ids", [0, 99]),
        ("min_tokens", 0),
        ("min_tokens", 10),
        ("logit_bias", {"0": -100, "99": 100}),
        ("n", 1),
        ("n", 16384),
    ],
)
def test_the_edges_are_in(field: str, value: Any) -> None:
    params(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("min_tokens", -1),
        ("min_tokens", 11),
        ("logit_bias", {"100": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": "y"}),
        ("n", 0),
        ("n", 16385),
        ("n", -1),
    ],
)
def test_beyond_them_is_a_400_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        params(**{field: value})
    assert caught.value.status == 400
    assert field in str(caught.value.param) and field in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_what_is_no_number_is_refused(field: str, value: float) -> None:
    with pytest.raises(ApiError, match=field):
        params(**{field: value})


def test_all_nulls_are_as_if_absent() -> None:
    names = [name for name in CompletionRequest.model_fields if name not in ("prompt",)]
    assert params(**dict.fromkeys(names)) == params()


def test_request_beats_model_beats_neutral() -> None:
    defaults = Defaults.from_generation_config(
        {"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2, "unknown": 1}
    )
    found = params(defaults, temperature=0.9)
    assert (found.temperature, found.top_k, found.top_p) == (0.9, 20, 1.0)


def test_greedy_is_plain() -> None:
    found = params(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert found.greedy
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.0, 1.0, 0, 0.0)


def test_greedy_has_one_answer() -> None:
    with pytest.raises(BadRequest, match="n must be 1 when using greedy sampling, got 2"):
        params(temperature=0, n=2)


def test_very_cold_is_raised() -> None:
    assert params(temperature=0.003).temperature == 0.01


def test_bias_is_clamped() -> None:
    assert params(logit_bias={"3": 1000, "4": -1000}).logit_bias == {3: 100.0, 4: -100.0}


def test_seeds() -> None:
    assert params().seed == 77
    assert params(seed=-1).seed == 77
    assert params(seed=0).seed == 0
    assert params(seed=-2).seed == 2**64 - 2
    seeds = {derive_seed(5, index) for index in range(100)}
    assert len(seeds) == 100 and 5 in seeds
    assert derive_seed(5, 3) == derive_seed(5, 3) != derive_seed(6, 3)


def test_min_tokens_counts_against_what_was_asked_for() -> None:
    """Asked for 50, room for 10: the minimum shrinks with the room."""
    assert params(asked=50, min_tokens=30).min_tokens == 10


def test_logprob_limits() -> None:
    assert logprob_count("logprobs", 0, 20, 100) == 0
    assert logprob_count("logprobs", 20, 20, 100) == 20
    assert logprob_count("logprobs", -1, -1, 100) == 100
    for value, limit in ((21, 20), (-1, 20), (-2, -1)):
        with pytest.raises(BadRequest, match="logprobs must be"):
            logprob_count("logprobs", value, limit, 100)
