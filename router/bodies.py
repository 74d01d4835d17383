"""Every request model there is."""

from __future__ import annotations

from pydantic import BaseModel

from pdserve.router.schemas import (
    BatchChatRequest,
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    InputTokensRequest,
    MessagesRequest,
    ResponsesRequest,
)
from pdserve.router.token_schemas import (
    AbortRequests,
    DerenderChatRequest,
    DerenderCompletionRequest,
    DerenderResponsesRequest,
    DetokenizeRequest,
    EngineSampling,
    GenerateTokensRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)

BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    MessagesRequest,
    CountTokensRequest,
    ResponsesRequest,
    InputTokensRequest,
    EngineSampling,
    GenerateTokensRequest,
    BatchChatRequest,
    AbortRequests,
    DerenderChatRequest,
    DerenderCompletionRequest,
    DerenderResponsesRequest,
    TokenizeTextRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)
