"""Answers that would be too large for the way between worker and router are refused."""

import pytest

from pdserve.router.errors import BadRequest
from pdserve.router.requests import MAX_PROMPT_LOGPROBS, Prompt, _bound_prompt_logprobs


def prompt(length: int) -> Prompt:
    return Prompt(token_ids=[1] * length, text=None)


def test_prompt_logprobs_are_bounded() -> None:
    _bound_prompt_logprobs(0, [prompt(MAX_PROMPT_LOGPROBS)])
    _bound_prompt_logprobs(4, [prompt(3), prompt(MAX_PROMPT_LOGPROBS // 5)])
    with pytest.raises(BadRequest, match=str(MAX_PROMPT_LOGPROBS)) as refused:
        _bound_prompt_logprobs(4, [prompt(3), prompt(MAX_PROMPT_LOGPROBS // 5 + 1)])
    assert refused.value.param == "prompt_logprobs"
