"""A body for each request model that the API reference shows. A test posts all of them.

They name no model: the document puts the served one in.
"""

from __future__ import annotations

from typing import Any

from pdserve.router import schemas, token_schemas

Json = dict[str, Any]

_QUESTION = [{"role": "user", "content": "What is a prefill worker?"}]

_GREETING = [{"role": "user", "content": "Hello!"}]
_GENERATED = {
    "request_id": "generate-tokens-1",
    "choices": [{"token_ids": [8, 9], "finish_reason": "length"}],
}

EXAMPLES: dict[type[Any], Json] = {
    schemas.ChatCompletionRequest: {"messages": _QUESTION, "temperature": 0, "max_tokens": 32},
    schemas.CompletionRequest: {"prompt": "A router", "seed": 7, "max_tokens": 16},
    schemas.MessagesRequest: {"messages": _QUESTION, "system": "Be brief.", "max_tokens": 32},
    schemas.CountTokensRequest: {"messages": _QUESTION},
    schemas.ResponsesRequest: {"input": "What is a prefill worker?", "max_output_tokens": 32},
    schemas.InputTokensRequest: {"input": "What is a prefill worker?"},
    token_schemas.GenerateTokensRequest: {
        "token_ids": [5, 6, 7],
        "sampling_params": {"temperature": 0, "max_tokens": 8},
        "output_mode": "text",
    },
    schemas.BatchChatRequest: {"messages": [_QUESTION, _GREETING], "temperature": 0},
    token_schemas.DerenderChatRequest: {
        "generate_response": _GENERATED,
        "prompt_tokens": 3,
        "chat_request": {"messages": _QUESTION},
    },
    token_schemas.DerenderCompletionRequest: {
        "generate_responses": [_GENERATED],
        "prompt_tokens": [3],
        "completion_request": {"prompt": [5, 6, 7]},
    },
    token_schemas.DerenderResponsesRequest: {
        "generate_response": _GENERATED,
        "prompt_tokens": 3,
        "responses_request": {"input": "What is a prefill worker?"},
    },
    token_schemas.AbortRequests: {"request_ids": ["generate-tokens-1"]},
    token_schemas.TokenizeTextRequest: {"prompt": "Hello!", "return_token_strs": True},
    token_schemas.TokenizeChatRequest: {"messages": _QUESTION},
    token_schemas.DetokenizeRequest: {"tokens": [5, 6, 7]},
}


def example_of(kind: type[Any], model: str) -> Json | None:
    """The example of a request model, for a router that serves `model`; None if there is none."""
    found = EXAMPLES.get(kind)
    if found is None:
        return None
    return {"model": model, **found} if "model" in kind.model_fields else found
