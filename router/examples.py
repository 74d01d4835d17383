"""A body for each request model that the API reference shows. A test posts all of them.

They name no model: the document puts the served one in.
"""

from __future__ import annotations

from typing import Any

from pdserve.router import schemas

Json = dict[str, Any]

_QUESTION = [{"role": "user", "content": "What is a prefill worker?"}]

EXAMPLES: dict[type[Any], Json] = {
    schemas.ChatCompletionRequest: {"messages": _QUESTION, "temperature": 0, "max_tokens": 32},
    schemas.CompletionRequest: {"prompt": "A router", "seed": 7, "max_tokens": 16},
    schemas.MessagesRequest: {"messages": _QUESTION, "system": "Be brief.", "max_tokens": 32},
    schemas.CountTokensRequest: {"messages": _QUESTION},
    schemas.ResponsesRequest: {"input": "What is a prefill worker?", "max_output_tokens": 32},
    schemas.InputTokensRequest: {"input": "What is a prefill worker?"},
    schemas.GenerateTokensRequest: {
        "token_ids": [5, 6, 7],
        "sampling_params": {"temperature": 0, "max_tokens": 8},
        "output_mode": "text",
    },
    schemas.AbortRequests: {"request_ids": ["generate-tokens-1"]},
    schemas.TokenizeTextRequest: {"prompt": "Hello!", "return_token_strs": True},
    schemas.TokenizeChatRequest: {"messages": _QUESTION},
    schemas.DetokenizeRequest: {"tokens": [5, 6, 7]},
}


def example_of(kind: type[Any], model: str) -> Json | None:
    """The example of a request model, for a router that serves `model`; None if there is none."""
    found = EXAMPLES.get(kind)
    if found is None:
        return None
    return {"model": model, **found} if "model" in kind.model_fields else found
