"""The request bodies about tokens: those of callers that keep text and tokens apart."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pdserve.router.schemas import (
    ChatCompletionRequest,
    ChatFields,
    CompletionRequest,
    Finite,
    Int64,
    Many,
    Object,
    RequestBody,
    ResponsesRequest,
    SamplingFields,
    StreamOptions,
    TokenId,
    TokenIds,
)


class EngineSampling(SamplingFields):
    """`sampling_params` of /inference/v1/generate."""

    logprobs: Int64 | None = None
    detokenize: bool | None = None

    # advisory
    output_kind: Any = None
    skip_clone: Any = None
    skip_reading_prefix_cache: bool | None = None

    # refused
    extra_args: Any = None


class ReasoningParserKwargs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    chat_template_kwargs: Object | None = None


class GenerateTokensRequest(RequestBody):
    model: str | None = None
    token_ids: Annotated[TokenIds, Field(min_length=1)]
    sampling_params: Object
    output_mode: Literal["tokens", "text"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: Int64 | None = None
    reasoning_ended: bool | None = None

    # advisory
    token_offsets: Any = None
    reasoning_parser_kwargs: ReasoningParserKwargs | None = None

    # refused
    features: Any = None
    content_parts: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None


class AbortRequests(RequestBody):
    request_ids: Many[str]


class TokenizeTextRequest(RequestBody):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatFields):
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: TokenIds


class TokenScore(RequestBody):
    token_id: TokenId
    logprob: Finite
    rank: Int64 | None = None


class ScoredToken(TokenScore):
    top_logprobs: Many[TokenScore] = Field(default_factory=list)


class TokenScores(RequestBody):
    content: Many[ScoredToken]


MAX_CHOICES = 1024
Name = Annotated[str, Field(max_length=256)]


class GeneratedChoice(RequestBody):
    index: Annotated[int, Field(ge=0, lt=MAX_CHOICES)] = 0
    token_ids: TokenIds
    finish_reason: Literal["stop", "length", "abort", "error", "repetition"] | None = None
    stop_reason: int | str | None = None
    logprobs: TokenScores | None = None


class Generated(RequestBody):
    """What /inference/v1/generate answers: all of it, or one chunk of a stream."""

    request_id: str
    created: Int64 | None = None
    output_mode: Literal["tokens"] = "tokens"
    choices: Many[GeneratedChoice]
    usage: Object | None = None
    prompt_logprobs: Many[Object | None] | None = None


class StreamState(RequestBody):
    """Where the derendering of a stream stands; the caller keeps it, one for each choice."""

    output_token_ids: TokenIds
    output_chunk_lens: TokenIds
    """Tokens of each chunk."""
    role_sent: bool
    waiting: Many[ScoredToken] = Field(default_factory=list)
    """Scores of the last tokens, which have not been sent: their text is not complete."""


class ResponseState(StreamState):
    """That of a stream of a response, whose last event says everything again."""

    created: Int64
    names: Many[Annotated[list[Name], Field(min_length=2, max_length=2)]]
    """Of the items so far: id, and of calls call_id."""
    waiting: Many[ScoredToken] = Field(default_factory=list)
    """Scores of all tokens so far."""


Count = Annotated[int, Field(ge=1, le=2**31)]


class DerenderRequest(RequestBody):
    """One answer."""

    model: str | None = None
    prompt_tokens: Count
    prompt_token_ids: TokenIds | None = None
    generate_response: Generated | None = None
    stream: bool | None = None
    generate_chunk: Generated | None = None
    stream_state: StreamState | None = None


class DerenderChatRequest(DerenderRequest):
    chat_request: ChatCompletionRequest | None = None


class DerenderResponsesRequest(DerenderRequest):
    responses_request: ResponsesRequest
    stream_state: ResponseState | None = None


class DerenderCompletionRequest(RequestBody):
    """The answers to one or more prompts, or a chunk of one."""

    model: str | None = None
    prompt_tokens: Count | Many[Count]
    prompt_token_ids: TokenIds | Many[TokenIds] | None = None
    generate_responses: Many[Generated] | None = None
    stream: bool | None = None
    generate_chunk: Generated | None = None
    stream_state: StreamState | None = None
    completion_request: CompletionRequest | None = None
